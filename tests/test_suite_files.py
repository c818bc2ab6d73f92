"""The files of the test suite itself.

Frozen here: folders mirror those of the package; no two modules have one name, as pytest imports
them without their folders; files that are listed elsewhere (the longest ones, those of the
Makefile's shorter runs) exist.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path

from longest_files import LONGEST, place_of

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "okd_lightning"

OF_THE_REPOSITORY = {"docs", "fuzz", "golden", "real_vllm"}
"""Folders of tests that are not of one package."""

OF_ALL_PACKAGES = {
    *("language", "layers", "markup", "printable", "soak", "suite_files", "versions"),
    "vllm_servers",
}
"""Tests on the ground floor that are not of one module of the package's ground floor."""


def test_folders_mirror_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    others = {f for f in folders if f.parts and f.parts[0] not in OF_THE_REPOSITORY}
    assert {f for f in others if not (PACKAGE / f / "__init__.py").is_file()} == set()


def test_loose_files_are_of_loose_modules():
    loose = {path.stem.removeprefix("test_") for path in TESTS.glob("test_*.py")}
    assert {n for n in loose - OF_ALL_PACKAGES if not (PACKAGE / f"{n}.py").is_file()} == set()


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
    """Return the entries of a Makefile list: (prefix below tests/, names)."""
    groups = re.findall(r"\$\(addprefix ([\w/]+),([^)]*)\)", words)
    rest = re.sub(r"\$\(addprefix [^)]*\)", "", words)
    found = [(prefix.removeprefix("tests/"), names.split()) for prefix, names in groups]
    return [*found, ("", rest.split())]
