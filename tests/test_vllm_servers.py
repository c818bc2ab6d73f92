"""Servers of the real-vLLM tests end with the tests in every case.

Frozen here: a stopped server takes its child processes along; a test process that is killed leaves
no server; a server that does not start fails with its output; of three, the one asked for longest
ago is ended, and a crashed one is started again on its port.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm_servers import Server, ServerPool, ServerProcess

SERVE = """
import http.server, subprocess, sys
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *args): pass
print(subprocess.Popen(["sleep", "300"]).pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""
PARENT = """
import sys, time
from pathlib import Path
from vllm_servers import ServerProcess
process = ServerProcess(["sleep", "300"], "http://127.0.0.1:9", Path(sys.argv[1]))
process.start()
print(process.pid, flush=True)
time.sleep(300)
"""


class StandIns(ServerPool):
    """A pool of servers that serve no model."""

    def _make(self, server: Server) -> ServerProcess:
        real = super()._make(server)
        port = real.url.rpartition(":")[2]
        return ServerProcess([sys.executable, "-c", SERVE, port], real.url, real.log)


@pytest.fixture
def pool(tmp_path):
    found = StandIns(tmp_path)
    yield found
    found.close()


def server(name: str) -> Server:
    return Server(name, lambda folder: folder.mkdir(), ())


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_ends(pid: int) -> None:
    end = time.monotonic() + 20
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_running(pid)


def pids(pool: ServerPool, name: str) -> tuple[int, int]:
    """Return the process ids of the server and of its child."""
    child = int((pool.folder / f"{name}.log").read_text().split()[-1])
    return pool._running[name].pid, child


def test_children_end_with_their_server(pool):
    pool.url(server("a"))
    own, child = pids(pool, "a")
    assert is_running(own)
    assert is_running(child)
    pool.close()
    assert_ends(own)
    assert_ends(child)


def test_the_third_server_ends_the_one_asked_for_longest_ago(pool):
    urls = {name: pool.url(server(name)) for name in "ab"}
    assert pool.url(server("a")) == urls["a"]
    first, second = pids(pool, "a")[0], pids(pool, "b")[0]
    pool.url(server("c"))
    assert is_running(first)
    assert not is_running(second)


def test_a_crashed_server_starts_again_on_its_port(pool):
    url = pool.url(server("a"))
    before, child = pids(pool, "a")
    pool.kill(server("a"))
    assert not is_running(before)
    assert_ends(child)
    assert pool.url(server("a")) == url
    assert pids(pool, "a")[0] != before


def test_killed_tests_leave_no_server(tmp_path):
    here = str(Path(__file__).parent)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log")],
        env={**os.environ, "PYTHONPATH": here},
        stdout=subprocess.PIPE,
    )
    with parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
    assert_ends(pid)


def test_a_server_that_does_not_start_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    process = ServerProcess(command, "http://127.0.0.1:9", tmp_path / "log")
    process.start()
    with pytest.raises(RuntimeError, match="no such model"):
        process.wait_until_ready()
    process.stop()
