"""Hostile configs and typed values, as the command line reads them before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable

from fuzz_program import Bench, Case

from okd_lightning.commands.cli_arguments import load_config, prepare, read_comments_as_text
from okd_lightning.commands.given_options import parsed
from okd_lightning.engines.vllm_server import VLLMServer
from okd_lightning.rewards.answers import answer_pattern, final_answer
from okd_lightning.rewards.math_answers import is_same_answer
from okd_lightning.tools.tool_calls import match_tool_calls, parse_tool_calls

_LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
_MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
_TEXTS = {
    "a billion laughs": _LAUGHS,
    "a billion merges": _MERGES,
    "an alias of itself": "a: &a [*a]\n",
    "nested lists": "[" * 20_000,
    "nested blocks": "".join(" " * i + "a:\n" for i in range(2000)),
    "closed lists": "a: " + "[" * 500 + "]" * 500,
    "digits": "a: " + "9" * 5000,
    "hexadecimal": "a: 0x" + "f" * 5000,
    "sexagesimal": "a: " + ":".join(["59"] * 5000),
    "date": "a: 2026-99-99",
    "far date": "a: 99999-01-01",
    "tag": "a: !!python/object/apply:os.system ['touch RAN']",
    "object": "!!python/object:os.system {}",
    "binary": "a: !!binary '\x01'",
    "unhashable": "? [1, 2]\n: 3",
    "two documents": "a: 1\n---\nb: 2",
    "escapes": "\x1b[2J: 1",
    "bidi": "a: \u202e",
    "bytes": "a: \ud800",
    "tab": "\ta: 1",
    "number": "7",
    "empty": "",
    "null": "null",
    "float": "a: .nan\nb: 1e999",
}


def _config(text: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        path = bench.write("run.yaml", text.encode("utf-8", "surrogatepass"))
        load_config(str(path))
        prepare(["fit", "--config", str(path)])

    return act


def _typed(text: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        read_comments_as_text()
        parsed(text)

    return act


def _pipe(bench: Bench) -> None:
    os.mkfifo(bench.folder / "run.yaml")
    load_config(str(bench.folder / "run.yaml"))


def _device(bench: Bench) -> None:
    load_config("/dev/zero")


def _pattern(pattern: str, text: str) -> Callable[[Bench], None]:
    return lambda bench: (final_answer(text, answer_pattern(pattern)), None)[1]


def _math(text: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        is_same_answer(text, "5")

    return act


def _calls(text: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        parse_tool_calls(text)
        match_tool_calls(text, '{"name": "a", "arguments": {}}')

    return act


def cases(seed: int) -> list[Case]:
    """Yield all cases; the seed is not used."""
    del seed
    patterns = {
        "nested repetition": (r"(a+)+$", "a" * 60 + "b"),
        "alternatives": (r"((a|a)*)b", "a" * 60),
        "words": (r"((\w+\s?)*)$", "word " * 60 + "!"),
        "not a pattern": ("(", "a"),
        "no group": ("a", "a"),
        "counted": (r"((a{1,99}){1,99}){1,99}b", "a" * 300),
    }
    maths = {
        "tower": "$9^{9^{9^{9}}}$",
        "factorials": "$99999!!!!$",
        "brackets": "$" + "(" * 5000 + "1" + ")" * 5000 + "$",
        "fractions": "$" + r"\frac{1}{" * 500 + "1" + "}" * 500 + "$",
        "digits": "9" * 100_000,
        "boxes": r"\boxed{" * 5000,
        "repeated": "the answer is " * 20_000,
        "escapes": "\x1b[2J\ud800\0",
    }
    calls = {
        "tags": "<tool_call>" * 50_000,
        "actions": "Action: a\nAction Input: " * 20_000,
        "objects": '{"a": [\n' * 50_000,
        "digits": '{"name": "a", "arguments": {"x": ' + "9" * 5000 + "}}",
        "deep": '{"name": "a", "arguments": ' + "[" * 50_000,
        "float": '{"name": "a", "arguments": {"x": 1e308, "y": Infinity}}',
    }
    urls = ("http://u:p@host", "http://host/?key=p", "\x1b[2J", "http://[", "http://a:b:c")
    return [
        *(Case(f"config: {name}", _config(text)) for name, text in _TEXTS.items()),
        *(Case(f"typed: {name}", _typed(text)) for name, text in _TEXTS.items()),
        Case("config is a pipe", _pipe),
        Case("config is a device", _device),
        *(Case(f"pattern: {name}", _pattern(*given)) for name, given in patterns.items()),
        *(Case(f"math: {name}", _math(text)) for name, text in maths.items()),
        *(Case(f"calls: {name}", _calls(text)) for name, text in calls.items()),
        *(
            Case(f"url: {url!r}", lambda bench, url=url: VLLMServer(url, "x") and None)
            for url in urls
        ),
    ]
