"""Contenders of a benchmark, each in its own process, taking turns.

A benchmark script starts itself once per contender. Each process prepares, reports that it is
ready, and then does one step per command. Only one process works at a time, so other load of the
machine affects all alike. Memory is the peak resident size of the process.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
PACKAGES = ("torch", "lightning", "transformers", "peft", "trl")
NUM_THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


class Turns:
    """The contender's side: call ``next`` before every step; it ends the process after the last."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # output of libraries is not a reply
        self._started: float | None = None
        self._cpu_started = 0.0
        torch.set_num_threads(NUM_THREADS)

    def next(self) -> None:
        """Report the finished step and wait for the next turn."""
        if self._started is None:
            self._reply(before_mb=peak_mb())
        else:
            seconds = time.perf_counter() - self._started
            cpu_seconds = time.process_time() - self._cpu_started
            self._reply(seconds=seconds, cpu_seconds=cpu_seconds, peak_mb=peak_mb())
        if not sys.stdin.readline().startswith("go"):
            os._exit(0)  # from within any loop
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def _reply(self, **values: float) -> None:
        print(json.dumps(values), file=self._replies, flush=True)


class _Contender:
    """The parent's side of a contender."""

    def __init__(self, script: str, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, script, "--contender", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(NUM_THREADS),
                "OMP_WAIT_POLICY": "passive",  # waiting threads take no time from the others
            },
        )
        self.before_mb = self._answer()["before_mb"]
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.peak_mb = 0.0

    def step(self) -> None:
        self._say("go")
        answer = self._answer()
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])
        self.peak_mb = answer["peak_mb"]

    def stop(self) -> None:
        self._say("stop")
        self._process.wait(60)

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"contender {self._process.args} ended early")
        answer: dict[str, float] = json.loads(line)
        return answer


def peak_mb() -> float:
    """Return the largest resident size of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def take_turns(
    script: str, contenders: Mapping[str, Sequence[str]], steps: int, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Run steps of every contender in turn; return medians and peaks by name.

    Args:
        script: The benchmark's own file.
        contenders: Name → arguments of its process.
        steps: Measured steps of each.
        warmup: Steps of each before that.
    """
    running = {name: _Contender(script, arguments) for name, arguments in contenders.items()}
    for _ in range(warmup + steps):
        for name, contender in running.items():
            contender.step()
            spent = f"{contender.seconds[-1]:.2f} s, {contender.cpu_seconds[-1]:.2f} s of CPU"
            print(f"{name}: {spent}", file=sys.stderr, flush=True)
    for contender in running.values():
        contender.stop()
    return {
        name: {
            "median_seconds": round(statistics.median(c.seconds[warmup:]), 4),
            "fastest_seconds": round(min(c.seconds[warmup:]), 4),
            "median_cpu_seconds": round(statistics.median(c.cpu_seconds[warmup:]), 4),
            "seconds": [round(s, 4) for s in c.seconds[warmup:]],
            "before_mb": round(c.before_mb, 1),
            "peak_mb": round(c.peak_mb, 1),
        }
        for name, c in running.items()
    }


def write_results(name: str, content: Mapping[str, Any], path: Path | None = None) -> None:
    """Write and print a benchmark's numbers, with a description of the machine."""
    machine = {
        "processor": _processor(),
        "threads": NUM_THREADS,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, **content}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
