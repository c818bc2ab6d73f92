"""Rollouts: who writes which row, how it is sampled, and the loader that hands it to Lightning.

* ``noise``: counter-based random numbers, keyed by what is sampled and not by when.
* ``sampling``: temperature, top-k, top-p, and the draw itself.
* ``engine``: the protocol of a rollout engine.
* ``transformers_engine``: the built-in engine, on transformers' models: the queue and the batch.
* ``vllm_server``: an engine over HTTP, on a vLLM server. ``vllm_engine``: on vLLM in this process,
  the one module that imports it. ``vllm_requests``: what both ask for and take as an answer.
* ``weights``: the student's weights for an engine elsewhere.
* ``memory``: what a model remembers while it generates, tried on the model.
* ``whole_passes``: generation with models that keep no cache.
* ``drawing``: one token a row, from one model or a mixture of two.
* ``kv_cache``: keys and values of rows that leave and join.
* ``responses``: what has been written of a call, on the model's device.
* ``tool_rollouts``: any engine, with tools between the turns.
* ``plan``: which rows of an optimizer step are the student's, the teacher's or the data set's.
* ``rows``: examples and rollouts become training rows, and rows become stamped micro-batches.
* ``scoring``: rewards of what was written. ``agreement``: ranks that write stop together.
* ``stored``: rollouts in checkpoints; ``resharing``: dealt out to another number of ranks.
* ``replay``: responses that are used again.
* ``loader_shape``: how an epoch is cut into optimizer steps and chunks.
* ``loader``: the sized, stateful iterable that regenerates on-policy batches every epoch.
"""

from okd_lightning.rollouts.drawing import Blend
from okd_lightning.rollouts.engine import EngineSource, RolloutEngine, Writer
from okd_lightning.rollouts.loader import RolloutLoader
from okd_lightning.rollouts.loader_shape import LoaderShape
from okd_lightning.rollouts.noise import NoiseStream, hashed_uniform
from okd_lightning.rollouts.plan import RolloutPlan, StagedPlan, plan_for, writer_of
from okd_lightning.rollouts.replay import KeptResponses, ReplayWriter
from okd_lightning.rollouts.sampling import Sampling
from okd_lightning.rollouts.transformers_engine import TransformersEngine
from okd_lightning.rollouts.vllm_engine import VLLMEngine
from okd_lightning.rollouts.vllm_server import VLLMServer

__all__ = [
    "Blend",
    "EngineSource",
    "KeptResponses",
    "LoaderShape",
    "NoiseStream",
    "ReplayWriter",
    "RolloutEngine",
    "RolloutLoader",
    "RolloutPlan",
    "Sampling",
    "StagedPlan",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServer",
    "Writer",
    "hashed_uniform",
    "plan_for",
    "writer_of",
]
