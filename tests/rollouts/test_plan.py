"""Sources of the rows of an optimizer step.

Frozen here: GKD's random choice is a function of (seed, step), all rows of a step share it, and its
frequency is the share that was asked for; terms that disagree get both kinds of rows in every step;
a term whose source nobody produces, and terms that contradict each other, are refused by name.
"""

from __future__ import annotations

import itertools

import pytest

from okd_lightning.callbacks import GKD, KD, SFT, DivergenceCallback, OPDPlus, Stage
from okd_lightning.callbacks.methods.base import Method
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.rollouts import RolloutPlan, StagedPlan, plan_for


def coins(fraction: float, seed: int, num: int = 4000) -> list[str]:
    plan = RolloutPlan(fraction)
    return [plan.assign(seed, step, 1)[0] for step in range(num)]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_frequency_of_the_random_choice(fraction):
    share = coins(fraction, seed=3).count("student") / 4000
    deviation = (fraction * (1 - fraction) / 4000) ** 0.5
    assert abs(share - fraction) <= 4 * deviation


def test_the_random_choice_is_a_function_of_seed_and_step():
    assert coins(0.5, 3) == coins(0.5, 3)
    agreeing = sum(a == b for a, b in zip(coins(0.5, 3), coins(0.5, 4), strict=True))
    assert 1800 < agreeing < 2200
    runs = coins(0.5, 3)
    switches = sum(a != b for a, b in itertools.pairwise(runs))
    assert 1850 < switches < 2150


def test_all_rows_of_a_step_share_the_random_choice():
    plan = RolloutPlan(0.5, "teacher")
    found = [set(plan.assign(1, step, 12)) for step in range(50)]
    assert all(len(sources) == 1 for sources in found)
    assert set.union(*found) == {"student", "teacher"}


@pytest.mark.parametrize(("fraction", "num"), [(0.5, 8), (0.5, 7), (0.25, 8), (0.1, 20), (0.9, 5)])
def test_mixed_steps_hold_both_kinds_spread_out(fraction, num):
    assigned = RolloutPlan(fraction, "dataset", is_mixed_within_step=True).assign(0, 0, num)
    for i in range(num):  # at every point, the share so far is right to one row
        assert abs(assigned[: i + 1].count("student") - fraction * (i + 1)) < 1


@pytest.mark.parametrize("num", [1, 3])
def test_mixed_steps_prefer_nobody(num):
    """With one prompt per step, or an odd number, each kind of row has its share over the run."""
    plan = RolloutPlan(0.5, "dataset", is_mixed_within_step=True)
    rows = [source for step in range(400) for source in plan.assign(0, step, num)]
    assert abs(rows.count("student") / len(rows) - 0.5) < 0.06


@pytest.mark.parametrize(
    ("asked", "expected"), [((0.0, 1.0), 0.5), ((0.0, 0.9), 0.9), ((0.3, 1.0), 0.3)]
)
def test_methods_that_disagree_share_every_step(asked, expected):
    terms = [Taker(("dataset", "student"), share, f"taker{share}") for share in asked]
    assert plan_for(terms) == StagedPlan(((0, RolloutPlan(expected, "dataset", True)),))


def test_two_shares_between_are_refused():
    terms = [Taker(("dataset", "student"), share, f"taker{share}") for share in (0.3, 0.7)]
    with pytest.raises(ConfigError, match="different on_policy_fractions"):
        plan_for(terms)


def Taker(sources, on_policy_fraction=None, name="taker", **more) -> Term:
    """A term that takes what it gets from one source."""
    more["on_policy_fraction"] = on_policy_fraction
    return Term(name, sources, (), lambda measured: None, lambda step: 1.0, **more)


def terms_of(given) -> list[Term]:
    return [term for one in given for term in (one.terms if isinstance(one, Method) else (one,))]


PLANS = {
    "SFT": ([SFT()], RolloutPlan(0.0)),
    "KD": ([KD()], RolloutPlan(0.0)),
    "seq_kd": ([KD(seq_kd=True)], RolloutPlan(0.0, "teacher")),
    "GKD": ([GKD(on_policy_fraction=0.3)], RolloutPlan(0.3)),
    "GKD, teacher": ([GKD(seq_kd=True)], RolloutPlan(0.5, "teacher")),
    "on-policy": ([GKD(on_policy_fraction=1.0)], RolloutPlan(1.0)),
    "one coin for both": ([GKD(), DivergenceCallback(on_policy_fraction=0.5)], RolloutPlan(0.5)),
    "both kinds": ([KD(), GKD(on_policy_fraction=1.0)], RolloutPlan(0.5, "dataset", True)),
    "one method, both kinds": (
        [Taker(("teacher", "student"), 0.3, mixes_rows=True)],
        RolloutPlan(0.3, "teacher", True),
    ),
    "takes what comes": ([GKD(on_policy_fraction=0.3), Taker(("student",))], RolloutPlan(0.3)),
}


