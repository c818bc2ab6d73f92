"""Runs of each table; a stage is one table or one series of tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from okd_study.arms import METHODS, Arm, Conditions

BASELINES = ("SFT", "KD", "reverse KD", "GKD")
PACED = ("KD", "reverse KD", "GKD", "GKD forward KL", "OKD α=0.3 rate×1")
"""Compared at equal seconds; the last one sets them."""

_COMPARED = ("KD", "OKD α=0.3 rate×1", "OKD α=0.5 rate×1")
_GRID: dict[str, tuple[tuple[int | None, int | None], tuple[float, float]]] = {
    "tinystories": ((None, 128), (1.0, 3.0)),
    "arithmetic": ((None, 19_200), (1.0, 0.3)),
    "gsm8k": ((None, 128), (1.0, 3.0)),
}

Stage = Callable[[str, int, int], Iterator[Arm]]


def arms_of(
    names: Iterable[str], task: str, steps: int, seed: int, conditions: Conditions | None = None
) -> Iterator[Arm]:
    """Yield one arm per method."""
    for name in names:
        yield Arm(task, name, METHODS[name], steps, seed, conditions or Conditions())


def main(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield the baselines, and OKD over α and the module's learning rate."""
    adaptive = [f"OKD α={a:g} rate×{r:g}" for r in (1, 0.1, 0.01) for a in (0, 0.1, 0.3, 0.5)]
    yield from arms_of((*BASELINES, *adaptive), task, steps, seed)


def ablation(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield a small version of Table V: three divergences with and without the online module."""
    for alone, suffix in (("KD", ""), ("reverse KD", " reverse KL"), ("JSD KD", " JSD")):
        adaptive = [f"OKD α={alpha:g} rate×1{suffix}" for alpha in (0.3, 0.5)]
        yield from arms_of((alone, *adaptive), task, steps, seed)


def controls(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield runs with a teacher softened without learning (τ), and with α above one half."""
    adaptive = [f"OKD α={alpha:g} rate×1" for alpha in (0.5, 0.7, 0.9)]
    yield from arms_of(("KD", *adaptive, "KD τ=2", "KD τ=4"), task, steps, seed)


def shift(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield runs with a teacher new to the task: with a module, or fine-tuned first."""
    plain = ("SFT", "KD", "KD + CE (w=0.5)", "OKD α=0 rate×1", "OKD α=0.1 rate×1")
    yield from arms_of((*plain, "OKD α=0.5 rate×1", "OKD α=0.1 rate×0.1"), task, steps, seed)
    tuned = Conditions(teacher_steps=400)
    names = ("KD", "KD + CE (w=0.5)", "OKD α=0.1 rate×1", *_COMPARED[1:])
    yield from arms_of(names, task, steps, seed, tuned)


def grid(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield runs on few rows read often or many read once, with a certain or a soft teacher."""
    rows, sharpness = _GRID[task]
    for num_rows in rows:
        for factor in sharpness:
            yield from arms_of(_COMPARED, task, steps, seed, Conditions(num_rows, factor))


def size(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield runs with students of half the quickstart's width, its own, and the teacher's."""
    for width in (16, None, 64):
        yield from arms_of(_COMPARED, task, steps, seed, Conditions(hidden_size=width))


def rollouts(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield runs with the module on on-policy samples."""
    own = [f"OKD α={alpha:g} rate×1 λ=0.5" for alpha in (0.3, 0.5)]
    names = (*_COMPARED, "GKD forward KL λ=0.5", "GKD forward KL", *own)
    yield from arms_of(names, task, steps, seed)


def anchored(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield runs with the anchor to the base teacher, on dataset and on-policy responses."""
    held = [
        f"OKD α=0.3 rate×1 anchor {weight:g}{own}" for own in ("", " λ=0.5") for weight in (0.3, 1)
    ]
    yield from arms_of((*_COMPARED, "GKD forward KL λ=0.5", *held), task, steps, seed)


def paced(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Yield the methods at equal steps that ``equal_seconds`` compares again."""
    yield from arms_of(PACED, task, steps, seed)


def equal_seconds(
    task: str, steps: int, seed: int, relative_seconds: dict[str, float]
) -> Iterator[Arm]:
    """Yield the methods with as many steps as fit in the time of ``steps`` of the last method."""
    for name in PACED:
        yield from arms_of([name], task, max(1, round(steps / relative_seconds[name])), seed)


STAGES: dict[str, Stage] = {
    "main": main,
    "ablation": ablation,
    "controls": controls,
    "shift": shift,
    "grid": grid,
    "size": size,
    "rollouts": rollouts,
    "anchored": anchored,
    "equal-steps": paced,
}
"""Stage by name; "equal-seconds" needs measured seconds as well."""
