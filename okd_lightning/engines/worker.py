"""The process that generates ahead of training: the built-in engine on a copy of the student.

``worker_process`` starts it. It loads the model once, then answers requests in their order, each
with the weights of its slot. It ends when its pipe is closed, which the end of the run does too.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from okd_lightning.engines.shared_weights import SharedWeights, SlotLayout
from okd_lightning.engines.transformers_engine import TransformersEngine
from okd_lightning.errors import OKDLightningError, WorkerError, one_line
from okd_lightning.models import Vocabulary
from okd_lightning.models.processors import ImageReader
from okd_lightning.records.requests import Request, Rollout

_REPORT_SECONDS = 0.1


@dataclass(frozen=True)
class WorkerSetup:
    """Settings of a worker and the files that it shares with the run.

    Attributes:
        model_file: Descriptor of the file with the pickled model.
        weights_file: Descriptor of the shared weights.
        layout: Slots of the shared weights.
        vocabulary: Ids that can be sampled.
        eos_ids: Ids that end a response.
        token_budget: See ``TransformersEngine``.
        dtype: Number format of autocast; None for the weights' own.
        device: Device to generate on.
        num_threads: Threads of an operation on the CPU.
        matmul_precision: Of float32, see ``torch.set_float32_matmul_precision``.
        is_deterministic: Whether only deterministic algorithms are used.
        images: Processor of the model; None for a text model.
    """

    model_file: int
    weights_file: int
    layout: SlotLayout
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]
    token_budget: int
    dtype: torch.dtype | None
    device: str
    num_threads: int
    matmul_precision: str
    is_deterministic: bool
    images: ImageReader | None = None


@dataclass(frozen=True)
class Job:
    """A request, by its number, with the slot of its weights."""

    number: int
    slot: int
    request: Request


@dataclass(frozen=True)
class Loaded:
    """The weights of a slot are copied; it may be written again."""

    slot: int


@dataclass(frozen=True)
class Reported:
    """Progress of a job: finished responses and new tokens since the last report."""

    number: int
    rows: int
    tokens: int


@dataclass(frozen=True)
class Done:
    """The responses of a job, and its seconds by the clock and on the CPU."""

    number: int
    rollout: Rollout
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Failed:
    """A job, or the start of the worker (number -1), has failed."""

    number: int
    error: OKDLightningError


class _Reports:
    """Sends a job's progress, at most ten times per second."""

    def __init__(self, send: Callable[[Any], None], number: int) -> None:
        self._send, self._number = send, number
        self._rows = self._tokens = 0
        self._next = 0.0

    def __call__(self, rows: int, tokens: int = 0) -> None:
        self._rows += rows
        self._tokens += tokens
        now = time.monotonic()
        if now >= self._next:
            self._send(Reported(self._number, self._rows, self._tokens))
            self._rows = self._tokens = 0
            self._next = now + _REPORT_SECONDS


def serve(pipe: Connection) -> None:
    """Answer requests until the pipe is closed; ends the process.

    Args:
        pipe: First a ``WorkerSetup``, then jobs.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the run decides
        signal.signal(number, signal.SIG_IGN)
    jobs: queue.Queue[Job] = queue.Queue()
    try:
        setup = pipe.recv()
        threading.Thread(target=_read, args=(pipe, jobs), daemon=True).start()
        engine, weights = _start(setup)
    except Exception as error:  # noqa: BLE001  a pickled model may raise any error
        _send_failure(pipe, -1, error)
        os._exit(1)
    while True:
        job = jobs.get()
        try:
            _answer(pipe, engine, weights, job)
        except Exception as error:  # noqa: BLE001  raised again by the run
            _send_failure(pipe, job.number, error)


def _read(pipe: Connection, jobs: queue.Queue[Job]) -> None:
    """Queue jobs; end the process, also within a job, when the run has closed the pipe."""
    try:
        while True:
            jobs.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(0)


def _start(setup: WorkerSetup) -> tuple[TransformersEngine, SharedWeights]:
    torch.set_num_threads(setup.num_threads)
    torch.set_float32_matmul_precision(setup.matmul_precision)
    if setup.is_deterministic:
        torch.use_deterministic_algorithms(True)
    device = torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the file is the run's own; mapped, frozen weights are in memory once for both processes
    model = torch.load(
        f"/dev/fd/{setup.model_file}", map_location=device, weights_only=False, mmap=True
    ).eval()
    os.close(setup.model_file)
    if setup.images is not None:
        # transformers notes which outputs a class can give when one is built; LLaVA asks for them
        with torch.device("meta"):
            type(model)(model.config)
    engine = TransformersEngine(
        model,
        setup.vocabulary,
        setup.eos_ids,
        setup.token_budget,
        setup.dtype,
        images=setup.images,
    )
    return engine, SharedWeights(setup.weights_file, setup.layout)


def _answer(pipe: Connection, engine: TransformersEngine, weights: SharedWeights, job: Job) -> None:
    start = time.perf_counter(), time.process_time()
    weights.read(engine.model, job.slot)
    pipe.send(Loaded(job.slot))
    rollout = engine.respond(replace(job.request, progress=_Reports(pipe.send, job.number)))
    took = time.perf_counter() - start[0], time.process_time() - start[1]
    pipe.send(Done(job.number, rollout, *took))


def _send_failure(pipe: Connection, number: int, error: Exception) -> None:
    if not isinstance(error, OKDLightningError):
        said = one_line(str(error), 500)
        error = WorkerError(f"the process that generates ahead of training failed: {said}")
    pipe.send(Failed(number, error))


def main() -> None:
    """Serve the pipe whose descriptor is the first argument."""
    serve(Connection(int(sys.argv[1])))
