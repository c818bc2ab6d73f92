"""Rollouts: the rows of an optimizer step, and the loader that passes them to Lightning.

* ``plan``: the rows of a rollout batch before its responses exist: prompts and sources.
  ``plan_of_terms``: the plan that the methods of a run need.
* ``scoring``: rewards of responses. ``generation``: requests to the engine, after which
  all ranks stop together.
* ``stored``: rollouts in checkpoints; ``resharing``: their redistribution to other ranks.
* ``replay``: reuse of earlier responses. ``evaluation``: responses to held-out prompts.
* ``ahead``: rollout batches that are generated while earlier ones are trained on.
* ``loader_shape``: division of an epoch into optimizer steps and rollout batches.
* ``loader``: the sized, stateful iterable that generates on-policy batches in every epoch.

Engines and sampling are in ``engines``; the names with which a script generates are exported here
too.
"""

from okd_lightning.engines import NoiseStream, Sampling, TransformersEngine
from okd_lightning.rollouts.loader import RolloutLoader
from okd_lightning.rollouts.loader_shape import LoaderShape
from okd_lightning.rollouts.plan import RolloutPlan, StagedPlan
from okd_lightning.rollouts.plan_of_terms import engine_of, plan_for
from okd_lightning.rollouts.replay import KeptResponses, ReplayEngine

__all__ = [
    "KeptResponses",
    "LoaderShape",
    "NoiseStream",
    "ReplayEngine",
    "RolloutLoader",
    "RolloutPlan",
    "Sampling",
    "StagedPlan",
    "TransformersEngine",
    "engine_of",
    "plan_for",
]
