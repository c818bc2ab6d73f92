"""The student's responses from a vLLM server: an engine over HTTP, without vllm in this process.

Before generation, the engine makes the server sample from the student's weights: it writes them to
a folder that both can read, makes the server load them, drops the server's prefix cache, and sets
the label of the server's weights to their hash. The label is read again after generation. A probe
compares the server's log-probabilities with the student's, to detect a server with the right label
and other weights.

The student's processes take turns under a lock on the folder: the first one updates the server, the
others find it updated.
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

from okd_lightning.endpoint import Endpoint, in_parallel
from okd_lightning.engines.engine import EngineSource, RolloutEngine
from okd_lightning.engines.engine_probe import EngineGaps, Probe
from okd_lightning.engines.served_student import (
    check_served_student,
    is_untied,
    keeps_old_head,
    served_config,
)
from okd_lightning.engines.vllm_client import Completion, ServedModel, ServerInfo, VLLMClient
from okd_lightning.engines.vllm_requests import (
    HostedEngine,
    check_vllm_length,
    check_vllm_sampling,
)
from okd_lightning.engines.weights import shares_table, write_weights
from okd_lightning.errors import ConfigError, OutputError, ServerError, ServerTimeoutError
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import Progress
from okd_lightning.records.sampling import Sampling

_OPTION = "model.engine.url"
_TOKEN = "OKD_ENGINE_TOKEN"
_UPDATING = "okd-updating"
_OWN = "default"
"""vLLM's label of the weights that it was started with."""

_NUM_RESETS = 5


