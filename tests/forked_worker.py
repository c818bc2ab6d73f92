"""The process that generates ahead of training, forked: without the seconds of its imports."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from okd_lightning.engines.worker import serve


class ForkedWorker:
    """A handle with the methods of a ``Popen``; a killed one has the status that a Popen has."""

    def __init__(self, pid: int) -> None:
        self.pid, self._status = pid, None
        self._lock = threading.Lock()  # the reader and the end of the run both wait

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 60)
        while not self._has_ended():
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("worker", timeout or 60)
            time.sleep(0.01)
        return self._status

    def _has_ended(self) -> bool:
        with self._lock:
            if self._status is None:
                found, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if found else None
        return self._status is not None

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def launch_forked(pipe: Connection, files: Sequence[int]) -> ForkedWorker:
    """Replacement of ``worker_process.launch`` that forks."""
    pid = os.fork()
    if pid == 0:
        try:
            serve(Connection(os.dup(pipe.fileno())))
        finally:
            os._exit(1)
    return ForkedWorker(pid)
