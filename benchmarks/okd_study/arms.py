"""One run of the study: a method, on a task, under some conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from okd_lightning.callbacks import GKD, KD, OKD, SFT, DistillationCallback
from okd_lightning.divergences import Divergence, JensenShannon, ReverseKL

Method = Callable[[float], DistillationCallback]
"""Builds a method, given the student's learning rate."""


@dataclass(frozen=True)
class Conditions:
    """Changes of a task's own settings.

    Attributes:
        num_rows: Training rows; None for the task's own.
        sharpness: Factor on the base teacher's logits: above 1 it is more certain, below 1 less.
        teacher_steps: Optimizer steps of full SFT of the teacher on the training rows before
            distillation.
        hidden_size: The student's (arithmetic only); None for the quickstart's.
    """

    num_rows: int | None = None
    sharpness: float = 1.0
    teacher_steps: int = 0
    hidden_size: int | None = None

    def __str__(self) -> str:
        parts = {
            f"{self.num_rows} rows": self.num_rows,
            f"teacher's logits ×{self.sharpness:g}": self.sharpness != 1,
            f"teacher fine-tuned {self.teacher_steps} steps": self.teacher_steps,
            f"student's width {self.hidden_size}": self.hidden_size,
        }
        return ", ".join(text for text, is_set in parts.items() if is_set)


@dataclass(frozen=True)
class Arm:
    """One run: a method on a task.

    Attributes:
        task: "tinystories", "arithmetic" or "gsm8k".
        name: Name of the method with its settings.
        method: Builds the method.
        steps: Optimizer steps.
        seed: Seed of the data order, the warm start and the online module.
        conditions: Changes of the task's settings.
    """

    task: str
    name: str
    method: Method = field(compare=False)
    steps: int
    seed: int
    conditions: Conditions = Conditions()

    @property
    def key(self) -> str:
        """Key under which the run is kept."""
        conditions = f" ({self.conditions})" if str(self.conditions) else ""
        return f"{self.task}{conditions} / {self.name} / {self.steps} steps / seed {self.seed}"


def okd(alpha: float, rate: float = 1.0, **settings: Any) -> Method:
    """Return OKD with a module learning rate relative to the student's."""
    return lambda student_rate: OKD(alpha=alpha, learning_rate=rate * student_rate, **settings)


METHODS: dict[str, Method] = {
    "SFT": lambda _: SFT(),
    "KD": lambda _: KD(),
    "KD τ=2": lambda _: KD(temperature=2.0),
    "KD τ=4": lambda _: KD(temperature=4.0),
    "KD + CE (w=0.5)": lambda _: KD(cross_entropy_weight=0.5),
    "reverse KD": lambda _: KD(divergence=ReverseKL()),
    "JSD KD": lambda _: KD(divergence=JensenShannon(0.5)),
    "GKD": lambda _: GKD(divergence=ReverseKL(), on_policy_fraction=1.0),
    "GKD forward KL": lambda _: GKD(beta=0.0, on_policy_fraction=1.0),
    "GKD forward KL λ=0.5": lambda _: GKD(beta=0.0, on_policy_fraction=0.5),
}
"""Methods without an online module.

GKD trains on on-policy samples alone unless λ is given; "GKD forward KL" is the quickstart's."""

for _alpha in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9):
    for _rate in (1.0, 0.1, 0.01):
        METHODS[f"OKD α={_alpha:g} rate×{_rate:g}"] = okd(_alpha, _rate)

_OTHERS: dict[str, Callable[[], Divergence]] = {
    "reverse KL": ReverseKL,
    "JSD": lambda: JensenShannon(0.5),
}
for _alpha in (0.3, 0.5):
    METHODS[f"OKD α={_alpha:g} rate×1 λ=0.5"] = okd(_alpha, on_policy_fraction=0.5)
    for _anchor in (0.3, 1.0):
        _held = f"OKD α={_alpha:g} rate×1 anchor {_anchor:g}"
        METHODS[_held] = okd(_alpha, anchor_weight=_anchor)
        METHODS[f"{_held} λ=0.5"] = okd(_alpha, on_policy_fraction=0.5, anchor_weight=_anchor)
    for _name, _divergence in _OTHERS.items():
        METHODS[f"OKD α={_alpha:g} rate×1 {_name}"] = okd(_alpha, divergence=_divergence())
