"""Requests to a JSON server over HTTP: time limits, repeats with back-off, and one line of error.

Owns the transport alone; what is asked and what an answer means belongs to the caller.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, TypeVar

from okd_lightning.errors import ConfigError, ServerError, ServerTimeoutError

_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 8.0
_BUSY = (429, 502, 503, 504)
_SHOWN = 300

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Endpoint:
    """A server, and how much patience to have with it.

    Args:
        url: Such as http://localhost:8000, without a path.
        option: How the user named it, for messages.
        timeout_seconds: Longest wait for one answer.
        num_retries: How often a request is repeated where the connection failed or the server was
            busy; the pauses between double, from a quarter of a second to eight.

    Raises:
        ConfigError: Not an http address, or a number out of its range.
    """

    url: str
    option: str
    timeout_seconds: float = 600.0
    num_retries: int = 5

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"{self.option}: {self.url!r} is no address; expected one like "
                "http://localhost:8000"
            )
        object.__setattr__(self, "url", self.url.rstrip("/").removesuffix("/v1"))
        if not self.timeout_seconds > 0:
            raise ConfigError(
                f"{self.option}: timeout_seconds must be above 0, got {self.timeout_seconds}"
            )
        if self.num_retries < 0:
            raise ConfigError(
                f"{self.option}: num_retries must be at least 0, got {self.num_retries}"
            )

    def get(self, path: str) -> Any:
        """The answer to a GET; see ``post``."""
        return self._ask(path, None)

    def post(self, path: str, body: Any, timeout_seconds: float | None = None) -> Any:
        """The answer to a POST, from JSON; None for an empty one.

        Args:
            path: Such as /v1/completions.
            body: What becomes JSON.
            timeout_seconds: For this request alone.

        Raises:
            ServerTimeoutError: No answer in time.
            ServerError: No connection after all repeats, a status that is not 2xx, or no JSON.
        """
        return self._ask(path, json.dumps(body).encode(), timeout_seconds)

    def _ask(self, path: str, body: bytes | None, timeout_seconds: float | None = None) -> Any:
        pause, problem = _FIRST_PAUSE_SECONDS, ""
        for attempt in range(self.num_retries + 1):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            try:
                return self._once(path, body, timeout_seconds or self.timeout_seconds)
            except _PassingError as error:
                problem = str(error)
        raise ServerError(
            f"{self.option}: {self.url}{path} cannot be reached ({problem}), tried "
            f"{self.num_retries + 1} times; check that the server runs and that this is its address"
        )

    def _once(self, path: str, body: bytes | None, timeout_seconds: float) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_seconds) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(path, error) from error
        except (TimeoutError, urllib.error.URLError, OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, TimeoutError):
                raise ServerTimeoutError(
                    f"{self.option}: {self.url}{path} has not answered within "
                    f"{timeout_seconds:g} seconds; look at the server's log, and where it is only "
                    "slow, raise timeout_seconds or lower concurrency"
                ) from error
            raise _PassingError(str(reason) or type(reason).__name__) from error
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise ServerError(
                f"{self.option}: {self.url}{path} answers with something that is no JSON: "
                f"{content[:_SHOWN]!r}; is this an OpenAI-compatible vLLM server?"
            ) from error

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> Exception:
        text = error.read().decode(errors="replace")[:_SHOWN]
        if error.code in _BUSY:
            return _PassingError(f"status {error.code}")
        return ServerStatusError(
            error.code,
            f"{self.option}: {self.url}{path} answers with status {error.code}: {text}; look at "
            "the server's log",
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
    """What may be gone at the next attempt."""


def in_parallel(
    calls: Sequence[Callable[[], Answer]],
    concurrency: int,
    done: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The answers of some calls, in their order, made by threads.

    Args:
        calls: Made once each; the first error ends the others that have not begun, and is raised.
        concurrency: Calls under way at once.
        done: Called in this thread after each one.
    """
    with ThreadPoolExecutor(max(1, min(concurrency, len(calls)))) as pool:
        waiting: list[Future[Answer]] = [pool.submit(call) for call in calls]
        try:
            for future in as_completed(waiting):
                future.result()
                done()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [future.result() for future in waiting]
