"""Real vLLM servers on this machine: how each is started, and that none outlives the tests.

A server runs in a session of its own, so that its process id names all of its processes. It ends
with the pool that started it; if the tests are interrupted or killed, the kernel sends it SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

_MOST_SERVERS = 2
"""Each takes 3 GB of memory."""

_START_SECONDS, _END_SECONDS = 600.0, 60.0
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)

ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however it ends."""
    _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


@dataclass
class ServerProcess:
    """Process with an HTTP server, and its child processes.

    Args:
        command: What is run.
        url: Where it answers ``/health`` with 200 once it is ready.
        log: File of its output.
        environment: Further variables.
    """

    command: Sequence[str]
    url: str
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        """Start it; to be called in the main thread, whose end the kernel watches."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def pid(self) -> int:
        """Process id of the server, which is also its process group's."""
        assert self._process is not None, "not started"
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Return once it answers.

        Raises:
            RuntimeError: It has ended, or not answered in time; with the end of its output.
        """
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        tail = self.log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(self.command)} has not started:\n{tail}")

    def kill(self) -> None:
        """End all of its processes at once, as a crash does."""
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """End it in order; kill what is left after a minute."""
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_SECONDS)
        with suppress(ProcessLookupError):  # usually nothing of it is left
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


@dataclass(frozen=True)
class Server:
    """Model and settings of a server.

    Attributes:
        name: What requests call the model.
        save: Writes the model and its tokenizer into a folder; done once.
        arguments: Of the server, beyond those of every one.
    """

    name: str
    save: Callable[[Path], None]
    arguments: tuple[str, ...]


@dataclass
class ServerPool:
    """Servers that start when they are first asked for, two at a time.

    A third one ends the one that was asked for longest ago. One that is asked for again after it
    was ended, or has died, is started again on the same port.

    Args:
        folder: For models and logs.
    """

    folder: Path
    _running: dict[str, ServerProcess] = field(default_factory=dict)
    _ports: dict[str, int] = field(default_factory=dict)

    def model_folder(self, server: Server) -> Path:
        """Folder of the model with which the server starts."""
        folder = self.folder / server.name
        if not folder.is_dir():
            server.save(folder)
        return folder

    def url(self, server: Server, *, is_awaited: bool = True) -> str:
        """Address of the server, which is started if it does not run.

        Args:
            server: Which.
            is_awaited: Return once it is ready, else as soon as it starts.
        """
        process = self._running.pop(server.name, None)
        if process is None:
            while len(self._running) >= _MOST_SERVERS:
                oldest = next(iter(self._running))
                self._running.pop(oldest).stop()
            process = self._make(server)
            process.start()
        self._running[server.name] = process  # now the one asked for last
        if is_awaited:
            process.wait_until_ready()
        return process.url

    def kill(self, server: Server) -> None:
        """Have it crash."""
        self._running.pop(server.name).kill()

    def close(self) -> None:
        """End all of them."""
        while self._running:
            self._running.popitem()[1].stop()

    def _make(self, server: Server) -> ServerProcess:
        port = self._ports.setdefault(server.name, _free_port())
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(self.model_folder(server)), "--served-model-name", server.name),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
            *("--enforce-eager", *server.arguments),
        ]
        log = self.folder / f"{server.name}.log"
        return ServerProcess(command, f"http://127.0.0.1:{port}", log, ENVIRONMENT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
