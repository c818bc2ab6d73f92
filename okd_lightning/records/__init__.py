"""Records of a run, from examples to batches, and the packing of rows.

* ``batches``: ``Example``, ``Rollout``, ``TrainingRow``, ``DistillBatch`` and their parts.
* ``rows``: training rows from examples and rollouts, micro-batches from rows.
* ``collation``: rows of different lengths in one padded batch.
* ``sampling``: temperature, top-k, top-p, and the draw of a token.
* ``noise``: counter-based random numbers, keyed by prompt, sample and position.
* ``packing``, ``sequences``: concatenated rows, and the positions that carry loss.
* ``shapes``: the tensor types of the signatures.

Pure: nothing here knows models or Lightning.
"""

from okd_lightning.records.batches import (
    SOURCES,
    STOP_REASONS,
    Chat,
    DistillBatch,
    Example,
    LossOutput,
    PromptBatch,
    Rollout,
    SampledCounts,
    Source,
    ToolUse,
    TrainingRow,
    stretches,
)

__all__ = [
    "SOURCES",
    "STOP_REASONS",
    "Chat",
    "DistillBatch",
    "Example",
    "LossOutput",
    "PromptBatch",
    "Rollout",
    "SampledCounts",
    "Source",
    "ToolUse",
    "TrainingRow",
    "stretches",
]
