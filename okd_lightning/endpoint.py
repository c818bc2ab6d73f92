"""Requests to a JSON server over HTTP: limits of time and size, retries, one-line errors.

Owns the transport only; ``vllm_client`` owns the contents of requests and replies. The standard
library's client is used because it has no further features: it follows no redirects, takes no proxy
or password from the environment, and gives access to its socket, which a timer shuts down at the
deadline. (The timeouts of urllib and requests hold for one read: a reply that arrives byte by byte
never reaches them.)
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from okd_lightning.errors import ConfigError, ServerError, ServerTimeoutError, one_line

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_FIRST_CONTACT_RETRIES = 5
"""Retries for a server that has never replied, 8 seconds in all: its address may be wrong."""

_BUSY = (429, 502, 503, 504)
_REDIRECTS = range(300, 400)
_SHOWN = 300
_LONGEST_SECONDS = 1e6
"""Limit of socket timeouts is 24 days."""

_PIECE = 1 << 16
SMALL = 8 << 20
"""Default for the most bytes of a reply."""

Answer = TypeVar("Answer")


@dataclass
class Endpoint:
    """A server, and how long to wait for it.

    Args:
        url: Such as http://localhost:8000, without user name, password, ? or #.
        option: Name of the user's option, for messages.
        timeout_seconds: Longest wait for one whole reply.
        num_retries: How often a request is repeated where the connection failed or the server was
            busy, once it has replied; the pauses double, from a quarter of a second to eight. At
            most five times before the first reply.
        token_variable: Environment variable whose value is sent as the Authorization header:
            unchanged if it contains a blank ("Basic ..."), else as a bearer token.

    Raises:
        ConfigError: Not an http address, one with a password, or a number out of its range.
    """

    url: str
    option: str
    timeout_seconds: float = 600.0
    num_retries: int = 12
    token_variable: str = "OKD_SERVER_TOKEN"
    _has_answered: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.token_variable):
            raise ConfigError(  # may be the key itself: not repeated
                f"{self.option}: the name of the environment variable with the key is not such a "
                "name (letters, digits and _); put the key into a variable and give the "
                "variable's name"
            )
        _check_address(self.url, self.option, self.token_variable)
        self.url = self.url.rstrip("/").removesuffix("/v1")
        if not self.timeout_seconds > 0:
            raise ConfigError(
                f"{self.option}: timeout_seconds must be above 0, got {self.timeout_seconds}"
            )
        if self.num_retries < 0:
            raise ConfigError(
                f"{self.option}: num_retries must be at least 0, got {self.num_retries}"
            )

    def get(self, path: str, max_bytes: int = SMALL) -> Any:
        """Return the reply to a GET; see ``post``."""
        return self._ask(path, None, None, max_bytes)

    def post(
        self,
        path: str,
        body: Any,
        timeout_seconds: float | None = None,
        max_bytes: int = SMALL,
    ) -> Any:
        """Return the reply to a POST, from JSON; None for an empty one.

        Args:
            path: Such as /v1/completions.
            body: Sent as JSON.
            timeout_seconds: Timeout of this request alone.
            max_bytes: Longest reply.

        Raises:
            ServerTimeoutError: No complete reply in time.
            ServerError: No connection after all retries, a status that is not 2xx, a reply that is
                longer than ``max_bytes`` or not JSON.
        """
        return self._ask(path, json.dumps(body).encode(), timeout_seconds, max_bytes)

    def at(self, path: str) -> str:
        """Return the option and the address of ``path``, for messages."""
        return f"{self.option}: {self.url}{path}"

    def _ask(
        self, path: str, body: bytes | None, timeout_seconds: float | None, max_bytes: int
    ) -> Any:
        pause, problem, attempt = _FIRST_PAUSE_SECONDS, "", 0
        while True:
            try:
                return self._once(path, body, timeout_seconds or self.timeout_seconds, max_bytes)
            except _PassingError as error:
                problem = str(error)
            attempt += 1
            if attempt > self.num_retries:
                break
            if attempt > _FIRST_CONTACT_RETRIES and not self._has_answered:
                break
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise ServerError(
            f"{self.at(path)} cannot be reached ({problem}), tried {attempt} times; check that the "
            "server runs and that this is its address"
        )

    def _once(self, path: str, body: bytes | None, seconds: float, max_bytes: int) -> Any:
        status, content = self._exchange(path, body, seconds, max_bytes)
        if status in _BUSY:
            raise _PassingError(f"status {status}")
        self._has_answered = True
        if not 200 <= status < 300:
            raise self._refusal(path, status, content)
        try:
            return json.loads(content, parse_constant=_no_constant) if content else None
        except (ValueError, RecursionError) as error:
            raise ServerError(
                f"{self.at(path)} answers with something that is not JSON: "
                f"{content[:_SHOWN]!r}; is this an OpenAI-compatible vLLM server?"
            ) from error

    def _exchange(
        self, path: str, body: bytes | None, seconds: float, max_bytes: int
    ) -> tuple[int, bytes]:
        """Return the status and the body of one reply."""
        address, seconds = urlsplit(self.url + path), min(seconds, _LONGEST_SECONDS)
        connection, late = _connection(address, seconds), threading.Event()
        timer: threading.Timer | None = None
        start = time.monotonic()
        try:
            connection.connect()
            left = max(seconds - (time.monotonic() - start), 1e-3)
            timer = threading.Timer(left, _shut_down, [connection.sock, late])
            timer.daemon = True
            timer.start()
            target = address.path + (f"?{address.query}" if address.query else "")
            connection.request("GET" if body is None else "POST", target, body, self._headers())
            with connection.getresponse() as answer:
                content = self._content(answer, path, max_bytes)
            if late.is_set():  # a reply without a length ends where the connection does
                raise TimeoutError
            return answer.status, content
        except ServerError:  # ServerError is an OSError too
            raise
        except (OSError, http.client.HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise ServerTimeoutError(
                    f"{self.at(path)} has not answered within {seconds:g} seconds; look at the "
                    "server's log, and where it is only slow, raise timeout_seconds or lower "
                    "concurrency"
                ) from error
            raise _PassingError(one_line(str(error), _SHOWN) or type(error).__name__) from error
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()

    def _content(self, answer: http.client.HTTPResponse, path: str, max_bytes: int) -> bytes:
        pieces, size = [], 0
        while piece := answer.read(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > max_bytes:
                raise ServerError(
                    f"{self.at(path)} answers with more than {max_bytes:,} bytes, which is too "
                    "long for an answer to this request; is this an OpenAI-compatible vLLM server?"
                )
        if answer.length:  # the connection ended before the announced length
            raise http.client.IncompleteRead(b"", answer.length)
        return b"".join(pieces)

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Connection": "close"}
        token = os.environ.get(self.token_variable, "").strip()
        if token:
            if not (token.isascii() and token.isprintable()):
                raise ConfigError(
                    f"{self.option}: the environment variable {self.token_variable} holds "
                    "characters that no Authorization header has; set it to the token alone"
                )
            headers["Authorization"] = token if " " in token else f"Bearer {token}"
        return headers

    def _refusal(self, path: str, status: int, content: bytes) -> ServerError:
        text = one_line(content[:_SHOWN].decode(errors="replace"))
        advice = "look at the server's log"
        if status in _REDIRECTS:
            advice = "redirects are not followed: give the address to which it redirects"
        elif status in (401, 403):
            advice = f"it needs a token: set the environment variable {self.token_variable}"
        return ServerStatusError(
            status, f"{self.at(path)} answers with status {status}: {text}; {advice}"
        )


class ServerStatusError(ServerError):
    """A status that is not 2xx.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _PassingError(Exception):
    """An error that may not occur at the next attempt."""


