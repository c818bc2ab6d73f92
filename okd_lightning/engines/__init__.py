"""Engines: they generate responses to prompts.

* ``engine``: the protocol of an engine; requests, sampling and noise are in ``records``.
* ``transformers_engine``: the built-in engine, on transformers' models: the queue and the batch.
* ``drawing``: sampling of a token for each row, from one model or a mixture, into the responses.
* ``kv_cache``: keys and values of rows that join and leave the batch. ``memory``: the kind of cache
  that a model supports, measured on the model. ``whole_passes``: models without a cache.
* ``vllm_server``: an engine over HTTP, on a vLLM server. ``vllm_engine``: on vLLM in this process,
  the only module that imports it. ``vllm_requests``: requests and checks common to both.
* ``vllm_client``, ``server_answers``: a server's protocol, and the parsing of its answers.
* ``served_student``, ``engine_probe``, ``weights``: transfer of the student's weights to an
  external engine, and checks of it.
* ``ahead``, ``worker_process``, ``worker``, ``shared_weights``: generation while the student
  trains, in a thread or in a process of its own.
* ``tool_rollouts``: any engine, with tools between the turns.
"""

from okd_lightning.engines.drawing import Blend, MixedDraws
from okd_lightning.engines.engine import EngineSource, RolloutEngine
from okd_lightning.engines.transformers_engine import TransformersEngine
from okd_lightning.engines.vllm_engine import VLLMEngine
from okd_lightning.engines.vllm_server import VLLMServer
from okd_lightning.records.noise import NoiseStream, hashed_uniform
from okd_lightning.records.sampling import Sampling

__all__ = [
    "Blend",
    "EngineSource",
    "MixedDraws",
    "NoiseStream",
    "RolloutEngine",
    "Sampling",
    "TransformersEngine",
    "VLLMEngine",
    "VLLMServer",
    "hashed_uniform",
]