@dataclass
class VLLMServer(EngineSource):
    """Generate the student's responses on a vLLM server.

    The server runs the student's architecture with VLLM_SERVER_DEV_MODE=1 and
    ``--logprobs-mode processed_logprobs``; see docs/vllm.md for the whole command.

    Args:
        url: Address of the server, such as http://localhost:8000.
        sync_folder: Folder for the transfer of the student's weights, which this machine and the
            server's both have at this path.
        model: Name of the served model; by default the server's only model.
        timeout_seconds: Longest wait for one response, which includes the server's queue.
        update_seconds: Longest wait for the server to load the weights.
        concurrency: Requests in flight at once.
        num_retries: Retries of a request whose connection failed; 12 last 64 seconds, in which a
            server can restart.
        tolerance: Allowed mean difference (nats) between the server's and the student's log-probs
            of a probe, from different number formats.

    Raises:
        ConfigError: A number out of its range, or no address.
    """

    url: str
    sync_folder: str
    model: str | None = None
    timeout_seconds: float = 600.0
    update_seconds: float = 600.0
    concurrency: int = 64
    num_retries: int = 12
    tolerance: float = 0.1
    _confirmed: str = field(default="", init=False, repr=False)
    _info: ServerInfo | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("update_seconds", "concurrency", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"model.engine.{name} must be above 0, got {value}")
        endpoint = Endpoint(self.url, _OPTION, self.timeout_seconds, self.num_retries, _TOKEN)
        self._client = VLLMClient(endpoint, self.model)
        self.gaps = EngineGaps(self.tolerance)

    def engine(
        self, model: PreTrainedModel, vocabulary: Vocabulary, eos_ids: tuple[int, ...]
    ) -> RolloutEngine:
        """Return an engine that transfers ``model``'s weights to the server and generates there."""
        return HostedEngine(self, model, vocabulary, eos_ids)

    @property
    def is_server(self) -> bool:
        """True: it can generate while this process trains."""
        return True

    @property
    def name(self) -> str:
        """Name of the engine, for messages."""
        return f"{_OPTION}: {self.url}"

    def check_sampling(self, sampling: Sampling) -> None:
        """See ``EngineSource``."""
        check_vllm_sampling(sampling)

    def check_length(self, num_tokens: int) -> None:
        """See ``EngineSource``; reads the limit from the server."""
        check_vllm_length(num_tokens, self._client.served().max_model_len, self.name)

    @contextmanager
    def holding(self, model: PreTrainedModel, label: str, num_rows: int) -> Iterator[None]:
        """Within the context, the server samples from ``model``; see ``Host``.

        Raises:
            ServerError: The server cannot be updated, its log-probabilities differ from the
                student's, or it has other weights at the end.
            OutputError: The folder cannot be written.
        """
        self._bring(model, label, num_rows)
        yield
        version = self._client.version()
        if version != label:
            raise ServerError(
                f"{self.name} had the student's weights ({label}) when writing began and has "
                f"{version[:80]} now: it was restarted, or another run updates it; give each run a "
                "server of its own and continue from the last checkpoint"
            )

    def complete(
        self, requests: Sequence[Mapping[str, Any]], progress: Progress | None
    ) -> list[Completion]:
        """Generate one response per request; see ``Host``."""
        calls = [partial(self._client.complete, request) for request in requests]
        told = partial(progress, 1) if progress is not None else lambda: None
        return in_parallel(calls, self.concurrency, told)

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
                if self._client.version() != label:
                    self._update(model, label, folder)
                if self._confirmed != label:
                    self._compare(model, num_rows)
                    self._confirmed = label
        except Timeout as error:
            raise ServerTimeoutError(
                f"model.engine: another process has held {folder / 'update.lock'} for "
                f"{2 * self.update_seconds:g} seconds; check that process, or raise "
                "--model.engine.update_seconds"
            ) from error

    def _update(self, model: PreTrainedModel, label: str, folder: Path) -> None:
        served = self._client.read_served()  # again: the server may have been restarted
        self._info = self._client.info()
        config = served_config(served, self.name)
        check_served_student(model.config, served, config, self._info, self.name)
        if shares_table(model) and keeps_old_head(config, self._info):
            raise self._without_head(model, folder, served)
        self._name(_UPDATING)  # a failed update must not keep the old label
        handed = write_weights(model, folder / label, is_untied=is_untied(config))
        try:
            self._client.reload(str(handed), self.update_seconds)
        except ServerError as error:
            raise ServerError(
                f"{error}; the server could not take the student's weights from {handed}: it needs "
                "VLLM_SERVER_DEV_MODE=1, this folder at this path, and the student's own "
                f"architecture as its --model; {self._restore(served.root)}"
            ) from error
        self._drop_cache()
        self._name(label)
        shutil.rmtree(handed, ignore_errors=True)

    def _without_head(
        self, model: PreTrainedModel, folder: Path, served: ServedModel
    ) -> ServerError:
        """Write an untied copy for a server that would keep the old head; return the error."""
        copy = write_weights(model, folder / "untied", is_untied=True)
        return ServerError(
            f"{self.name} runs vLLM on a CPU, which keeps the old head of a model that shares one "
            "table between embedding and head (tie_word_embeddings) when it loads new weights; "
            f"start it on a copy whose head has a table of its own, which is now in {str(copy)!r}: "
            f"--model {copy} --tokenizer {served.root or 'STUDENT'}; or leave --model.engine out"
        )

    def _restore(self, root: str | None) -> str:
        """Make the server load its own weights again after a failed transfer; return the outcome.

        A failed transfer leaves weights without values, with which the next request crashes vLLM.
        """
        if root is None:
            return "the location of its own weights is unknown: restart it"
        try:
            self._client.reload(root, self.update_seconds)
            self._drop_cache()
            self._name(_OWN)
        except ServerError:
            return f"its own weights, {root!r}, could not be loaded again either: restart it"
        return f"its own weights, {root!r}, are loaded again"

    def _drop_cache(self) -> None:
        for attempt in range(_NUM_RESETS):
            if self._client.drop_cache():
                return
            time.sleep(0.1 * 2**attempt)
        raise ServerError(
            f"{self.name} does not drop its cache of prefixes, which belongs to the earlier "
            "weights: "
            "requests of others are running; give each run its own server"
        )

    def _name(self, label: str) -> None:
        self._client.name_version(label)
        version = self._client.version()
        if version != label:
            raise ServerError(
                f"{self.name}: its weights were labelled {label} and it reports {version[:80]!r}; "
                "several servers at one address cannot be updated together: give the address of "
                "one of them"
            )

    def _compare(self, model: PreTrainedModel, num_rows: int) -> None:
        probe = Probe.of(model, num_rows)
        scored, drawn = (self._client.complete(request) for request in probe.requests)
        pairs = zip(scored.prompt_logprobs, probe.ids[1:], strict=True)
        said = [row[token] for row, token in pairs]
        if self._info is None:
            self._info = self._client.info()
        if len(drawn.logprobs) != 1:
            raise ServerError(f"{self.name} gives {len(drawn.ids)} tokens where 1 was requested")
        self.gaps.check_probe(probe, said, drawn.logprobs[0], self.name, self._info.dtype)
