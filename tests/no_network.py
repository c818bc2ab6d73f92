"""No test reaches a network: the hub's client is offline, and no host but this one is looked up.

conftest.py imports this before the libraries that read the variable. A test that tries all the
same gets the error of a machine without a network at once, and fails at its end.
"""

from __future__ import annotations

import os
import socket
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

attempts: list[str] = []
"""Hosts that a test has tried to reach."""

_HERE = {None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname()}
_getaddrinfo, _connect = socket.getaddrinfo, socket.socket.connect


def _getaddrinfo_here(host: Any, *rest: Any, **more: Any) -> Any:
    _check(host)
    return _getaddrinfo(host, *rest, **more)


def _connect_here(sock: socket.socket, address: Any) -> None:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        _check(address[0])
    _connect(sock, address)


def _check(host: Any) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name not in _HERE and not name.startswith("127."):
        attempts.append(name)
        raise socket.gaierror(socket.EAI_AGAIN, f"tests reach no network, and not {name!r}")


socket.getaddrinfo = _getaddrinfo_here
socket.socket.connect = _connect_here
