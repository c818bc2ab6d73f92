"""Proxy of a real vLLM server that records the requests, as the fake server does.

It replaces the fake in ``fake_vllm_server.serving``, so that tests that count requests, or have a
connection dropped, run on both.
"""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

_SECONDS = 120.0


class ForwardedVLLM:
    """Passes requests on to ``upstream`` unchanged, and the bytes of its answers back."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.url = ""
        self.faults: list[str] = []
        self.slow_seconds = 1.0
        self.is_dead = False
        self.requests: list[tuple[str, Any]] = []
        self.num_reloads = 0
        self._lock = threading.Lock()

    def bodies(self, path: str) -> list[Any]:
        """Return the bodies that were posted to a path."""
        return [body for asked, body in self.requests if asked == path]

    @property
    def version(self) -> str:
        """Return the label of the server's weights."""
        return str(json.loads(ask(self.upstream, "/weight_info")[1])["weight_version"])

    def handle(self, target: str, body: Any) -> tuple[int, bytes]:
        """Record of one request."""
        path = target.partition("?")[0]
        status, content = ask(self.upstream, target, body)
        with self._lock:
            self.requests.append((path, body))
            self.num_reloads += path == "/collective_rpc" and status == 200
        return status, content


def ask(url: str, target: str, body: Any = None) -> tuple[int, bytes]:
    """Status and content of a GET, or of a POST where there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + target, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def restore(url: str, folder: Path) -> None:
    """Have a real server sample from the weights in ``folder``, as at its start."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    name = {"new_version": "default"}
    for path, sent in (
        ("/collective_rpc", body),
        ("/reset_prefix_cache", {}),
        ("/update_weight_version", name),
    ):
        status, content = ask(url, path, sent)
        assert status == 200, (path, content)
