"""Recorded runs on one process and on two gloo processes, for comparisons."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import tiny
import torch
import torch.multiprocessing as mp
from cheap_process import make_cheap
from forked import SERVER
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from okd_lightning.data import RolloutDataModule
from okd_lightning.sharding import whole
from okd_lightning.training.module import DistillationModule

_SECONDS = 900


class Killed(Exception):
    """Exception that ends a run in the middle."""


class Snapshot(Callback):
    """Callback that copies the run's folder before a step, as ranks killed there would leave it."""

    def __init__(self, step: int, copy: Path) -> None:
        self.step, self.copy = step, copy

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step and not batch_idx % trainer.accumulate_grad_batches:
            if trainer.is_global_zero:
                shutil.copytree(trainer.default_root_dir, self.copy)
            trainer.strategy.barrier()


class Killer(Callback):
    def __init__(self, step: int = 3) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


class Record(tiny.Recorder):
    """Losses and whole gradients of every step, and how far ranks' gradients are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.difference = 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {}
        for name, parameter in pl_module.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            found[name] = whole(gradient).clone()
            if torch.distributed.is_initialized() and not isinstance(gradient, DTensor):
                other = gradient.clone()
                torch.distributed.broadcast(other, 0)
                self.difference = max(self.difference, float((other - gradient).abs().max()))
        self.gradients.append(found)


def run(
    root: Path,
    strategy: Any,
    methods: Callable[[], list[Callback]],
    *,
    num: int = 25,
    accumulate: int = 1,
    adapter: LoraConfig | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    callbacks: list[Callback] = (),
    ckpt_path: str | None = None,
    optimizer: Callable | None = None,
    rows: list[dict[str, Any]] | None = None,
    val: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """4 rows per micro-batch over all ranks; what happened, with whole tensors.

    ``strategy`` None is one process.
    """
    torch.manual_seed(3)
    devices = 1 if strategy is None else 2
    own = {"student": str(root / "student"), "teacher": str(root / "teacher"), "dtype": "float64"}
    own.update(model or {})
    module = DistillationModule(
        **own,
        optimizer=optimizer or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
        student_adapter=adapter,
    )
    record = Record()
    trainer = tiny.make_trainer(
        root / f"run{devices}",
        [*methods(), record, *callbacks],
        devices=devices,
        strategy=strategy or "auto",
        accumulate_grad_batches=accumulate,
        num_sanity_val_steps=0,
        **{"max_steps": 10, "max_epochs": 9, "gradient_clip_val": 1.0, **(settings or {})},
    )
    options = {"batch_size": 4 // devices, "max_response_length": 6, "seed": 7, "val_rollouts": 3}
    loaders = RolloutDataModule(
        rows or tiny.make_rows(num),
        val or tiny.make_rows(5, seed=2),
        **{**options, **(data or {})},
    )
    with contextlib.suppress(Killed):
        trainer.fit(module, loaders, ckpt_path=ckpt_path)
    return _recorded(trainer, module, record)


def _recorded(
    trainer: lightning.Trainer, module: DistillationModule, record: Record
) -> dict[str, Any]:
    """Collect a run's weights and gradients, assembled, with its losses, measures and rows."""
    measures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    return {
        "weights": {
            name: whole(parameter.detach()).clone()
            for name, parameter in module.named_parameters(remove_duplicate=False)
        },
        "losses": record.losses,
        "gradients": record.gradients,
        "difference": record.difference,
        "measures": measures,
        "steps": trainer.global_step,
        "ids": [record.rows(step) for step in range(len(record.steps))],
    }


def spawn(function: Callable[[int, Path], None], root: Path) -> None:
    """Call ``function(rank, root)`` in two processes that Lightning takes for its own.

    Where several process groups come and go in one process, it crashed now and then (torch 2.13;
    gloo's own thread, SIGSEGV or SIGABRT): all is then done again, three times at most.
    """
    for _ in range(3):
        try:
            return _spawn(function, root)
        except mp.ProcessExitedException as error:
            if error.signal_name not in ("SIGSEGV", "SIGABRT"):
                raise
            warnings.warn(f"{error}; both ranks begin again", stacklevel=2)
    return _spawn(function, root)


def _spawn(function: Callable[[int, Path], None], root: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = function, root, port, dict(os.environ)
    mp.start_processes(_of_one_rank, given, nprocs=2, start_method=SERVER.get_start_method())


def _of_one_rank(
    rank: int,
    function: Callable[[int, Path], None],
    root: Path,
    port: int,
    variables: dict[str, str],
) -> None:
    faulthandler.dump_traceback_later(_SECONDS, exit=True)  # ranks that wait for each other
    make_cheap()
    os.environ.clear()  # they are the server's, of when it was started
    os.environ.update(variables)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    os.environ.pop("PL_GLOBAL_SEED", None)  # a run before has left it; it would seed again
    os.environ.update(
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    function(rank, root)
