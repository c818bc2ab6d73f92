"""Processes without the ten seconds of imports: forked from a server that has done them.

Each test process has one server, which starts with the first process that is wanted. It has
imported the command line and what a tiny run loads, and runs nothing: no thread pool, no process
group and no model is inherited. Where the fresh interpreter or what launches it (the console
script, torchrun, Lightning's launcher) is what a test is about, it starts one by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cheap_process import make_cheap

from okd_lightning.__main__ import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *(
            "okd_lightning.commands.cli",
            "okd_lightning.commands.compare.command",
            "okd_lightning.commands.diagnose.command",
        ),
        *(
            "okd_lightning.commands.export_command",
            "torch.utils.tensorboard",
            "torch.distributed.fsdp",
        ),
        *("torch.distributed.checkpoint", "peft.tuners.lora"),
        *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "gpt2")),
    ]
)

_STREAMS = ("stdout", "stderr")


class ForkedCommand:
    """``okd-lightning ARGV`` in a forked process, with the attributes of a ``Popen``.

    Args:
        argv: The words after ``okd-lightning``.
        folder: The current folder.
        environment: All variables that it has.
        program: A function of a module in its place; it reads ``sys.argv`` and returns a status.
    """

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        program: Callable[[], int | None] = main,
    ) -> None:
        self._written = Path(tempfile.mkdtemp())
        given = program, list(map(str, argv)), str(folder), dict(environment), self._written
        self._process = SERVER.Process(target=_type, args=given)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the signal's number where one ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("okd-lightning", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for it; what it wrote to stdout and stderr."""
        self.wait(timeout)
        out, err = ((self._written / name).read_text(errors="replace") for name in _STREAMS)
        shutil.rmtree(self._written)
        return out, err


def type_command(
    argv: Sequence[str],
    folder: Path,
    program: Callable[[], int | None] = main,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end, with this process's variables and further ones."""
    child = ForkedCommand(argv, folder, {**os.environ, **variables}, program)
    out, err = child.communicate(timeout=600)
    return subprocess.CompletedProcess(list(argv), child.returncode, out, err)


def type_on_ranks(argv: Sequence[str], folder: Path, num: int = 2) -> str:
    """Run one command on several ranks, which find the variables of torchrun.

    Returns:
        What they wrote to stderr.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    shared |= {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num), "GROUP_RANK": "0"}
    ranks = [
        ForkedCommand(
            argv, folder, {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(num)
    ]
    errors = [rank.communicate(timeout=600)[1] for rank in ranks]
    for rank, text in zip(ranks, errors, strict=True):
        assert rank.returncode == 0, text[-2000:]
    return "".join(errors)


def _type(
    program: Callable[[], int | None],
    argv: list[str],
    folder: str,
    variables: dict[str, str],
    written: Path,
) -> None:
    """Act in the child like a process that a shell has started."""
    make_cheap()
    random.seed()  # all children are forked with one state
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, name in enumerate(_STREAMS, start=1):
        descriptor = os.open(written / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.path.insert(0, folder)  # as after python -m
    sys.argv = ["okd-lightning", *argv]
    sys.exit(program())
