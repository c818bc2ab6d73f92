"""The student's responses from a vLLM server: an engine over HTTP that needs no vllm here.

Before it asks for responses, the engine makes the server sample from the student's weights: it
writes them to a folder that both see, has the server load them, drops the server's cache of
prefixes, and names the server's weights after what they are. The name is read again after writing.
A probe compares what the server says with what the student says, so that a server that reports the
right name over other weights is found out.

The student's processes take turns under a lock on the folder: the first brings the weights, the
others find them there.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from okd_lightning.endpoint import Endpoint, ServerStatusError, in_parallel
from okd_lightning.errors import ConfigError, OutputError, ServerError, ServerTimeoutError
from okd_lightning.models import Vocabulary
from okd_lightning.records import PromptBatch, Rollout
from okd_lightning.rollouts.engine import EngineSource, Progress, RolloutEngine
from okd_lightning.rollouts.noise import NoiseStream, hashed_uniform
from okd_lightning.rollouts.sampling import Sampling
from okd_lightning.rollouts.vllm_requests import (
    NOTHING,
    Written,
    check_written,
    rollout_of,
    sampling_fields,
)
from okd_lightning.rollouts.weights import weights_label, write_weights

_OPTION = "model.engine.url"
_UPDATING = "okd-updating"
_PROBE_LENGTH = 12
_PROBE = 0x50524F42  # domain separation
_CERTAIN = 1e-3
_NUM_RESETS = 5


@dataclass
class VLLMServer(EngineSource):
    """Have a vLLM server write the student's responses.

    The server runs the student's architecture with VLLM_SERVER_DEV_MODE=1 and
    ``--logprobs-mode processed_logprobs``; see docs/vllm.md for the whole command.

    Args:
        url: Of the server, such as http://localhost:8000.
        sync_folder: Where the student's weights are handed over: a folder that this machine and the
            server's both have under this path.
        model: Name under which the server serves it; by default the only one that it has.
        timeout_seconds: Longest wait for one response, which includes the server's queue.
        update_seconds: Longest wait for the server to load the weights.
        concurrency: Requests under way at once.
        num_retries: Repeats of a request whose connection failed.
        tolerance: Mean difference (nats) between the server's and the student's log-probs of the
            probe that number formats may make.

    Raises:
        ConfigError: A number out of its range, or no address.
    """

    url: str
    sync_folder: str
    model: str | None = None
    timeout_seconds: float = 600.0
    update_seconds: float = 600.0
    concurrency: int = 64
    num_retries: int = 5
    tolerance: float = 0.1
    _confirmed: str = field(default="", init=False, repr=False)
    _served: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("update_seconds", "concurrency", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"model.engine.{name} must be above 0, got {value}")
        self._endpoint = Endpoint(self.url, _OPTION, self.timeout_seconds, self.num_retries)

    def engine(
        self, model: PreTrainedModel, vocabulary: Vocabulary, eos_ids: tuple[int, ...]
    ) -> RolloutEngine:
        """An engine that brings ``model``'s weights to the server and has it write."""
        return _ServerEngine(self, model, vocabulary, eos_ids)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The one choice that answers one /v1/completions request.

        Raises:
            ServerError: See ``Endpoint.post``; or an answer of another form.
        """
        prompt = body["prompt"]
        full = {"model": self.served_model(), "return_token_ids": True, **body}
        answer = self._endpoint.post("/v1/completions", full)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not choices or len(choices) != 1:
            raise ServerError(f"{_OPTION}: {self.url} answers without a response: {answer}")
        choice: dict[str, Any] = choices[0]
        if choice.get("prompt_token_ids") != list(prompt) or choice.get("token_ids") is None:
            raise ServerError(
                f"{_OPTION}: {self.url} does not answer with the ids that it read and wrote "
                "(return_token_ids); it needs vLLM 0.10.2 or newer"
            )
        return choice

    def served_model(self) -> str:
        """The name that requests carry.

        Raises:
            ServerError: The server has no such model, or several to choose from.
        """
        if not self._served:
            answer = self._endpoint.get("/v1/models")
            names = [str(entry["id"]) for entry in (answer or {}).get("data", [])]
            is_there = len(names) == 1 if self.model is None else self.model in names
            if not is_there:
                raise ServerError(
                    f"{_OPTION}: {self.url} serves {', '.join(names) or 'nothing'}"
                    + (f", not {self.model!r}" if self.model else "")
                    + "; name one with --model.engine.model"
                )
            self._served = self.model or names[0]
        return self._served

    def weight_version(self) -> str:
        """What the server's weights are called.

        Raises:
            ServerError: It does not say.
        """
        try:
            answer = self._endpoint.get("/weight_info")
        except ServerStatusError as error:
            if error.status not in (404, 405):
                raise
            raise ServerError(
                f"{_OPTION}: {self.url} has no /weight_info, so that nobody can tell which weights "
                "it samples from; start it with VLLM_SERVER_DEV_MODE=1, from a vLLM that has this "
                "endpoint (see docs/vllm.md)"
            ) from error
        return str(answer["weight_version"])

    def bring(self, model: PreTrainedModel, label: str, num_rows: int) -> None:
        """Make the server sample from ``model``, which is called ``label``.

        Raises:
            ServerError: The server cannot be updated, or does not say what the student says.
            OutputError: The folder cannot be written.
        """
        folder = Path(self.sync_folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"model.engine.sync_folder: {str(folder)!r} cannot be written ({error.strerror}); "
                "choose another folder"
            ) from error
        try:
            with FileLock(folder / "update.lock", timeout=2 * self.update_seconds):
                if self.weight_version() != label:
                    self._update(model, label, folder)
                if self._confirmed != label:
                    self._compare(model, num_rows)
                    self._confirmed = label
        except Timeout as error:
            raise ServerTimeoutError(
                f"model.engine: another process has held {folder / 'update.lock'} for "
                f"{2 * self.update_seconds:g} seconds; see what it does, or raise "
                "--model.engine.update_seconds"
            ) from error

    def check_still(self, label: str) -> None:
        """Refuse what was written while the server's weights were exchanged.

        Raises:
            ServerError: They are not those of ``label`` any more.
        """
        version = self.weight_version()
        if version != label:
            raise ServerError(
                f"{_OPTION}: {self.url} had the student's weights ({label}) when writing began and "
                f"has {version} now: it was restarted, or another run updates it; give each run a "
                "server of its own and continue from the last checkpoint"
            )

    def _update(self, model: PreTrainedModel, label: str, folder: Path) -> None:
        self._name(_UPDATING)  # what fails halfway is not taken for what was there before
        handed = write_weights(model, folder / label)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(handed)}}
        try:
            self._endpoint.post("/collective_rpc", body, self.update_seconds)
        except ServerStatusError as error:
            raise ServerError(
                f"{error}; the server could not take the student's weights from {handed}: it needs "
                "VLLM_SERVER_DEV_MODE=1, this folder under this path, and the student's own "
                "architecture as its --model"
            ) from error
        for attempt in range(_NUM_RESETS):
            answer = self._endpoint.post("/reset_prefix_cache", {})
            if answer is None or answer.get("success", True):
                break
            time.sleep(0.1 * 2**attempt)
        else:
            raise ServerError(
                f"{_OPTION}: {self.url} does not drop its cache of prefixes, which belong to the "
                "weights before: requests of others are running; give each run its own server"
            )
        self._name(label)
        shutil.rmtree(handed, ignore_errors=True)

    def _name(self, label: str) -> None:
        self._endpoint.post("/update_weight_version", {"new_version": label})
        version = self.weight_version()
        if version != label:
            raise ServerError(
                f"{_OPTION}: {self.url} was told that its weights are {label} and says {version}; "
                "several servers behind one address cannot be kept in step: name one of them"
            )

    @torch.no_grad()
    def _compare(self, model: PreTrainedModel, num_rows: int) -> None:
        """Hold what the server says about a probe against the student, and how it reports."""
        drawn = hashed_uniform(_PROBE, num_rows, torch.arange(_PROBE_LENGTH).numpy())
        probe = [int(value) for value in drawn * num_rows]
        logits = model(torch.tensor([probe], device=model.device)).logits[0, :, :num_rows]
        logprobs = logits.float().log_softmax(-1).cpu()
        least_certain = int(logprobs[:-1].amax(-1).argmin())
        fields = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1, "ignore_eos": True}
        said = self.complete({"prompt": probe, **fields})["prompt_logprobs"]
        differences = [
            abs(said[place][str(token)]["logprob"] - float(logprobs[place - 1, token]))
            for place, token in enumerate(probe)
            if place
        ]
        mean = sum(differences) / len(differences)
        if not mean <= self.tolerance:
            raise ServerError(
                f"{_OPTION}: {self.url} was given the student's weights and yet differs from the "
                f"student by {mean:.3g} nats a token on a probe (tolerance {self.tolerance:g}): it "
                "runs another architecture, a quantised one, or has not loaded them; check its "
                "--model and --dtype, or raise --model.engine.tolerance"
            )
        cut = {"prompt": probe[: least_certain + 1], "max_tokens": 1, "temperature": 1.0}
        choice = self.complete({**cut, "top_k": 1, "logprobs": 0, "ignore_eos": True})
        reported = choice["logprobs"]["token_logprobs"][0]
        if not abs(reported) <= _CERTAIN:
            raise ServerError(
                f"{_OPTION}: {self.url} reports {reported:.3g} as the log-probability of a token "
                "that was drawn with top_k 1, which is certain: it reports those before "
                "temperature and cuts; start it with --logprobs-mode processed_logprobs"
            )


@dataclass
class _ServerEngine:
    """One student on the server; see ``VLLMServer``."""

    server: VLLMServer
    model: PreTrainedModel
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """One response a prompt, in the order of the prompts; see ``RolloutEngine``.

        Raises:
            ServerTimeoutError: The server has not answered in time.
            ServerError: It cannot be reached or updated, or answers with something else.
        """
        limits = [
            min(n, max_new_tokens) for n in prompts.limits or (max_new_tokens,) * len(prompts)
        ]
        if not any(limit > 0 for limit in limits):
            return rollout_of([NOTHING] * len(prompts), sampling, self.eos_ids)
        num_rows = self.model.config.get_text_config().vocab_size
        label = weights_label(self.model)
        self.server.bring(self.model, label, num_rows)
        fields = sampling_fields(sampling, self.vocabulary, num_rows, self.eos_ids)
        seeds = generator.seeds(prompts.index, prompts.sample)
        calls = [
            partial(
                self._write, prompts.input_ids[row], limits[row], {**fields, "seed": seeds[row]}
            )
            for row in range(len(prompts))
        ]
        told = (lambda: progress(1)) if progress is not None else lambda: None
        written = in_parallel(calls, self.server.concurrency, told)
        self.server.check_still(label)
        return rollout_of(written, sampling, self.eos_ids)

    def _write(self, prompt: Sequence[int], limit: int, fields: dict[str, Any]) -> Written:
        if limit <= 0:
            return NOTHING
        choice = self.server.complete({"prompt": list(prompt), "max_tokens": limit, **fields})
        written = Written(
            ids=tuple(choice["token_ids"]),
            logprobs=tuple(choice["logprobs"]["token_logprobs"]),
            finish_reason=choice["finish_reason"],
        )
        check_written(
            written, limit, self.vocabulary, self.eos_ids, f"{_OPTION}: {self.server.url}"
        )
        return written
