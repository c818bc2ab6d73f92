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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from okd_lightning.endpoint import Endpoint, ServerStatusError, in_parallel
from okd_lightning.errors import ConfigError, OutputError, ServerError, ServerTimeoutError
from okd_lightning.models import Vocabulary
from okd_lightning.rollouts.engine import EngineSource, Progress, RolloutEngine
from okd_lightning.rollouts.vllm_requests import HostedEngine, Probe, Written
from okd_lightning.rollouts.weights import write_weights

_OPTION = "model.engine.url"
_UPDATING = "okd-updating"
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
        return HostedEngine(self, model, vocabulary, eos_ids)

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        return f"{_OPTION}: {self.url}"

    @contextmanager
    def holding(self, model: PreTrainedModel, label: str, num_rows: int) -> Iterator[None]:
        """Within it the server samples from ``model``; see ``Host``.

        Raises:
            ServerError: The server cannot be updated, does not say what the student says, or has
                other weights at the end.
            OutputError: The folder cannot be written.
        """
        self._bring(model, label, num_rows)
        yield
        version = self._version()
        if version != label:
            raise ServerError(
                f"{self.name} had the student's weights ({label}) when writing began and has "
                f"{version} now: it was restarted, or another run updates it; give each run a "
                "server of its own and continue from the last checkpoint"
            )

    def write(
        self, requests: Sequence[Mapping[str, Any]], progress: Progress | None
    ) -> list[Written]:
        """One response a request; see ``Host``."""
        calls = [partial(self._write, request) for request in requests]
        told = partial(progress, 1) if progress is not None else lambda: None
        return in_parallel(calls, self.concurrency, told)

    def _write(self, request: Mapping[str, Any]) -> Written:
        choice = self._complete(request)
        return Written(
            ids=tuple(choice["token_ids"]),
            logprobs=tuple(choice["logprobs"]["token_logprobs"]),
            finish_reason=choice["finish_reason"],
        )

    def _bring(self, model: PreTrainedModel, label: str, num_rows: int) -> None:
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
                if self._version() != label:
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
                f"{self.name} does not drop its cache of prefixes, which belong to the "
                "weights before: requests of others are running; give each run its own server"
            )
        self._name(label)
        shutil.rmtree(handed, ignore_errors=True)

    def _name(self, label: str) -> None:
        self._endpoint.post("/update_weight_version", {"new_version": label})
        version = self._version()
        if version != label:
            raise ServerError(
                f"{self.name} was told that its weights are {label} and says {version}; "
                "several servers behind one address cannot be kept in step: name one of them"
            )

    def _compare(self, model: PreTrainedModel, num_rows: int) -> None:
        probe = Probe.of(model, num_rows, self.tolerance)
        scored, drawn = (self._complete(request) for request in probe.requests)
        rows = scored["prompt_logprobs"][1:]
        said = [row[str(token)]["logprob"] for row, token in zip(rows, probe.ids[1:], strict=True)]
        probe.check(said, drawn["logprobs"]["token_logprobs"][0], self.name)

    def _served_model(self) -> str:
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

    def _version(self) -> str:
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
                "it samples from; start it with VLLM_SERVER_DEV_MODE=1, from vLLM 0.27 or newer"
            ) from error
        return str(answer["weight_version"])

    def _complete(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The one choice that answers one /v1/completions request."""
        body = {"model": self._served_model(), "return_token_ids": True, **request}
        answer = self._endpoint.post("/v1/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not choices or len(choices) != 1:
            raise ServerError(f"{self.name} answers without a response: {answer}")
        choice: dict[str, Any] = choices[0]
        if choice.get("prompt_token_ids") != request["prompt"] or choice.get("token_ids") is None:
            raise ServerError(
                f"{self.name} does not answer with the ids that it read and wrote "
                "(return_token_ids); it needs vLLM 0.27 or newer"
            )
        return choice
