"""Engines: they write responses to prompts.

* ``engine``: the protocol of an engine. ``sampling``: temperature, top-k, top-p, and the draw.
* ``noise``: counter-based random numbers, keyed by what is sampled and not by when.
* ``transformers_engine``: the built-in engine, on transformers' models: the queue and the batch.
* ``drawing``: one token a row, from one model or a mixture of two.
* ``kv_cache``: keys and values of rows that leave and join. ``memory``: what a model remembers
  while it generates, tried on the model. ``whole_passes``: models that keep no cache.
* ``responses``: what has been written of a call, on the model's device.
* ``vllm_server``: an engine over HTTP, on a vLLM server. ``vllm_engine``: on vLLM in this process,
  the one module that imports it. ``vllm_requests``: what both ask for and take as an answer.
* ``vllm_client``, ``server_answers``: a server's protocol, and its answers read part by part.
* ``served_student``, ``engine_probe``, ``weights``: whether an engine elsewhere has the student's
  weights, and how it gets them.
* ``tool_rollouts``: any engine, with tools between the turns.
"""

from okd_lightning.engines.drawing import Blend
from okd_lightning.engines.engine import EngineSource, RolloutEngine, Writer
from okd_lightning.engines.noise import NoiseStream, hashed_uniform
from okd_lightning.engines.sampling import Sampling
from okd_lightning.engines.transformers_engine import TransformersEngine
from okd_lightning.engines.vllm_engine import VLLMEngine
from okd_lightning.engines.vllm_server import VLLMServer

__all__ = [
    "Blend",
    "EngineSource",
    "NoiseStream",
    "RolloutEngine",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServer",
    "Writer",
    "hashed_uniform",
]
