"""Measures of validation and test, on dataset responses and on on-policy samples.

All at temperature 1 against the base teacher, in nats per token, averaged over the loss tokens of
the whole set and all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn
from torchmetrics import MeanMetric

from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL
from okd_lightning.losses import (
    Agreement,
    CachedAgreement,
    CachedDivergence,
    DrawnLogProb,
    Entropy,
    ExactDivergence,
    Quantity,
    TeacherShift,
)

_AGAINST_TEACHER: Mapping[str, Quantity] = {
    "forward_kl": ExactDivergence(ForwardKL()),
    "reverse_kl": ExactDivergence(ReverseKL()),
    "jsd": ExactDivergence(JensenShannon(0.5)),
    "agreement": Agreement(),
}
_AGAINST_CACHED: Mapping[str, Callable[[int], Quantity]] = {
    "top_k_forward_kl": lambda k: CachedDivergence(ForwardKL(), k),
    "top_k_reverse_kl": lambda k: CachedDivergence(ReverseKL(), k),
    "top_k_jsd": lambda k: CachedDivergence(JensenShannon(0.5), k),
    "agreement": lambda k: CachedAgreement(),
}
_TEACHER_FIT: Mapping[str, Quantity] = {"teacher_cross_entropy": DrawnLogProb("teacher")}
_TEACHER_SHIFT: Mapping[str, Quantity] = {"teacher_shift": TeacherShift()}
_ON_GIVEN: Mapping[str, Quantity] = {"cross_entropy": DrawnLogProb()}
_ON_OWN: Mapping[str, Quantity] = {"entropy": Entropy()}


def measures(stage: str, is_own: bool, has_teacher: bool) -> dict[str, Quantity]:
    """Return metric name → quantity, for one kind of responses.

    Args:
        stage: "val" or "test".
        is_own: On-policy samples (``on_policy_*``), or dataset responses.
        has_teacher: Without a teacher only the student's own numbers are taken.
    """
    prefix = f"{stage}/on_policy_" if is_own else f"{stage}/"
    quantities = dict(_ON_OWN if is_own else _ON_GIVEN)
    if has_teacher:
        quantities |= _AGAINST_TEACHER if is_own else {**_AGAINST_TEACHER, **_TEACHER_FIT}
    return {prefix + name: quantity for name, quantity in quantities.items()}


def cached_measures(
    stage: str, is_own: bool, k: int, reads_new_rows: bool = False
) -> dict[str, Quantity]:
    """Return metric name → quantity, where only k ids of the teacher are known.

    ``top_k_*`` are lower bounds of the divergences in their names, computed on these ids and the
    rest; agreement is exact. On on-policy samples only the student's own numbers are taken, unless
    the teacher can score new responses.
    """
    quantities = measures(stage, is_own, has_teacher=False)
    if not is_own or reads_new_rows:
        prefix = f"{stage}/on_policy_" if is_own else f"{stage}/"
        quantities |= {prefix + name: form(k) for name, form in _AGAINST_CACHED.items()}
    return quantities


def chunk_measures(stage: str, is_own: bool, has_ids: bool = True) -> dict[str, Quantity]:
    """Return metric name → quantity, against a teacher with another tokenizer.

    ``chunk_*`` are the divergences in their names over chunks of text (``losses.chunked``), in nats
    per token of the student.

    Args:
        stage: "val" or "test".
        is_own: On-policy samples, or dataset responses.
        has_ids: Whether the teacher gives log-probabilities of ids, and not of outcomes alone.
    """
    prefix = f"{stage}/on_policy_chunk_" if is_own else f"{stage}/chunk_"
    names = ("forward_kl", "reverse_kl", "jsd")
    own = measures(stage, is_own, has_teacher=False)
    fit = {f"{stage}/{name}": q for name, q in _TEACHER_FIT.items()}
    fit = fit if has_ids and not is_own else {}
    return own | fit | {prefix + name: _AGAINST_TEACHER[name] for name in names}


def adapted_chunk_measures(stage: str) -> dict[str, Quantity]:
    """Return metric name → quantity, of the adapted teacher with another tokenizer (OKD)."""
    quantities = {**_TEACHER_FIT, **_TEACHER_SHIFT}
    return {f"{stage}/adapted_{name}": quantity for name, quantity in quantities.items()}


def adapted_measures(stage: str) -> dict[str, Quantity]:
    """Return metric name → quantity, against the adapted teacher on dataset responses (OKD).

    ``adapted_teacher_shift`` is KL(base‖adapted): the change of the teacher by its online module.
    """
    quantities = {**_AGAINST_TEACHER, **_TEACHER_FIT, **_TEACHER_SHIFT}
    return {f"{stage}/adapted_{name}": quantity for name, quantity in quantities.items()}


def measure_metrics(num_teachers: int = 0) -> nn.ModuleDict:
    """Return a running mean for every measure; Lightning resets, reduces and logs them.

    Args:
        num_teachers: Teachers that have means of their own, ``NAME/NUMBER``.
    """
    names = dict.fromkeys(
        name
        for stage in ("val", "test")
        for is_own in (False, True)
        for name in {
            **measures(stage, is_own, has_teacher=True),
            **cached_measures(stage, is_own, k=1, reads_new_rows=True),
            **adapted_measures(stage),
            **chunk_measures(stage, is_own),
        }
    )
    of_teachers = [f"{name}/{number}" for name in names for number in range(num_teachers)]
    return nn.ModuleDict(
        {name: MeanMetric(nan_strategy="disable") for name in (*names, *of_teachers)}
    )
