"""Requests over HTTP to servers that misbehave, byte by byte.

Frozen here: one deadline for the whole answer, also where it arrives byte by byte in headers or
body; a limit of size; no redirects, proxies or passwords from the environment; passwords in an
address are refused and never shown; a token from an environment variable; a server that has
answered once is waited for longer than one that never has; every broken answer is a ServerError;
neither an error in one of several calls nor the end of the program waits for the others.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
from raw_server import as_json, head, raw_server, whole

from okd_lightning.endpoint import Endpoint, in_parallel
from okd_lightning.errors import ConfigError, ServerError, ServerTimeoutError


@pytest.fixture
def naps(monkeypatch) -> list[float]:
    """The pauses that were not made."""
    found: list[float] = []
    monkeypatch.setattr("okd_lightning.endpoint.time.sleep", found.append)
    return found


def dribbled(content: bytes):
    def reply(sock, request):
        for i in range(len(content)):
            sock.sendall(content[i : i + 1])
            time.sleep(0.02)

    return reply


@pytest.mark.parametrize(
    "reply",
    [
        dribbled(head(X="y" * 1000)),
        dribbled(b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        lambda sock, request: (
            sock.sendall(head(Content_Length=1000)),
            dribbled(b" " * 1000)(sock, b""),
        ),
        lambda sock, request: (sock.sendall(head()), dribbled(b"1" * 1000)(sock, b"")),
        lambda sock, request: time.sleep(1),
    ],
    ids=["headers", "continue", "body", "body without a length", "nothing"],
)
def test_the_deadline_is_for_the_whole_answer(reply):
    with raw_server(reply) as server:
        start = time.monotonic()
        with pytest.raises(ServerTimeoutError, match=r"within 0\.3 seconds"):
            Endpoint(server.url, "--url", timeout_seconds=0.3).get("/")
        assert time.monotonic() - start < 0.9


def test_an_answer_without_end_is_not_kept():
    def endless(sock, request):
        sock.sendall(head())
        while True:
            sock.sendall(b" " * 65536)

    with raw_server(endless) as server, pytest.raises(ServerError, match="more than 1,000 bytes"):
        Endpoint(server.url, "--url").get("/", max_bytes=1000)


def test_redirects_are_not_followed():
    with raw_server(as_json({"secret": 1})) as other:
        with (
            raw_server(whole(b"", 307, Location=other.url)) as server,
            pytest.raises(ServerError, match=r"status 307.*redirects are not followed"),
        ):
            Endpoint(server.url, "--url").post("/", {})
        assert not other.requests


@pytest.mark.parametrize(
    "content",
    [
        b"<html>",
        b"[" * 100_000,
        b"9" * 5000,
        b'{"a": NaN}',
        b"\xff\xfe",
        b'{"a": \x1b[2J}',
    ],
    ids=["HTML", "deep", "digits", "NaN", "bytes", "escapes"],
)
def test_what_is_not_json_is_one_printable_line(content):
    with raw_server(whole(content)) as server, pytest.raises(ServerError) as raised:
        Endpoint(server.url, "--url").get("/")
    assert "not JSON" in str(raised.value)
    assert str(raised.value).isprintable()


def test_a_status_shows_what_the_server_says_without_control_characters():
    content = b"\x1b]0;title\x07no\r\nokd-lightning: done \xe2\x80\xae"
    with raw_server(whole(content, 400)) as server, pytest.raises(ServerError) as raised:
        Endpoint(server.url, "--url").get("/")
    assert r"status 400: \x1b]0;title\x07no okd-lightning: done \u202e; look" in str(raised.value)


def test_a_cut_answer_is_asked_for_again(naps):
    with raw_server(whole(b"7")) as server:
        good, server.reply = (
            server.reply,
            lambda sock, _: sock.sendall(head(Content_Length=9) + b"7"),
        )
        endpoint = Endpoint(server.url, "--url", num_retries=1)
        with pytest.raises(ServerError, match=r"cannot be reached \(IncompleteRead.*tried 2 times"):
            endpoint.get("/")
        server.reply = good
        assert endpoint.get("/") == 7


def test_a_known_server_is_waited_for_through_a_restart(naps):
    with raw_server(as_json({})) as server:
        endpoint = Endpoint(server.url, "--url")
        endpoint.get("/")
    with pytest.raises(ServerError, match="tried 13 times"):
        endpoint.get("/")
    assert 30 < sum(naps) < 120
    naps.clear()
    with pytest.raises(ServerError, match="tried 6 times"):
        Endpoint(server.url, "--url").get("/")
    assert sum(naps) < 10


def test_nothing_but_the_token_comes_from_the_environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with raw_server(as_json({})) as server:
        endpoint = Endpoint(server.url, "--url", token_variable="OKD_TEST_TOKEN")
        endpoint.get("/")
        monkeypatch.setenv("OKD_TEST_TOKEN", "abc")
        endpoint.get("/")
        monkeypatch.setenv("OKD_TEST_TOKEN", "Basic eA==")
        endpoint.get("/")
        monkeypatch.setenv("OKD_TEST_TOKEN", "a\r\nX: y")
        with pytest.raises(ConfigError, match="OKD_TEST_TOKEN holds characters"):
            endpoint.get("/")
    assert b"Authorization" not in server.requests[0]
    assert b"Authorization: Bearer abc\r\n" in server.requests[1]
    assert b"Authorization: Basic eA==\r\n" in server.requests[2]


def test_a_refusal_names_the_variable():
    with (
        raw_server(whole(b"{}", 401)) as server,
        pytest.raises(ServerError, match="OKD_TEST_TOKEN"),
    ):
        Endpoint(server.url, "--url", token_variable="OKD_TEST_TOKEN").get("/")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:hunter2@host:8000", "set the environment variable OKD_SERVER_TOKEN"),
        ("https://hunter2@host", "set the environment variable OKD_SERVER_TOKEN"),
        ("http://host:99999@hunter2", "set the environment variable"),
        ("http://host/?key=hunter2", r"has a \? or #"),
        ("http://host/#hunter2", r"has a \? or #"),
        ("localhost:8000", "is not an address"),
        ("http://", "is not an address"),
        ("http://[::1", "is not an address"),
        ("http://host:port", "is not an address"),
        ("http://host name", "is not an address"),
        ("http://host\r\nX: y", "is not an address"),
        ("file:///etc/passwd", "is not an address"),
        ("http://\u2603", "is not an address"),
    ],
)
def test_addresses(url, words):
    with pytest.raises(ConfigError, match=words) as raised:
        Endpoint(url, "--url")
    assert "hunter2" not in str(raised.value)
    assert str(raised.value).isprintable()


# ---------------------------------------------------------------- several calls


def test_results_are_in_the_order_of_the_calls():
    told = []
    calls = [lambda n=n: time.sleep(0.02 * (3 - n)) or n for n in range(3)]
    assert in_parallel(calls, 2, lambda: told.append(1)) == [0, 1, 2]
    assert len(told) == 3
    assert in_parallel([], 2) == []


def test_an_error_does_not_wait_for_the_other_calls():
    begun, forever = [], threading.Event()

    def fail():
        raise ServerError("no")

    calls = [forever.wait, fail, forever.wait, lambda: begun.append(1)]
    with pytest.raises(ServerError, match="no"):
        in_parallel(calls, 2)
    forever.set()
    time.sleep(0.05)
    assert begun == []  # what had not begun is cancelled


CALLS_WITHOUT_END = """
import threading, time
from okd_lightning.endpoint import in_parallel
forever = threading.Event()
threading.Thread(target=in_parallel, args=([forever.wait] * 3, 2), daemon=True).start()
time.sleep(0.2)
"""


def test_a_program_ends_while_calls_run():
    subprocess.run([sys.executable, "-c", CALLS_WITHOUT_END], check=True, timeout=60)
