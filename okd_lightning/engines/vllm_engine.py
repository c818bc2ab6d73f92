"""The student's responses from vLLM in this process, on the student's own GPU.

The only module that imports vllm, and only when the engine first generates. vLLM gets the student's
weights as a folder, like the server. Between two calls it sleeps, so that training has the memory:
its weights and cache are dropped, and loaded again at the next call.

Used parts of vllm: ``LLM(model, ...)`` with the arguments below, ``LLM.generate`` of
``{"prompt_token_ids": ids}`` with one ``SamplingParams`` each, ``LLM.collective_rpc``
("reload_weights", kwargs weights_path), ``LLM.sleep``, ``LLM.wake_up`` and
``LLM.reset_prefix_cache``; of its answers ``outputs[0].token_ids``, ``.logprobs``,
``.finish_reason`` and ``prompt_logprobs``; of its platform ``is_sleep_mode_available`` and
``is_cpu``. tests/real_vllm runs all of these on a CPU, except ``sleep`` and ``wake_up``, which need
a GPU.
"""

from __future__ import annotations

import importlib
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import PreTrainedModel

from okd_lightning.engines.engine import EngineSource, RolloutEngine
from okd_lightning.engines.engine_probe import EngineGaps, Probe
from okd_lightning.engines.vllm_client import Completion
from okd_lightning.engines.vllm_requests import (
    HostedEngine,
    check_vllm_length,
    check_vllm_sampling,
)
from okd_lightning.engines.weights import write_weights
from okd_lightning.errors import ConfigError, ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import Progress
from okd_lightning.records.sampling import Sampling

_DROP_ALL = 2
"""vLLM's sleep level that drops weights and cache, without a copy in main memory."""


