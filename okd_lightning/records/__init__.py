"""Records: what flows through a run, from examples to batches, and how rows are packed.

* ``batches``: ``Example``, ``Rollout``, ``TrainingRow``, ``DistillBatch`` and their parts.
* ``rows``: examples and rollouts become training rows, rows become stamped micro-batches.
* ``collation``: rows of different lengths in one padded batch.
* ``packing``, ``sequences``: rows laid end to end, and where loss lies in them.
* ``shapes``: the array types that signatures name.

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
