"""A vLLM server of a benchmark: a process of another environment, on one core (Linux)."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FLAGS = (
    *("--dtype", "float32", "--logprobs-mode", "processed_logprobs", "--max-model-len", "64"),
    "--enforce-eager",  # compilation takes minutes
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_WORKER_MULTIPROC_METHOD": "fork",
}


@contextmanager
def served(python: str, model: Path, core: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Run a vLLM server of a model within the context, on one core.

    Args:
        python: Interpreter of an environment with vLLM.
        model: Folder of the model.
        core: Number of the core.

    Yields:
        Its address, and a function that returns its CPU seconds so far.

    Raises:
        RuntimeError: The server ends before it answers; with the end of its output.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *FLAGS]
    output = model.with_name("server.log")
    with output.open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **ENVIRONMENT},
            stdout=log,
            stderr=log,
            start_new_session=True,  # its number names all of its processes
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process, output)
        yield url, lambda: cpu_seconds_of(process.pid)
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes], output: Path) -> None:
    """Return once a server answers."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    tail = output.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the server ended with status {process.returncode}:\n{tail}")


def cpu_seconds_of(session: int) -> float:
    """Return the CPU seconds of a session's running processes (Linux)."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
