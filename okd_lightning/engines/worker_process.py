"""Handle of the process that generates ahead of training (``worker``), in the run itself."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Protocol

import torch
from torch import nn

from okd_lightning.engines.ahead import AheadEngine, Answer, Generated
from okd_lightning.engines.shared_weights import SharedWeights, SlotLayout, anonymous_file
from okd_lightning.engines.transformers_engine import TransformersEngine
from okd_lightning.engines.worker import Done, Failed, Job, Loaded, Reported, WorkerSetup
from okd_lightning.errors import ConfigError, OKDLightningError, WorkerError, one_line
from okd_lightning.records.requests import Request

_CODE = "from okd_lightning.engines.worker import main; main()"
_END_SECONDS = 5.0


class WorkerHandle(Protocol):
    """A started process, as ``subprocess.Popen``."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, minus the number of a signal."""

    def kill(self) -> None:
        """End it."""


def launch(pipe: Connection, files: Sequence[int]) -> WorkerHandle:
    """Start a new interpreter that serves ``pipe``; a script's main module is not run again.

    Args:
        pipe: The worker's end.
        files: Descriptors that it inherits, under their numbers.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _CODE, str(pipe.fileno())],
        pass_fds=(pipe.fileno(), *files),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


class WorkerProcess(AheadEngine):
    """Generates with the built-in engine in a process of its own, which starts here.

    The process gets the model once, and with every request the weights that training changes,
    through memory that both share.

    Args:
        engine: The built-in engine on the student.
        num_slots: Most requests that wait for the process to begin with them.
        device: Device of the process.
        start: Starts the process.

    Raises:
        ConfigError: The model cannot be copied to another process.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        num_slots: int,
        device: torch.device,
        start: Callable[[Connection, Sequence[int]], WorkerHandle] | None = None,
    ) -> None:
        self._model = engine.model
        layout = SlotLayout.of(engine.model, num_slots)
        weights_file, model_file = anonymous_file("okd-weights"), _pickled(engine)
        self._weights = SharedWeights(weights_file, layout)
        self._slots: queue.Queue[int] = queue.Queue()
        for slot in range(num_slots):
            self._slots.put(slot)
        self._answers: dict[int, Answer] = {}
        self._num_begun = 0
        self._lost: OKDLightningError | None = None
        setup = WorkerSetup(
            model_file=model_file,
            weights_file=weights_file,
            layout=layout,
            vocabulary=engine.vocabulary,
            eos_ids=engine.eos_ids,
            token_budget=engine.token_budget,
            dtype=engine.dtype,
            device=str(device),
            num_threads=torch.get_num_threads(),
            matmul_precision=torch.get_float32_matmul_precision(),
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
            images=engine.images,
        )
        self._pipe, there = Pipe()
        self._process = (start or launch)(there, (weights_file, model_file))
        there.close()
        for file in (weights_file, model_file):
            os.close(file)
        self._stop = weakref.finalize(self, _end, self._pipe, self._process, os.getpid())
        with suppress(OSError):  # it has already ended: the reader finds out
            self._pipe.send(setup)
        own = weakref.WeakMethod(self._take), weakref.WeakMethod(self._lose)
        reading = self._pipe, self._process, *own
        threading.Thread(target=_read, args=reading, daemon=True).start()

    def begin(self, request: Request) -> Answer:
        """See ``AheadEngine``.

        Raises:
            WorkerError: The process has ended.
        """
        slot = self._free_slot()
        self._weights.write(self._model, slot)
        number, answer = self._num_begun, Answer()
        self._num_begun += 1
        self._answers[number] = answer
        with suppress(OSError):  # the reader says why
            self._pipe.send(Job(number, slot, replace(request, progress=None)))
        if self._lost is not None and not answer.is_done:
            answer.fail(self._lost)
        return answer

    def _free_slot(self) -> int:
        while True:
            if self._lost is not None:
                raise self._lost
            with suppress(queue.Empty):
                return self._slots.get(timeout=0.1)

    def _take(self, message: Loaded | Reported | Done | Failed) -> None:
        if isinstance(message, Loaded):
            self._slots.put(message.slot)
        elif isinstance(message, Reported):
            self._answers[message.number].report(message.rows, message.tokens)
        elif isinstance(message, Done):
            generated = Generated(message.rollout, message.seconds, message.cpu_seconds)
            self._answers.pop(message.number).finish(generated)
        elif message.number < 0:
            self._lose(message.error)
        else:
            self._answers.pop(message.number).fail(message.error)

    def _lose(self, error: OKDLightningError) -> None:
        """Fail all unanswered requests; the first reason is kept."""
        self._lost = self._lost or error
        for answer in [*self._answers.values()]:
            if not answer.is_done:
                answer.fail(self._lost)

    def close(self) -> None:
        """End the process."""
        self._stop()


def _pickled(engine: TransformersEngine) -> int:
    """Return a file without a path that holds the model."""
    file = anonymous_file("okd-model")
    try:
        with os.fdopen(os.dup(file), "wb") as stream, _without_output_hooks(engine.model):
            torch.save(engine.model, stream)
    except Exception as error:
        os.close(file)
        raise ConfigError(
            f"the student ({type(engine.model).__name__}) cannot be copied to the process that "
            f"generates ahead of training ({one_line(str(error), 200)}): leave "
            "--data.rollout_lag out"
        ) from error
    return file


@contextmanager
def _without_output_hooks(model: nn.Module) -> Iterator[None]:
    """Remove, within the block, the hooks with which transformers reads hidden states.

    A pass that asks for hidden states, such as LLaVA's over an image, leaves them on the modules,
    and they are local functions, which cannot be pickled.
    """
    hooks, flag = [], "_output_capturing_hooks_installed"
    flagged = [module for module in model.modules() if vars(module).pop(flag, False)]
    for module in model.modules():
        for number, hook in [*module._forward_hooks.items()]:
            if str(getattr(hook, "__module__", "")).startswith("transformers."):
                hooks.append((module, number, module._forward_hooks.pop(number)))
    try:
        yield
    finally:
        for module, number, hook in hooks:
            module._forward_hooks[number] = hook
        for module in flagged:
            setattr(module, flag, True)


def _read(
    pipe: Connection,
    process: WorkerHandle,
    take: weakref.WeakMethod[Callable[..., None]],
    lose: weakref.WeakMethod[Callable[..., None]],
) -> None:
    """Process the worker's messages until it ends; the engine may be dropped before."""
    try:
        while True:
            message = pipe.recv()
            if (found := take()) is None:
                return
            found(message)
            del found
    except (EOFError, OSError):
        if (found := lose()) is not None:
            found(WorkerError(_ended(process)))


def _ended(process: WorkerHandle) -> str:
    try:
        status = process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        how = "does not answer any more"
    else:
        how = f"ended with status {status}"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
            how += " (for lack of memory?)" if status == -signal.SIGKILL else ""
    return (
        f"the process that generates ahead of training (pid {process.pid}) {how}; resume with "
        "--ckpt_path last, or without it: --data.rollout_lag 0"
    )


def _end(pipe: Connection, process: WorkerHandle, owner: int) -> None:
    if os.getpid() != owner:  # a fork that inherited the object
        return
    # wakes both readers; closing would leave the one here waiting
    with suppress(OSError), socket.socket(fileno=os.dup(pipe.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
