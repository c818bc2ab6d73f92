"""A TCP server that answers HTTP requests with whatever bytes a test gives it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

Reply = Callable[[socket.socket, bytes], None]


def head(status: int = 200, **headers: Any) -> bytes:
    """The first lines of an answer; names of headers have underscores for dashes."""
    lines = [f"HTTP/1.1 {status} X", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(content: bytes, status: int = 200, **headers: Any) -> Reply:
    """A reply that sends one complete answer."""
    return lambda sock, request: sock.sendall(
        head(status, Content_Length=len(content), **headers) + content
    )


def as_json(value: Any) -> Reply:
    """A reply that sends JSON."""
    return whole(json.dumps(value).encode())


class RawServer:
    """State of the server: its next answers, and the received requests."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.requests: list[bytes] = []
        self.url = ""


@contextmanager
def raw_server(reply: Reply) -> Iterator[RawServer]:
    """A server for as long as the block lasts."""
    server, listener = RawServer(reply), socket.create_server(("127.0.0.1", 0))
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def talk(sock: socket.socket) -> None:
        with sock, suppress(OSError):  # the client may leave at any time
            request = sock.recv(1 << 16)
            server.requests.append(request)
            server.reply(sock, request)

    def serve() -> None:
        with suppress(OSError):  # closed below
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=talk, args=(sock,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
