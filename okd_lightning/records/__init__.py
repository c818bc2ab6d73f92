"""Records of a run, from examples to batches, and the packing of rows.

* ``requests``: ``Request`` and its ``Response`` objects, in a ``Rollout``.
* ``batches``: ``Example``, ``TrainingRow``, ``DistillBatch`` and their parts.
* ``collation``: training rows from examples and rollouts, and padded micro-batches from rows.
* ``counts``: counts of a step's rows, lengths of rollouts, and the logged metrics of both.
* ``generations``: responses of a batch as text.
* ``images``: references to a row's images, and a model's inputs for them.
* ``sampling``: temperature, top-k and top-p.
* ``noise``: counter-based random numbers, keyed by prompt, sample and position.
* ``sequences``: the sequences that one model reads: the positions that carry loss, and packed rows.
* ``shapes``: the tensor types of the signatures.

Pure records and functions: this package imports no models and no Lightning.
"""

from okd_lightning.records.batches import (
    SOURCES,
    DistillBatch,
    Example,
    LossOutput,
    SampledCounts,
    Source,
    TrainingRow,
)
from okd_lightning.records.requests import (
    STOP_REASONS,
    Chat,
    Generator,
    Prompt,
    PromptBatch,
    Request,
    Response,
    Rollout,
    ToolUse,
    stretches,
)

__all__ = [
    "SOURCES",
    "STOP_REASONS",
    "Chat",
    "DistillBatch",
    "Example",
    "Generator",
    "LossOutput",
    "Prompt",
    "PromptBatch",
    "Request",
    "Response",
    "Rollout",
    "SampledCounts",
    "Source",
    "ToolUse",
    "TrainingRow",
    "stretches",
]
