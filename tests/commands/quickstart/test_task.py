"""Semantics frozen here: the form of a problem, its answer, and disjoint sets.

* The response holds every running total from the second number on; one wrong character is wrong.
* Totals never fall below zero; digits are 1 to 9.
* The sets are functions of their seeds, and the committed files are exactly what they make.
"""

import itertools
import json
import random
from pathlib import Path

import pytest

from okd_lightning.commands.quickstart import task


def _reference_answer(prompt):
    """Compute the answer by Python's arithmetic on every prefix that ends in a digit."""
    expression = prompt.removesuffix("=")
    return ";".join(str(eval(expression[:end])) for end in range(3, len(expression) + 1, 2))


def test_the_example_of_the_documentation():
    assert task.solve("7+8-5+9-3=") == "15;10;19;16"


def test_answers_agree_with_pythons_arithmetic():
    for problem in task.draw_problems(500, seed=11):
        assert problem.response == _reference_answer(problem.prompt)


def test_digits_and_totals_stay_in_range():
    problems = task.draw_problems(2000, seed=12)
    digits = {c for p in problems for c in p.prompt if c.isdigit()}
    totals = {int(total) for p in problems for total in p.response.split(";")}
    assert digits == set("123456789")
    assert min(totals) == 0
    assert max(totals) <= 45
    assert {c for p in problems for c in p.prompt} - digits == set("+-=")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("15;10;19;16", True),
        ("15;10;19;17", False),
        ("14;10;19;16", False),
        ("15;10;19;16;", False),
        ("15;10;19", False),
        ("16", False),
        ("", False),
    ],
)
def test_exact_match_needs_every_character(response, expected):
    assert task.is_exact_match("7+8-5+9-3=", response) is expected


@pytest.mark.parametrize(
    "prompt", ["", "7+8=", "7+8-5+9-3", "17+8-5+9-3=", "7*8-5+9-3=", "-7+8-5+9-3="]
)
def test_a_prompt_of_another_form_is_refused(prompt):
    with pytest.raises(ValueError, match="expected 5 one-digit numbers"):
        task.solve(prompt)


def test_a_shorter_list_is_the_start_of_a_longer_one():
    assert task.draw_problems(10, seed=5) == task.draw_problems(50, seed=5)[:10]
    assert task.draw_problems(10, seed=5) != task.draw_problems(10, seed=6)


def test_problems_are_different_and_keep_clear_of_the_excluded():
    first = task.draw_problems(300, seed=1)
    second = task.draw_problems(300, seed=1, exclude=first)
    assert len(set(first)) == len(set(first + second)) - 300 == 300


def test_the_three_sets_are_apart():
    sets = [set(task.val_problems()), set(task.train_problems()), set(task.teacher_problems(5000))]
    assert [len(s) for s in sets] == [task.NUM_VAL, task.NUM_TRAIN, 5000]
    for one, other in itertools.combinations(sets, 2):
        assert not one & other


def test_drawing_uses_nothing_but_its_generator():
    random.seed(0)
    before = random.getstate()
    assert task.draw_problem(random.Random(3)) == task.draw_problem(random.Random(3))
    assert random.getstate() == before


def test_the_committed_files_are_what_the_seeds_make(tmp_path):
    task.main([str(tmp_path), "--num-teacher", "7"])
    committed = Path(task.__file__).parent / "data"
    for name in ("train.jsonl", "val.jsonl"):
        assert (tmp_path / name).read_bytes() == (committed / name).read_bytes()
    written = (tmp_path / "teacher_train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) == 7
    assert all(task.is_exact_match(**row) and set(row) == {"prompt", "response"} for row in rows)
