"""The embedded task: running totals of five one-digit numbers, with every total written out.

``7+8-5+9-3=`` has the answer ``15;10;19;16``. Owns the problems, their exact check and the files
made of them; does not know tokens or models. All of it is a function of seeds: ``python -m
okd_lightning.commands.quickstart.task DIR`` writes the committed ``train.jsonl`` and ``val.jsonl``
again, and the teacher's own, larger training set next to them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

NUM_TERMS = 5
"""One-digit numbers in a problem; its answer holds one running total less."""

VAL_SEED, TRAIN_SEED, TEACHER_SEED = 1, 2, 3
"""Seeds of the three sets."""

NUM_VAL, NUM_TRAIN, NUM_TEACHER = 512, 400, 200_000
"""Problems in the three sets: none is in two of them."""

_PROMPT = re.compile(rf"\d(?:[+-]\d){{{NUM_TERMS - 1}}}=")
_TERM = re.compile(r"[+-]?\d")


@dataclass(frozen=True)
class Problem:
    """One problem with its answer.

    Attributes:
        prompt: ``NUM_TERMS`` digits joined by ``+`` and ``-``, closed by ``=``.
        response: The running totals from the second number on, joined by ``;``.
    """

    prompt: str
    response: str


def running_totals(terms: Sequence[int]) -> list[int]:
    """Return the sums of the first two, three, ... of ``terms``."""
    totals = [terms[0]]
    for term in terms[1:]:
        totals.append(totals[-1] + term)
    return totals[1:]


def solve(prompt: str) -> str:
    """Return the only right response to ``prompt``.

    Raises:
        ValueError: ``prompt`` is not a problem of this task.
    """
    if _PROMPT.fullmatch(prompt) is None:
        raise ValueError(
            f"got the prompt {prompt!r}; expected {NUM_TERMS} one-digit numbers joined by + and -, "
            "then =, such as '7+8-5+9-3='"
        )
    return ";".join(map(str, running_totals([int(term) for term in _TERM.findall(prompt)])))


def is_exact_match(prompt: str, response: str) -> bool:
    """Return whether ``response`` is right in every character: all totals, not only the last."""
    return response == solve(prompt)


def draw_problem(rng: random.Random) -> Problem:
    """Draw one problem: digits 1 to 9, no total below zero.

    A term is subtracted with probability one half where that leaves the total at zero or above, and
    added otherwise. Only ``rng.random`` is used, whose stream is the same on every Python.
    """
    total = 1 + int(9 * rng.random())
    prompt = str(total)
    for _ in range(NUM_TERMS - 1):
        digit = 1 + int(9 * rng.random())
        is_minus = rng.random() < 0.5 and digit <= total
        prompt += f"{'-' if is_minus else '+'}{digit}"
        total += -digit if is_minus else digit
    prompt += "="
    return Problem(prompt, solve(prompt))


def draw_problems(num: int, seed: int, exclude: Collection[Problem] = ()) -> list[Problem]:
    """Draw ``num`` different problems.

    Args:
        num: How many.
        seed: Determines them: the first n of a longer list are the shorter list.
        exclude: Problems that must not be among them.
    """
    rng = random.Random(seed)
    taken = set(exclude)
    problems: list[Problem] = []
    while len(problems) < num:
        problem = draw_problem(rng)
        if problem not in taken:
            taken.add(problem)
            problems.append(problem)
    return problems


def val_problems() -> list[Problem]:
    """Return the problems that every number of the quickstart is measured on."""
    return draw_problems(NUM_VAL, VAL_SEED)


def train_problems() -> list[Problem]:
    """Return the few problems of the student's warm start and distillation."""
    return draw_problems(NUM_TRAIN, TRAIN_SEED, exclude=val_problems())


def teacher_problems(num: int = NUM_TEACHER) -> list[Problem]:
    """Return the teacher's training problems, disjoint from both other sets."""
    return draw_problems(num, TEACHER_SEED, exclude=[*val_problems(), *train_problems()])


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write JSON lines with the columns ``prompt`` and ``response``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(problem)) + "\n" for problem in problems)


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``train.jsonl``, ``val.jsonl`` and ``teacher_train.jsonl`` into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("--num-teacher", type=int, default=NUM_TEACHER, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    write_problems(arguments.out / "train.jsonl", train_problems())
    write_problems(arguments.out / "val.jsonl", val_problems())
    write_problems(arguments.out / "teacher_train.jsonl", teacher_problems(arguments.num_teacher))


if __name__ == "__main__":
    main()
