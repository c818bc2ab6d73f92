"""The files of the test suite itself.

Frozen here: no two modules have one name, as pytest imports them without their folders; files that
are listed elsewhere (the longest ones, those of the Makefile's shorter runs) exist.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path

from longest_files import LONGEST, place_of

TESTS = Path(__file__).parent


def test_no_two_modules_have_one_name():
    found = collections.defaultdict(list)
    for path in TESTS.rglob("*.py"):
        if path.name != "conftest.py":
            found[path.name].append(str(path.relative_to(TESTS)))
    assert [paths for paths in found.values() if len(paths) > 1] == []


def test_the_longest_files_exist_and_are_listed_once():
    assert [place_of(TESTS / name) for name in LONGEST] == list(range(len(LONGEST)))
    assert [name for name in LONGEST if not (TESTS / name).is_file()] == []


def test_files_of_the_shorter_runs_exist():
    text = (TESTS.parent / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    lists = re.findall(r"^(NUMERIC|VERSIONED) := (.*)$", text, flags=re.MULTILINE)
    assert [name for name, _ in lists] == ["NUMERIC", "VERSIONED"]
    for _, words in lists:
        for prefix, names in _named(words):
            missing = [n for n in names if not (TESTS / f"{prefix}{n}").exists()]
            assert missing == []


def _named(words: str) -> list[tuple[str, list[str]]]:
    """What a list of the Makefile names: (prefix below tests/, names)."""
    groups = re.findall(r"\$\(addprefix ([\w/]+),([^)]*)\)", words)
    rest = re.sub(r"\$\(addprefix [^)]*\)", "", words)
    found = [(prefix.removeprefix("tests/"), names.split()) for prefix, names in groups]
    return [*found, ("", rest.split())]
