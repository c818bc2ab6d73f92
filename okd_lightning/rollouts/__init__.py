"""Rollouts: which rows an optimizer step holds, and the loader that hands them to Lightning.

* ``plan``: which rows of a step are the student's, the teacher's or the data set's.
* ``scoring``: rewards of what was written. ``agreement``: ranks that write stop together.
* ``stored``: rollouts in checkpoints; ``resharing``: dealt out to another number of ranks.
* ``replay``: responses that are used again. ``evaluation``: responses to held-out prompts.
* ``lengths``: the running mean of responses' lengths, which divides sums over samples.
* ``loader_shape``: how an epoch is cut into optimizer steps and rollout batches.
* ``loader``: the sized, stateful iterable that regenerates on-policy batches every epoch.

What an engine is and how it samples is in ``engines``.
"""

from okd_lightning.rollouts.loader import RolloutLoader
from okd_lightning.rollouts.loader_shape import LoaderShape
from okd_lightning.rollouts.plan import RolloutPlan, StagedPlan, plan_for, writer_of
from okd_lightning.rollouts.replay import KeptResponses, ReplayWriter

__all__ = [
    "KeptResponses",
    "LoaderShape",
    "ReplayWriter",
    "RolloutLoader",
    "RolloutPlan",
    "StagedPlan",
    "plan_for",
    "writer_of",
]
