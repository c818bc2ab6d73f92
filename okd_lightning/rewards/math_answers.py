"""Mathematical equality of two texts' answers: math-verify, in a separate process.

The library limits time by an alarm signal, which works in the main thread only, removes other
users' alarms, and cannot interrupt one long multiplication. A separate process protects a training
run from this, and can be killed.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from okd_lightning.errors import OKDLightningError

_PROGRAM = Path(__file__).with_name("math_worker.py")
_LONGEST = 20_000
"""Characters read at the end of a text: a model that repeats itself generates long texts."""

_SECONDS = 10.0
"""Time limit of a comparison; the library's own limits are a fraction of it."""


class _Worker:
    """One process, started at the first comparison, and again after it was killed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, answer: str, reference: str) -> bool:
        """Return the process's result; False after the time limit."""
        with self._lock:
            process = self._running()
            limit = threading.Timer(_SECONDS, process.kill)
            limit.daemon = True
            limit.start()
            said = ""
            try:
                said = _exchange(process, json.dumps([answer[-_LONGEST:], reference[-_LONGEST:]]))
            finally:
                limit.cancel()
                if not said.endswith("\n"):  # killed or interrupted: it may still reply later
                    self.close()
            return said == "true\n"

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        # -P: this folder is not on the process's sys.path
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # keep the terminal's interrupt from the process
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            self.close()
            raise OKDLightningError(
                "mathematical answers cannot be compared: math-verify does not start (its own "
                "message is above); reinstall it, or compare texts with compare text"
            )
        return self._process


def _exchange(process: subprocess.Popen[str], question: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


@cache
def _worker(process_id: int) -> _Worker:
    """Return the worker of this process: a fork must not use its parent's pipes."""
    del process_id
    worker = _Worker()
    atexit.register(worker.close)
    return worker


def is_same_answer(answer: str, reference: str) -> bool:
    r"""Return whether two texts give the same answer: 1,234 is 1234.0, \boxed{\frac{1}{2}} is 0.5.

    Args:
        answer: Any text; math-verify finds the answer in it (in a box, after "the answer is", or
            the last formula or number).
        reference: Any text, like ``answer``.

    Returns:
        False also where a comparison takes more than some seconds.

    Raises:
        OKDLightningError: math-verify cannot be started.
    """
    return _worker(os.getpid()).ask(answer, reference)