@pytest.mark.parametrize("case", PLANS)
def test_the_plan_of_a_run(case):
    given, expected = PLANS[case]
    terms = terms_of(given)
    assert plan_for(terms) == StagedPlan(((0, expected),))
    assert plan_for(terms[::-1]) == plan_for(terms)


def test_stages_follow_one_another():
    """SFT, then GKD, then both KD and a method on rollouts; a window is closed on the left."""
    terms = [
        Stage(SFT(), end=3),
        Stage(GKD(on_policy_fraction=0.3), start=3, end=5),
        Stage(OPDPlus(), start=5),
        Stage(KD(), start=5, end=7),
    ]
    plan = plan_for(terms_of(terms))
    assert plan.stages == (
        (0, RolloutPlan(0.0)),
        (3, RolloutPlan(0.3)),
        (5, RolloutPlan(0.5, "dataset", True)),
        (7, RolloutPlan(1.0)),
    )
    assert plan.sources == {"dataset", "student"}
    found = [plan.assign(1, step, 4) for step in range(9)]
    assert found[:3] == [("dataset",) * 4] * 3
    assert found[3:5] == [RolloutPlan(0.3).assign(1, step, 4) for step in (3, 4)]
    assert all(sorted(set(row)) == ["dataset", "student"] for row in found[5:7])
    assert found[7:] == [("student",) * 4] * 2


def test_a_share_that_changes():
    """The random number of a step is the same, and it is compared with that step's share."""
    varying = Taker(("dataset", "student"), 0.5, share_at=lambda step: step / 100)
    plan = plan_for([varying, Taker(("student",))])
    found = [plan.assign(3, step, 1) for step in range(100)]
    assert found == [RolloutPlan(step / 100).assign(3, step, 1) for step in range(100)]
    assert found[0] == ("dataset",)
    assert len(set(found)) == 2
    mixed = plan_for([Taker(("dataset", "student"), 0.5, "a", mixes_rows=True), varying])
    assert mixed.assign(3, 25, 8).count("student") == 2
    with pytest.raises(ConfigError, match="two methods change the student's share"):
        plan_for([varying, varying])


class Both(DivergenceCallback):
    mixes_rows = True

    def share_at(self, step: int) -> float:
        return step / 100


def test_a_stage_hands_on_how_rows_are_mixed():
    method = Both(on_policy_fraction=0.5)
    expected = RolloutPlan(0.5, "dataset", True, method.share_at)
    assert plan_for(terms_of([Stage(method, end=3), Stage(SFT(), start=3)])).stages == (
        (0, expected),
        (3, RolloutPlan(0.0)),
    )


def test_a_weight_changes_on_a_line():
    stage = Stage(KD(weight=2.0), start=2, end=5, first_factor=1.0, last_factor=0.0)
    (term,) = stage.terms
    assert [term.weight(step) for step in range(6)] == [0.0, 0.0, 2.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [{"start": 3, "end": 3}, {"start": -1}, {"last_factor": 0.5}, {"first_factor": -1.0}],
)
def test_stages_that_cannot_be(settings):
    with pytest.raises(ConfigError, match="Stage of kd"):
        Stage(KD(), **settings)


REFUSED = {
    "a gap between stages": (
        [Stage(SFT(), end=3), Stage(KD(), start=4)],
        "no method acts from optimizer step 3 on",
    ),
    "nothing to train": ([], "no method"),
    "two kinds of given rows": ([KD(), GKD(seq_kd=True)], "seq_kd"),
    "nobody writes": ([Taker(("student",))], "taker acts on rows from student"),
    "nobody is asked": (
        [GKD(on_policy_fraction=1.0), Taker(("dataset",))],
        "taker acts on rows from dataset",
    ),
    "says so and does not": ([Taker(("student",), 0.0)], "taker acts on rows from student"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_runs_that_are_refused(case):
    given, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        plan_for(terms_of(given))
