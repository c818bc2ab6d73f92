"""Marks of ``soak.py`` in a child process: the phase of a run, and the place where it is killed."""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import signal
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop

from okd_lightning import durable_files
from okd_lightning.callbacks import RolloutLog, SampleTable
from okd_lightning.checkpoints import io as checkpoint_io
from okd_lightning.rollouts import RolloutLoader
from okd_lightning.rollouts.generation import Agreement
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.run_records import RunCSVLogger

PLACES = {
    "rollout": ("rollout begins", "a row is written", "rollout ends"),
    "training": ("step begins", "step ends"),
    "validation": ("validation begins", "validation step", "validation ends"),
    "checkpoint": ("checkpoint begins", "within the file", "before the rename", "renamed"),
    "records": ("before a row", "behind a row", "sample written", "table written"),
}


@dataclass(frozen=True)
class Kill:
    """Time of a kill: at the n-th time at a place, or after some seconds of training."""

    place: str | None
    number: int = 1
    seconds: float = 0.0
    signal: int = signal.SIGKILL


class Board:
    """Shared memory in which a child reports its phase, and whether it has begun to train."""

    PHASES = ("start", *PLACES, "else")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2)

    @property
    def phase(self) -> str:
        return self.PHASES[self._memory[0]]

    @phase.setter
    def phase(self, name: str) -> None:
        self._memory[0] = self.PHASES.index(name)

    @property
    def has_trained(self) -> bool:
        return bool(self._memory[1])

    def trains(self) -> None:
        self._memory[1] = 1


class Marks:
    """Counters of a child's passes through each place; they end it at the chosen one."""

    def __init__(self, kill: Kill | None, board: Board) -> None:
        self._kill, self._board = kill, board
        self._counts: collections.Counter[str] = collections.Counter()

    def at(self, place: str) -> None:
        self._counts[place] += 1
        kill = self._kill
        if kill is not None and (place, self._counts[place]) == (kill.place, kill.number):
            os.kill(os.getpid(), kill.signal)

    @contextlib.contextmanager
    def phase(self, name: str, begins: str = "", ends: str = ""):
        before, self._board.phase = self._board.phase, name
        self.at(begins)
        yield
        self.at(ends)
        self._board.phase = "else" if before == "start" else before

    def around(self, owner: Any, name: str, *phase: str) -> None:
        """Wrap a method so that it marks its phase."""
        original = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with self.phase(*phase):
                return original(*args, **kwargs)

        setattr(owner, name, marked)


def mark_everything(marks: Marks, board: Board) -> None:
    """Mark the phases and places of a run, in a child."""
    marks.around(RolloutLoader, "_generate_all", "rollout", "rollout begins", "rollout ends")
    marks.around(DistillationModule, "training_step", "training", "step begins", "step ends")
    marks.around(_EvaluationLoop, "run", "validation", "validation begins", "validation ends")
    marks.around(DistillationModule, "validation_step", "validation", "validation step")
    marks.around(
        checkpoint_io.DurableCheckpointIO, "save_checkpoint", "checkpoint", "checkpoint begins"
    )
    marks.around(RunCSVLogger, "save", "records", "before a row", "behind a row")
    marks.around(RolloutLog, "on_train_batch_start", "records", "", "sample written")
    marks.around(SampleTable, "_show", "records", "", "table written")
    shown = Agreement.progress

    def progress(self, told):
        tell = shown(self, told) or (lambda rows, tokens=0: None)

        def marked(rows: int, tokens: int = 0) -> None:
            if rows:
                marks.at("a row is written")
            tell(rows, tokens)

        return marked

    Agreement.progress = progress
    rename, write = os.replace, durable_files._Watched.write

    def replace(*args):
        if ".ckpt" in str(args[1]):
            marks.at("before the rename")
        rename(*args)
        if ".ckpt" in str(args[1]):
            marks.at("renamed")

    def write_part(self, data):
        if board.phase == "checkpoint":
            marks.at("within the file")
        return write(self, data)

    durable_files.os.replace = replace
    durable_files._Watched.write = write_part
    step = DistillationModule.training_step

    def training_step(*args):
        board.trains()
        return step(*args)

    DistillationModule.training_step = training_step