def _check_address(url: str, option: str, token_variable: str) -> None:
    """Refuse a text that is not a server's address; the message never repeats a password."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_address = is_address and (parts.port is None or parts.port > 0) and url.isascii()
        has_secret = "@" in parts.netloc or "@" in url.partition("://")[2].partition("/")[0]
    except ValueError:  # invalid brackets or port
        is_address, has_secret = False, "@" in url
    if has_secret:
        raise ConfigError(
            f"{option}: the address holds a user name or password, which would be printed and "
            f"saved with the run; leave them out and set the environment variable {token_variable} "
            'to a token or to "Basic ...", which is sent as the Authorization header'
        )
    if not (is_address and url.isprintable()) or " " in url:
        raise ConfigError(
            f"{option}: {url!r} is not an address; expected one like http://localhost:8000"
        )
    if "?" in url or "#" in url:
        raise ConfigError(
            f"{option}: the address has a ? or #, and only scheme, host, port and path are used; "
            f"a token belongs in the environment variable {token_variable}"
        )


def _connection(address: SplitResult, seconds: float) -> http.client.HTTPConnection:
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    return kind(str(address.hostname), address.port, timeout=seconds)


def _shut_down(sock: socket.socket, late: threading.Event) -> None:
    """End any wait for ``sock``, from another thread."""
    late.set()
    with suppress(OSError):  # it has ended by itself
        # not TLS's own shutdown, which waits for the other side
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def in_parallel(
    calls: Sequence[Callable[[], Answer]],
    concurrency: int,
    done: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Return the results of some calls, in their order, made by threads.

    Args:
        calls: Made once each; the first error, also of ``done``, cancels those that have not begun,
            and is raised without waiting for the others. A program's end does not wait for them
            either, as it would for the threads of a ``ThreadPoolExecutor``.
        concurrency: Number of calls at the same time.
        done: Called in this thread after each call.
    """
    futures: list[Future[Answer]] = [Future() for _ in calls]
    waiting: SimpleQueue[tuple[Callable[[], Answer], Future[Answer]]] = SimpleQueue()
    for pair in zip(calls, futures, strict=True):
        waiting.put(pair)
    for _ in range(max(1, min(concurrency, len(calls)))):
        threading.Thread(target=_make_calls, args=(waiting,), daemon=True).start()
    try:
        for future in as_completed(futures):
            future.result()
            done()
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return [future.result() for future in futures]


def _make_calls(waiting: SimpleQueue[tuple[Callable[[], Answer], Future[Answer]]]) -> None:
    with suppress(Empty):
        while True:
            call, future = waiting.get_nowait()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  raised again by the thread that waits
                future.set_exception(error)
