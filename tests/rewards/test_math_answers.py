"""Mathematical answers: what is the same, what is not, and what takes too long.

* What people write for one number is one answer; other numbers are other answers.
* All reference answers of GSM8K's test set match themselves in every form, and none of theirs that
  was changed.
* It works in threads and in a forked process, leaves alarms alone, and outlives a comparison that
  does not end; a process that cannot start is an error, not a wrong answer.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest

from okd_lightning.errors import ConfigError, OKDLightningError
from okd_lightning.rewards import AnswerMatch, math_answers
from okd_lightning.rewards.answers import answer_pattern, matches
from okd_lightning.rewards.math_answers import is_same_answer

SAME = [
    ("#### 1,234", "1234.00"),
    ("#### $1,080,000", "1080000"),
    (r"The answer is $\frac12$", "0.5"),
    (r"so \boxed{\frac{1}{2}}", "#### 1/2"),
    (r"#### \frac12", "0.5"),
    ("so he pays $18.50 dollars", "#### 18.5"),
    ("#### 72 apples", "72"),
    ("#### 5 (five)", "5"),
    ("12 km/h", "12"),
    (r"\boxed{5\text{ cm}}", "5"),
    ("x=5", "5"),
    ("#### 2x+1", "1+2x"),
    (r"\sqrt{2}", "$2^{1/2}$"),
    ("(1,2)", "(1, 2)"),
    ("5%", "5"),
    ("#### 1/3", "0.3333333"),
    ("three", "three"),
]
OTHER = [
    ("#### -7", "7"),
    ("#### 2x+1", "2x+5"),
    ("(1,2)", "(1,3)"),
    ("10:30", "10:45"),
    ("three", "four"),
    ("", "5"),
    ("no number", "5"),
    ("#### 7 and then #### 8", "#### 7"),
]


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same(answer, reference):
    assert matches(answer, reference, compare="math")


@pytest.mark.parametrize(("answer", "reference"), OTHER)
def test_another(answer, reference):
    assert not matches(answer, reference, compare="math")


def test_a_pattern_says_where_the_answer_stands():
    pattern = answer_pattern("<answer>(.*?)</answer>")
    right = "<answer>1,000</answer> and 7"
    assert matches(right, "<answer>1000.0</answer>", pattern, "math")
    assert not matches(right, "<answer>1000.0</answer>", pattern)
    assert not matches("1000", "<answer>1000</answer>", pattern, "math")


def test_a_reference_without_an_answer_scores_nothing():
    marked = AnswerMatch("#### (.+)")
    found = marked(["", ""], ["#### 3", "3"], ["#### 3", "3"])
    assert found[0] == 1.0
    assert math.isnan(found[1])
    optional = answer_pattern(r"(?:answer: (\d+)|none)")
    assert matches("answer: 3, none", "answer: 3", optional)
    assert not matches("none", "answer: 3", optional)


def test_gsm8k(shared_data):
    """1,319 references; a sample of 1 in 10 is changed in five ways."""
    lines = (shared_data / "datasets/gsm8k/test.jsonl").read_text().splitlines()
    references = [json.loads(line)["answer"] for line in lines]
    assert len(references) == 1319
    assert all(is_same_answer(text, text) for text in references)
    num_rejected = num_changed = 0
    for text in references[::10]:
        body, _, answer = text.rpartition("#### ")
        number = float(answer.replace(",", ""))
        for form in (
            rf"so \boxed{{{answer}}}.",
            f"The answer is ${number:,.2f}.",
            f"{body}{number}",
        ):
            assert matches(form, text, compare="math"), form
        for other in (number + 1, -number, 10 * number, number + 0.5, number / 7):
            if other != number:
                num_changed += 1
                num_rejected += not matches(f"{body}#### {other:,}", text, compare="math")
    assert num_rejected == num_changed > 600


def test_what_takes_too_long_is_no_match_and_costs_the_next_nothing(monkeypatch):
    assert not is_same_answer("$9^{9^9}$", "5")
    assert is_same_answer("5", "5.0")
    monkeypatch.setattr(math_answers, "_SECONDS", 0.2)  # before the library's own limit
    assert not is_same_answer("$9^{9^9}$", "5")
    monkeypatch.undo()
    assert is_same_answer("5", "5.0")


def test_in_threads_and_next_to_an_alarm():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        found = []
        threads = [
            threading.Thread(target=lambda n=n: found.append(is_same_answer(f"{n}.0", str(n))))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [True] * 8
        while not rung:
            signal.pause()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert rung == [1]


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_fork_asks_a_process_of_its_own():
    assert is_same_answer("1", "1.0")
    child = os.fork()
    if child == 0:
        is_right = is_same_answer("2", "2.0") and not is_same_answer("2", "3")
        math_answers._worker(os.getpid()).close()
        os._exit(0 if is_right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert is_same_answer("3", "3.0")


def test_a_process_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "worker.py"
    broken.write_text("raise SystemExit(1)\n")
    monkeypatch.setattr(math_answers, "_PROGRAM", broken)
    with pytest.raises(OKDLightningError, match="math-verify does not start"):
        math_answers._Worker().ask("1", "2")


def test_an_unknown_way_to_compare_is_refused():
    from okd_lightning.callbacks import ExactMatch

    with pytest.raises(ConfigError, match="compare is 'maths'; expected one of text, math"):
        ExactMatch(compare="maths")


def test_the_program_imports_nothing_of_ours():
    """The program starts within a second and needs no torch."""
    assert "okd_lightning" not in Path(math_answers._PROGRAM).read_text()
