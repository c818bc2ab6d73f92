"""Runs of each table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from opd_study.arms import (
    DIVERGENCES,
    FORWARD,
    JSD,
    REVERSE,
    Arm,
    gkd,
    on_arithmetic,
    opd,
    opd_plus,
)

_CLIP = 6.0
_REWARD = {
    "class_path": "Reward",
    "init_args": {"function": "AnswerMatch", "baseline": "leave_one_out"},
}


def collapse() -> Iterator[Arm]:
    """Yield stopped reward, correction and exact loss; OPD+ with reverse KL is in ``variants``."""
    yield from (opd(divergence) for divergence in DIVERGENCES)
    yield from (opd_plus(divergence) for divergence in (FORWARD, JSD))
    yield from (gkd(divergence) for divergence in DIVERGENCES)


def half() -> Iterator[Arm]:
    """Yield the arms of ``collapse`` in 100 steps."""
    arms = [opd(FORWARD), opd(JSD), opd_plus(FORWARD), opd_plus(JSD), opd(REVERSE)]
    arms += [opd_plus(REVERSE, "value_baseline"), *(gkd(d) for d in DIVERGENCES)]
    yield from (replace(arm, steps=100) for arm in arms)


def clipped() -> Iterator[Arm]:
    """Yield arms with ln u clipped to ±6."""
    arms = [opd(FORWARD, _CLIP), opd(JSD, _CLIP), opd(REVERSE, _CLIP)]
    arms += [opd_plus(FORWARD, clip=_CLIP)]
    yield from (replace(arm, steps=100) for arm in arms)


def variants() -> Iterator[Arm]:
    """Yield the variants of OPD+ whose advantages differ.

    Centred reverse KL is OPD's; centred forward KL has value zero (E_p[u] = 1), so it equals its
    value_baseline; JSD is centred as published.
    """
    arms = [opd_plus(REVERSE, "value_baseline"), opd_plus(JSD, "value_baseline")]
    arms += [opd_plus(divergence, "as_published") for divergence in (REVERSE, FORWARD)]
    yield from (replace(arm, steps=100) for arm in arms)


def tighter() -> Iterator[Arm]:
    """Yield arms with a clip that acts often."""
    yield replace(opd_plus(FORWARD, clip=2.0), steps=100)
    yield replace(opd_plus(REVERSE, "value_baseline", clip=2.0), steps=100)


def slower() -> Iterator[Arm]:
    """Yield arms with a third of the learning rate."""
    for arm in (opd(REVERSE), opd_plus(REVERSE, "value_baseline"), opd_plus(FORWARD)):
        yield replace(arm, rate=3e-4, steps=100)


def larger() -> Iterator[Arm]:
    """Yield arms of 64 rows per step, 80 steps."""
    arms = [opd(REVERSE), opd_plus(REVERSE, "value_baseline"), opd_plus(JSD, "value_baseline")]
    arms += [opd_plus(FORWARD), gkd(REVERSE)]
    yield from (replace(arm, rows=64, steps=80, rate=3e-4) for arm in arms)


def samples() -> Iterator[Arm]:
    """Yield an arm with four responses per prompt."""
    yield replace(opd_plus(REVERSE, "value_baseline"), samples=4, steps=100)


def arithmetic() -> Iterator[Arm]:
    """Yield arms on the quickstart's task: stopped reward, correction, exact loss."""
    arms = [opd_plus(REVERSE, "value_baseline"), opd_plus(JSD), opd(JSD), gkd(REVERSE)]
    arms += [opd_plus(REVERSE, "value_baseline", _CLIP), opd(REVERSE), opd_plus(FORWARD)]
    arms += [opd(FORWARD), gkd(FORWARD), gkd(JSD)]
    yield from map(on_arithmetic, arms)


def hotter() -> Iterator[Arm]:
    """Yield arms on arithmetic at the quickstart's learning rate."""
    arms = [opd(REVERSE), opd_plus(REVERSE, "value_baseline"), gkd(REVERSE)]
    yield from (on_arithmetic(arm, rate=1e-2) for arm in arms)


def rewards() -> Iterator[Arm]:
    """Yield arms with a verifiable reward alone and with OPD+, four samples per prompt."""
    alone = ("--method", "Reward", "--method.function", "AnswerMatch")
    alone += ("--method.baseline", "leave_one_out")
    beside = opd_plus(REVERSE, "value_baseline")
    both = (*beside.options, f"--trainer.callbacks+={_REWARD}")
    arms = [
        Arm("arithmetic", f"{beside.name} + Reward", both),
        Arm("arithmetic", "Reward AnswerMatch", alone),
        beside,
    ]
    yield from (replace(on_arithmetic(arm), samples=4) for arm in arms)


def compositions() -> Iterator[Arm]:
    """Yield the packaged overlays and their parts."""
    for name, options in {
        "OKD + OPD+": ("--config", "overlays/okd_opd_plus"),
        "OKD": ("--method", "OKD"),
        "KD": ("--method", "KD"),
    }.items():
        yield on_arithmetic(Arm("arithmetic", name, options))
    mixed = Arm(
        "arithmetic",
        "KD + OPD+ value_baseline + reward",
        ("--config", "overlays/kd_opd_plus_reward"),
    )
    yield replace(on_arithmetic(mixed), samples=4)


STAGES: dict[str, Callable[[], Iterator[Arm]]] = {
    stage.__name__: stage
    for stage in (
        collapse,
        half,
        variants,
        larger,
        arithmetic,
        rewards,
        clipped,
        tighter,
        slower,
        samples,
        compositions,
        hotter,
    )
}