@dataclass
class VLLMEngine(EngineSource):
    """Generate the student's responses with vLLM on the GPU that trains it.

    Args:
        gpu_memory_utilization: Share of the GPU's memory for vLLM during generation.
        max_model_len: Longest prompt with response, in tokens; by default the model's own.
        dtype: Number format that vLLM computes in; "auto" is that of the student's weights.
        sleep: Drop vLLM's weights and cache while the student trains.
        enforce_eager: Leave CUDA graphs out: a faster start and slower generation.
        sync_folder: Folder for the transfer of the student's weights; by default a temporary one.
        tolerance: Allowed mean difference (nats) between vLLM's and the student's log-probs of a
            probe, from different number formats.
        engine_args: Further arguments of vllm.LLM.

    Raises:
        ConfigError: A number out of its range.
    """

    gpu_memory_utilization: float = 0.4
    max_model_len: int | None = None
    dtype: str = "auto"
    sleep: bool = True
    enforce_eager: bool = False
    sync_folder: str | None = None
    tolerance: float = 0.1
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization < 1:
            raise ConfigError(
                "model.engine.gpu_memory_utilization must be between 0 and 1, got "
                f"{self.gpu_memory_utilization}"
            )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise ConfigError(f"model.engine.tolerance must be above 0, got {self.tolerance}")
        self._llm: Any = None
        self.gaps = EngineGaps(self.tolerance)
        self._held = ""  # the weights that vLLM has now
        self._confirmed = ""

    @property
    def is_server(self) -> bool:
        """False: it shares the GPU with training."""
        return False

    @property
    def name(self) -> str:
        """Name of the engine, for messages."""
        return "model.engine: vLLM in this process"

    def engine(
        self, model: PreTrainedModel, vocabulary: Vocabulary, eos_ids: tuple[int, ...]
    ) -> RolloutEngine:
        """Return an engine that transfers ``model``'s weights to vLLM and generates with it.

        Raises:
            ConfigError: vllm is not installed, the run has several processes, or ``sleep`` is on
                and vLLM cannot sleep on this platform.
        """
        _vllm()
        if self.sleep and not _platform().is_sleep_mode_available():
            raise ConfigError(
                "model.engine.sleep: vLLM cannot drop its memory between rollouts on this platform "
                f"({_platform().device_type}); keep it awake with --model.engine.sleep false"
            )
        if distributed.is_initialized() and distributed.get_world_size() > 1:
            raise ConfigError(
                "model.engine VLLMEngine generates within one process, and this run has "
                f"{distributed.get_world_size()}: use VLLMServer, or --trainer.devices 1"
            )
        return HostedEngine(self, model, vocabulary, eos_ids)

    def check_sampling(self, sampling: Sampling) -> None:
        """See ``EngineSource``."""
        check_vllm_sampling(sampling)

    def check_length(self, num_tokens: int) -> None:
        """See ``EngineSource``."""
        check_vllm_length(num_tokens, self.max_model_len, self.name)

    @contextmanager
    def holding(self, model: PreTrainedModel, label: str, num_rows: int) -> Iterator[None]:
        """Within the context, vLLM is awake with ``model``'s weights; see ``Host``.

        Raises:
            ServerError: Its log-probabilities differ from the student's.
            OutputError: The folder cannot be written.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._held != label:
            self._load(model, label)
        try:
            if self._confirmed != label:
                self._compare(Probe.of(model, num_rows))
                self._confirmed = label
            yield
        finally:
            if self.sleep:
                self._held = ""
                self._llm.sleep(level=_DROP_ALL)

    def complete(
        self, requests: Sequence[Mapping[str, Any]], progress: Progress | None
    ) -> list[Completion]:
        """Generate one response per request; see ``Host``."""
        found = []
        for answer in self._ask(requests):
            response = answer.outputs[0]
            found.append(
                Completion(
                    ids=tuple(response.token_ids),
                    logprobs=tuple(
                        row[token].logprob
                        for row, token in zip(response.logprobs, response.token_ids, strict=True)
                    ),
                    finish_reason=response.finish_reason,
                )
            )
        if progress is not None:
            progress(len(found), sum(len(completion.ids) for completion in found))
        return found

    def _ask(self, requests: Sequence[Mapping[str, Any]]) -> list[Any]:
        params = []
        for request in requests:
            own = {key: value for key, value in request.items() if key != "prompt"}
            params.append(_vllm().SamplingParams(**own, detokenize=False))
        prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
        answers = list(self._llm.generate(prompts, params, use_tqdm=False))
        read = [list(answer.prompt_token_ids) for answer in answers]
        if read != [list(request["prompt"]) for request in requests]:
            raise ServerError(f"{self.name} has read other prompts than the requested ones")
        return answers

    def _load(self, model: PreTrainedModel, label: str) -> None:
        """Transfer the weights; the first time, start vLLM on them."""
        if self._llm is None:
            given = self.sync_folder or tempfile.mkdtemp(prefix="okd-lightning-vllm-")
            self._folder = Path(given).expanduser()
            if self.sync_folder is None:
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._start(self._written(model, "model"))
        else:
            handed = self._written(model, label)
            if self.sleep:
                self._llm.wake_up(tags=["weights"])
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(handed)})
            if self.sleep:
                self._llm.wake_up(tags=["kv_cache"])
            if self._llm.reset_prefix_cache() is False:
                raise ServerError(
                    f"{self.name} does not drop the prefix cache of the earlier weights"
                )
            shutil.rmtree(handed, ignore_errors=True)
        self._held = label

    def _written(self, model: PreTrainedModel, name: str) -> Path:
        """Write the weights to a folder, untied on CPUs; see ``write_weights``."""
        return write_weights(model, self._folder / name, is_untied=_platform().is_cpu())

    def _start(self, folder: Path) -> None:
        """Start vLLM.

        Raises:
            ConfigError: vLLM refuses its settings.
            ServerError: vLLM does not start.
        """
        arguments = {
            "model": str(folder),
            "skip_tokenizer_init": True,
            "dtype": self.dtype,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enable_sleep_mode": self.sleep,
            "enforce_eager": self.enforce_eager,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "tensor_parallel_size": 1,
        }
        if self.max_model_len is not None:
            arguments["max_model_len"] = self.max_model_len
        try:
            self._llm = _vllm().LLM(**{**arguments, **self.engine_args})
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.name} does not take its settings: {error}; change model.engine's, or what "
                "model.engine.engine_args adds to them"
            ) from error
        except RuntimeError as error:  # its processes have ended
            raise ServerError(
                f"{self.name} does not start: {error}; its log, above, says why (a lower "
                "--model.engine.gpu_memory_utilization helps where memory is short)"
            ) from error

    def _compare(self, probe: Probe) -> None:
        scored, drawn = self._ask(probe.requests)
        rows = scored.prompt_logprobs[1:]
        said = [row[token].logprob for row, token in zip(rows, probe.ids[1:], strict=True)]
        response = drawn.outputs[0]
        drawn_logprob = response.logprobs[0][response.token_ids[0]].logprob
        self.gaps.check_probe(probe, said, drawn_logprob, self.name, self._dtype(probe))

    def _dtype(self, probe: Probe) -> str | None:
        """Return vLLM's number format; None for "auto" with float32 weights (it takes float16)."""
        if self.dtype != "auto":
            return self.dtype
        return None if probe.dtype == torch.float32 else str(probe.dtype).removeprefix("torch.")


def _platform() -> Any:
    """Return vLLM's platform object."""
    return importlib.import_module("vllm.platforms").current_platform


def _vllm() -> Any:
    """Import and return the package vllm.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ConfigError(
            "model.engine VLLMEngine needs vllm, which is not installed here: "
            "pip install 'okd-lightning[vllm]', or use VLLMServer, which needs it on the server "
            "alone"
        ) from error
