"""Hostile answers of a server to the engine and to a served teacher."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import tiny
from fuzz_program import Bench, Case
from raw_server import Reply, as_json, head, raw_server, whole

from okd_lightning.endpoint import Endpoint
from okd_lightning.engines.vllm_client import VLLMClient
from okd_lightning.models import Vocabulary
from okd_lightning.teachers import ServedTeacher, TeacherRun

_PROMPT = [3, 4, 5]
_K = 4


def _row(token: int, **changes: Any) -> dict[str, Any]:
    entry = {str(i): {"logprob": -1.4 - i / 100, "rank": i} for i in (3, 4, 5, 6, 7, 8, 9, 10)}
    entry[str(token)] = {"logprob": -3.0, "rank": 9}
    return {
        **{k: {"logprob": v["logprob"] - 1.2, "rank": v["rank"]} for k, v in entry.items()},
        **changes,
    }


def _choice(**changes: Any) -> dict[str, Any]:
    good = {
        "token_ids": [3],
        "prompt_token_ids": _PROMPT,
        "finish_reason": "length",
        "logprobs": {"token_logprobs": [-0.5]},
        "prompt_logprobs": [None, _row(4), _row(5)],
    }
    return {**good, **changes}


def _answer(**changes: Any) -> dict[str, Any]:
    return {"choices": [_choice(**changes)]}


_ANY: dict[str, Any] = {
    "null": None,
    "number": 7,
    "text": "\x1b[2J\u202e",
    "list": [],
    "list of null": [None],
    "object": {},
    "deep": json.loads("[" * 500 + "]" * 500),
}
_CHOICES: dict[str, Any] = {
    **{f"choices {name}": {"choices": value} for name, value in _ANY.items()},
    **{f"choice {name}": {"choices": [value]} for name, value in _ANY.items()},
    "two choices": {"choices": [_choice(), _choice()]},
    **{
        f"{field} {name}": _answer(**{field: value})
        for field in ("token_ids", "prompt_token_ids", "logprobs", "prompt_logprobs")
        for name, value in _ANY.items()
    },
    "finish reason": _answer(finish_reason=7),
    "negative id": _answer(token_ids=[-1]),
    "large id": _answer(token_ids=[2**70]),
    "float id": _answer(token_ids=[3.0]),
    "boolean id": _answer(token_ids=[True]),
    "other prompt": _answer(prompt_token_ids=[3, 4, 6]),
    "two logprobs": _answer(logprobs={"token_logprobs": [-0.5, -0.5]}),
    "positive": _answer(logprobs={"token_logprobs": [0.5]}),
    "text logprob": _answer(logprobs={"token_logprobs": ["-0.5"]}),
    "large logprob": _answer(logprobs={"token_logprobs": [-(10**400)]}),
    "few rows": _answer(prompt_logprobs=[None, _row(4)]),
    "row null": _answer(prompt_logprobs=[None, None, _row(5)]),
    "row list": _answer(prompt_logprobs=[None, [], _row(5)]),
    "own token missing": _answer(prompt_logprobs=[None, {"3": {"logprob": -1.0}}, _row(5)]),
    "odd key": _answer(prompt_logprobs=[None, _row(4, **{"4a": {"logprob": -5}}), _row(5)]),
    "padded key": _answer(prompt_logprobs=[None, _row(4, **{"04": {"logprob": -5}}), _row(5)]),
    "arabic key": _answer(prompt_logprobs=[None, _row(4, **{"\u0664": {"logprob": -5}}), _row(5)]),
    "large key": _answer(prompt_logprobs=[None, _row(4, **{"9" * 30: {"logprob": -5}}), _row(5)]),
    "entry number": _answer(prompt_logprobs=[None, _row(4, **{"4": -1.0}), _row(5)]),
    "entry empty": _answer(prompt_logprobs=[None, _row(4, **{"4": {}}), _row(5)]),
    "all certain": _answer(
        prompt_logprobs=[None, {str(i): {"logprob": 0.0} for i in range(3, 12)}, _row(5)]
    ),
    "no mass": _answer(
        prompt_logprobs=[None, {str(i): {"logprob": -9999.0} for i in range(3, 16)}, _row(5)]
    ),
    "unknown ids": _answer(
        prompt_logprobs=[None, {str(i): {"logprob": -2.5} for i in (4, *range(90, 99))}, _row(5)]
    ),
}
_RAW: dict[str, Reply] = {
    "nothing": lambda sock, request: None,
    "no HTTP": lambda sock, request: sock.sendall(b"\x1b[2J hello\r\n\r\n"),
    "status line": lambda sock, request: sock.sendall(b"HTTP/1.1 abc\r\n\r\n"),
    "large status": lambda sock, request: sock.sendall(b"HTTP/1.1 99999999999 x\r\n\r\n"),
    "many headers": lambda sock, request: sock.sendall(
        b"HTTP/1.1 200 x\r\n" + b"a: b\r\n" * 500 + b"\r\n"
    ),
    "long header": lambda sock, request: sock.sendall(
        b"HTTP/1.1 200 x\r\na: " + b"b" * 100_000 + b"\r\n\r\n"
    ),
    "chunk size": lambda sock, request: sock.sendall(
        head(Transfer_Encoding="chunked") + b"zz\r\nabc"
    ),
    "cut chunk": lambda sock, request: sock.sendall(head(Transfer_Encoding="chunked") + b"9\r\nab"),
    "negative length": lambda sock, request: sock.sendall(head(Content_Length=-5) + b"{}"),
    "digits as length": lambda sock, request: sock.sendall(head(Content_Length="9" * 5000) + b"{}"),
    "redirect to itself": whole(b"", 302, Location="/v1/models"),
    "redirect to a file": whole(b"", 302, Location="file:///etc/passwd"),
    "error page": whole(b"\x1b[2J<html>" * 1000, 500),
    "no content": whole(b"", 204),
    "empty": whole(b""),
    "gzip": whole(b"\x1f\x8b\x08\x00", 200, Content_Encoding="gzip"),
    "slow": lambda sock, request: [sock.sendall(b"H") or time.sleep(0.05) for _ in range(99)],
    "deep": whole(b"[" * 100_000),
    "digits": whole(b"9" * 5000),
    "NaN": whole(b'{"choices": NaN}'),
    "Infinity": whole(json.dumps(_answer(logprobs={"token_logprobs": [-float("inf")]})).encode()),
    "exponent": whole(json.dumps(_answer()).replace("-0.5", "-1e999").encode()),
}


def _endless(sock: Any, request: bytes) -> None:
    sock.sendall(head())
    while True:
        sock.sendall(b" " * 65536)


def _engine(reply: Reply) -> Callable[[Bench], None]:
    """Request one completion as the engine and the probe do."""

    def act(bench: Bench) -> None:
        with raw_server(_after_models(reply)) as server:
            endpoint = Endpoint(server.url, "model.engine.url", 0.5, num_retries=0)
            request = {"prompt": _PROMPT, "max_tokens": 1, "logprobs": 0, "prompt_logprobs": 1}
            VLLMClient(endpoint).complete(request)

    return act


def _teacher(reply: Reply) -> Callable[[Bench], None]:
    """Score one row as a served teacher does."""

    def act(bench: Bench) -> None:
        tokenizer = tiny.make_tokenizer()
        with raw_server(_after_models(reply)) as server:
            settings = ServedTeacher(server.url, k=_K, timeout_seconds=0.5, num_retries=0)
            run = TeacherRun("student", tokenizer, Vocabulary.of(tokenizer), "float32")
            settings.join(run)._score(_PROMPT, [1, 2], False)

    return act


def _after_models(reply: Reply) -> Reply:
    """Answer the first request, for the list of models, correctly."""
    models = as_json({"data": [{"id": "m"}]})

    def answer(sock: Any, request: bytes) -> None:
        (models if b"/v1/models" in request.split(b"\r\n")[0] else reply)(sock, request)

    return answer


_QUESTIONS: dict[str, Callable[[VLLMClient], object]] = {
    "models": lambda client: client.served(),
    "info": lambda client: client.info(),
    "version": lambda client: client.version(),
    "tokens": lambda client: client.tokenize("ab"),
    "cache": lambda client: client.drop_cache(),
}


def _asked(question: str, reply: Reply) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        answer = reply if question == "models" else _after_models(reply)
        with raw_server(answer) as server:
            endpoint = Endpoint(server.url, "--url", 0.5, num_retries=0)
            _QUESTIONS[question](VLLMClient(endpoint))

    return act


def cases(seed: int) -> list[Case]:
    """Yield all cases; the seed is not used."""
    del seed
    nested = {
        "models": [{"data": [v]} for v in _ANY.values()] + [{"data": [{"id": "a", "root": 7}]}],
        "info": [{"vllm_config": {"model_config": v}} for v in _ANY.values()],
        "version": [{"weight_version": v} for v in _ANY.values()],
        "tokens": [{"tokens": v} for v in _ANY.values()],
        "cache": [{"success": v} for v in _ANY.values()],
    }
    raw = {**_RAW, "endless": _endless}
    return [
        *(Case(f"engine: {name}", _engine(as_json(v))) for name, v in _CHOICES.items()),
        *(Case(f"teacher: {name}", _teacher(as_json(v))) for name, v in _CHOICES.items()),
        *(Case(f"raw: {name}", _engine(reply)) for name, reply in raw.items()),
        *(Case(f"{q}: {name}", _asked(q, as_json(v))) for q in nested for name, v in _ANY.items()),
        *(
            Case(f"{question}: nested {number}", _asked(question, as_json(value)))
            for question, values in nested.items()
            for number, value in enumerate(values)
        ),
    ]
