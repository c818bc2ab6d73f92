"""A sample of the hostile inputs of ``fuzz_program``; the whole runs by command (``make fuzz``).

Frozen here: the sample trains or is refused in one printable line, and the program tells a case
that does not hold: another exception, a program that was run, a hang, a killed process, a terminal
that is steered.
"""

from __future__ import annotations

import os
import time

import pytest
from fuzz_program import Bench, Case, run_case, run_kind

SAMPLE = {
    "rows": ("file: deep line", "file: digits", "file: pipe", "prompt: escapes"),
    "templates": ("self", "repeated text", "globals"),
    "model_folders": ("config: many layers", "config: deep", "tokenizer: type", "config: code"),
    "server_answers": ("engine: large id", "teacher: no mass", "raw: NaN", "tokens: deep"),
    "valid_options": ("option set 132",),
    "invalid_options": ("huge adapter", "config: code", "junk", "--lmbda"),
    "configs": ("config: a billion merges", "config: tag", "pattern: nested repetition"),
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_holds(kind, tmp_path):
    outcomes = list(run_kind(kind, seed=0, folder=tmp_path, names=SAMPLE[kind]))
    assert len(outcomes) == len(SAMPLE[kind])
    assert not [outcome for outcome in outcomes if not outcome.holds]


def _raise(bench: Bench) -> None:
    raise RuntimeError("x")


def _loop(bench: Bench) -> None:
    while True:
        pass


BAD = (
    ("unexpected", _raise),
    ("program-run", lambda bench: bench.mark.touch()),
    ("hang", lambda bench: time.sleep(99)),
    ("hang", _loop),
    ("killed", lambda bench: os.kill(os.getpid(), 9)),
    ("steers", lambda bench: os.write(1, b"\x1b[2J") and None),
)


@pytest.mark.parametrize(("verdict", "act"), BAD)
def test_what_does_not_hold_is_told(verdict, act, tmp_path):
    outcome = run_case(Case("x", act), Bench(tmp_path / "x", tmp_path), seconds=0.25)
    assert outcome.verdict == verdict
    assert not outcome.holds
