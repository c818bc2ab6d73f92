"""Hostile files of rows: broken, endless, too deep, too large, of wrong types, with odd text."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
from fuzz_program import Bench, Case

_ROW = '{"prompt": "ab", "response": "ba"}\n'
_ODD_TEXTS = {
    "escapes": "\x1b[2J\x1b]0;title\x07",
    "bidi": "\u202eabc\u2066",
    "nul": "a\0b",
    "half a character": "\ud800",
    "newlines": "\n\n\r\n",
    "combining": "e" + "\u0301" * 5000,
    "long": "ab" * 50_000,
    "special token": "</s><s></s>",
    "braces": "{prompt}{0}{x.__class__}",
    "markup": "[bold red]x[/]",
    "empty": "",
    "blank": "   ",
}
_ODD_VALUES: dict[str, Any] = {
    "null": None,
    "number": 7,
    "float": 1e308,
    "large number": 10**4000,
    "boolean": True,
    "list": ["a", "b"],
    "empty list": [],
    "object": {"a": "b"},
    "list of lists": [[["a"]]],
    "messages": [{"role": "user", "content": "x"}],
    "message of numbers": [{"role": 1, "content": 2}],
    "message without content": [{"role": "user"}],
    "message of null": [None],
    "parts": [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
    "deep": json.loads("[" * 400 + "]" * 400),
}


def _file(name: str, content: str | bytes, **data: Any) -> Callable[[Bench], None]:
    return lambda bench: bench.train(str(bench.write(name, content)), **data)


def _pipe(bench: Bench) -> None:
    os.mkfifo(bench.folder / "rows.jsonl")
    bench.train(str(bench.folder / "rows.jsonl"))


def _link(target: str, name: str) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        (bench.folder / name).symlink_to(target)
        bench.train(str(bench.folder / name))

    return act


def _bomb(bench: Bench) -> None:
    piece = gzip.compress(b" " * (64 << 20))
    bench.train(str(bench.write("rows.jsonl.gz", piece * 40)))


def _parquet(table: pyarrow.Table) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        pyarrow.parquet.write_table(table, bench.folder / "a.parquet", compression="zstd")
        bench.train(str(bench.folder / "a.parquet"))

    return act


def _tables() -> dict[str, pyarrow.Table]:
    """Return files of a few kilobytes that expand to large tables."""
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 20_000, pyarrow.int32()), ["a" * (1 << 20)]
    )
    nulls = pyarrow.ListArray.from_arrays([0, 3 << 27], pyarrow.nulls(3 << 27, pyarrow.null()))
    return {
        "20 GiB of text": pyarrow.table({"prompt": texts, "response": texts}),
        "nulls": pyarrow.table({"prompt": nulls}),
        "numbers": pyarrow.table({"prompt": [1.5], "response": [None]}),
        "bytes": pyarrow.table({"prompt": [b"\xff"], "response": [b""]}),
        "no rows": pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}),
    }


def _texts() -> list[Case]:
    found = []
    for name, text in _ODD_TEXTS.items():
        prompt = json.dumps({"prompt": text, "response": "a"}) + "\n" + _ROW
        answer = json.dumps({"prompt": "a", "response": text}) + "\n" + _ROW
        column = json.dumps({"prompt": "a", text: "b"}) + "\n"
        found += [
            Case(f"prompt: {name}", _file("rows.jsonl", prompt)),
            Case(f"response: {name}", _file("rows.jsonl", answer)),
            Case(f"column: {name}", _file("rows.jsonl", column)),
        ]
    return found


def _values() -> list[Case]:
    found = []
    for name, value in _ODD_VALUES.items():
        for column in ("prompt", "response", "messages"):
            row = {"prompt": "a", "response": "b", column: value}
            if column == "messages":
                row = {column: value}
            found.append(
                Case(f"{column} is {name}", lambda bench, row=row: bench.train([row, row]))
            )
    return found


def _files() -> list[Case]:
    contents: dict[str, tuple[str, str | bytes]] = {
        "deep line": ("a.jsonl", "[" * 200_000),
        "deep object": ("a.jsonl", '{"a":' * 100_000),
        "deep list file": ("a.json", "[" * 200_000),
        "digits": ("a.jsonl", '{"prompt": ' + "9" * 5000 + ', "response": "a"}'),
        "digits in a list": ("a.json", "[" + "9" * 5000 + "]"),
        "exponent": ("a.jsonl", '{"prompt": 1e999999, "response": "a"}'),
        "NaN": ("a.jsonl", '{"prompt": NaN, "response": "a"}'),
        "cut": ("a.jsonl", _ROW + _ROW[:-9]),
        "zeros": ("a.jsonl", b"\0" * 10_000),
        "latin": ("a.jsonl", '{"prompt": "é"}'.encode("latin-1")),
        "utf-16": ("a.jsonl", _ROW.encode("utf-16")),
        "duplicate keys": ("a.jsonl", '{"prompt": "a", "prompt": 1, "response": "b"}'),
        "empty": ("a.jsonl", ""),
        "only lines": ("a.jsonl", "\n" * 100_000),
        "csv quotes": ("a.csv", 'prompt,response\n"' + "a" * 300_000),
        "csv zeros": ("a.csv", "prompt,response\na\0,b\n"),
        "csv columns": ("a.csv", ",".join(map(str, range(5000))) + "\n1\n"),
        "csv carriage": ("a.csv", "prompt,response\ra,b\r\x1b[2J,c\n"),
        "broken gzip": ("a.jsonl.gz", b"\x1f\x8b" + b"a" * 100),
        "cut gzip": ("a.jsonl.gz", gzip.compress(_ROW.encode() * 1000)[:-20]),
        "broken parquet": ("a.parquet", b"PAR1" + b"a" * 100 + b"PAR1"),
        "empty parquet": ("a.parquet", b""),
        "suffix": ("a.xlsx", b"PK\3\4"),
        "pickle": ("a.pkl", b"cos\nsystem\n(S'touch RAN'\ntR."),
        "name with escapes": ("\x1b[2J.jsonl", "{"),
        "arrow folder": ("saved/state.json", "{"),
        "dataset folder": ("saved/dataset_dict.json", '{"splits": 7}'),
        "script folder": ("saved/saved.py", "open('RAN', 'w')"),
    }
    return [
        Case(f"file: {name}", _file(path, content) if "/" not in path else _folder(path, content))
        for name, (path, content) in contents.items()
    ]


def _folder(path: str, content: str | bytes) -> Callable[[Bench], None]:
    return lambda bench: bench.train(str(bench.write(path, content).parent))


def _mutated(seed: int, num: int) -> list[Case]:
    """Return a valid file with some bytes exchanged."""
    rng = random.Random(seed)
    good = (_ROW + '{"messages": [{"role": "user", "content": "a"}]}\n' * 2).encode()
    found = []
    for number in range(num):
        content = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(len(content))] = rng.choice(b'{}[]",:\\\x00\x1b\xff0e')
        found.append(Case(f"mutated {number}", _file("rows.jsonl", bytes(content))))
    return found


def cases(seed: int) -> list[Case]:
    """Yield all cases."""
    special = [
        Case("file: pipe", _pipe),
        Case("file: /dev/zero", _link("/dev/zero", "rows.jsonl")),
        Case("file: itself", _link("rows.jsonl", "rows.jsonl")),
        Case("file: /proc/self/mem", _link("/proc/self/mem", "rows.jsonl")),
        Case("file: gzip of 2.5 GiB", _bomb),
    ]
    tables = [Case(f"parquet: {name}", _parquet(table)) for name, table in _tables().items()]
    return [*_files(), *special, *tables, *_texts(), *_values(), *_mutated(seed, 12)]
