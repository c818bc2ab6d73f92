"""A small OpenAI-compatible server that judges: its reply depends on the request's content."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeJudge:
    """State of a fake judge: its replies, and the received requests; tests may change attributes.

    Attributes:
        reply: From the content of a request to the text of the reply, or to an HTTP status.
        names: The served models; None for a server without a list.
        bodies: Requests for a score, in their order of arrival.
        keys: Their Authorization headers.
    """

    def __init__(self, reply: Callable[[str], str | int]) -> None:
        self.reply = reply
        self.names: list[str] | None = ["judge"]
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""

    @property
    def asked(self) -> list[str]:
        """The contents of the requests."""
        return [body["messages"][0]["content"] for body in self.bodies]


def length_score(content: str) -> str:
    """Scores 1 to 10 by the length of the response in the default prompt."""
    response = content.partition("[Response]\n")[2].partition("\n\nEnd your reply")[0]
    return f"It has {len(response)} characters.\nScore: {1 + len(response) % 10}"


@contextmanager
def fake_judge(reply: Callable[[str], str | int] = length_score) -> Iterator[FakeJudge]:
    """A server for as long as the block lasts."""
    judge = FakeJudge(reply)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def _send(self, status: int, value: Any) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            if judge.names is None:
                self._send(404, {"detail": "Not Found"})
            else:
                self._send(200, {"data": [{"id": name} for name in judge.names]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            judge.bodies.append(body)
            judge.keys.append(self.headers.get("Authorization"))
            reply = judge.reply(body["messages"][0]["content"])
            if isinstance(reply, int):
                self._send(reply, {"error": "no"})
            else:
                message = {"role": "assistant", "content": reply}
                self._send(200, {"choices": [{"message": message, "finish_reason": "stop"}]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
