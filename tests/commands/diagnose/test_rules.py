"""Every rule fires where its numbers say so and is silent where they do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from okd_lightning.commands.diagnose import rules
from okd_lightning.commands.diagnose.findings import (
    Check,
    Cost,
    Diagnosis,
    Drift,
    Estimate,
    EstimatorFinding,
    GradientFinding,
    Rows,
    to_record,
)
from okd_lightning.metrics import GradientFidelity

VERDICTS = ("good", "look", "bad")


def rows(source: str, *, reverse_kl=1.0, agreement=0.8, eos_share=1.0, mass=0.99, num=64) -> Rows:
    names = ("forward_kl", "jsd", "student_entropy", "teacher_entropy", "cross_entropy")
    measures = {name: Estimate(0.5, 0.01) for name in names}
    measures |= {"reverse_kl": Estimate(reverse_kl, 0.01), "agreement": Estimate(agreement, 0.01)}
    top_k = {16: Estimate(mass, 0.001)}
    return Rows(source, num, 100, 10.0, eos_share, measures, top_k, (), 0.3)


def fidelity(along=1.0, over_exact=1.0, error=0.05) -> GradientFidelity:
    return GradientFidelity(along, error, 1.0, 0.1, 10.0, over_exact, 16)


def found(*kinds: Rows, credits=None, **changes) -> Diagnosis:
    estimators = {
        ("reverse KL", "exact"): fidelity(),
        ("reverse KL", "exact, top 16"): fidelity(0.99),
        ("reverse KL", "as_published"): fidelity(over_exact=1.9),
        ("reverse KL", "centred"): fidelity(over_exact=1.7),
        ("reverse KL", "value_baseline"): fidelity(over_exact=1.5),
        ("forward KL", "stopped_reward"): fidelity(1.1),
    } | (credits or {})
    gradients = GradientFinding(
        tuple(EstimatorFinding(*key, value) for key, value in estimators.items()), 16, 4, 10, 10
    )
    settings = {
        "checks": (),
        "rows": kinds or (rows("given"), rows("student"), rows("teacher")),
        "gradients": gradients,
        "drift": (Drift(1, 0.01, 0.0, 1.0), Drift(2, 0.2, 0.1, 0.9)),
        "trials": (),
        "cost": Cost({"KD": 1.0, "GKD": 2.0, "OPD+": 2.0, "writing": 1.0}, 8, 4, 100.0, {}, "cpu"),
    }
    return Diagnosis(
        "s",
        "t",
        part="val",
        learning_rate=1e-3,
        schedule="constant",
        seed=0,
        **{**settings, **changes},
    )


def test_a_pair_without_trouble():
    said = {rule.__name__ for rule in rules.RULES if rule(found()) is not None}
    assert said == {"exposure", "what_counts", "quietest_credit", "chunks"}


STUDENT, TEACHER = rows("student"), rows("teacher")


@pytest.mark.parametrize(
    ("rule", "diagnosis", "words"),
    [
        (rules.mend_first, found(checks=(Check("eos", "bad", "differs"),)), "eos: differs"),
        (rules.prompts_alone, found(STUDENT, TEACHER), "prompts only"),
        (rules.learn_to_end, found(rows("student", eos_share=0.1), TEACHER), "10% of the student"),
        (rules.exposure, found(rows("given"), rows("student", reverse_kl=2.0)), "2.000±0.010"),
        (rules.coverage, found(rows("given", mass=0.7)), "30% of its mass"),
        (rules.far_teacher, found(rows("given", agreement=0.3)), "30% of the tokens"),
        (
            rules.exact_over_sampled,
            found(credits={("reverse KL", "value_baseline"): fidelity(over_exact=6.0)}),
            "6.0 times",
        ),
        (
            rules.coarse_teacher,
            found(credits={("reverse KL", "exact, top 16"): fidelity(0.5)}),
            "reverse KL 0.50±0.05",
        ),
        (
            rules.biased_reward,
            found(credits={("forward KL", "stopped_reward"): fidelity(-2.0)}),
            "forward KL -2.00±0.05",
        ),
        (
            rules.pace,
            found(cost=Cost({"KD": 1.0, "GKD": 9.0}, 8, 8, 1.0, {}, "cpu")),
            "9.0 times",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_rules_fire_on_their_numbers(rule, diagnosis, words):
    advice = rule(diagnosis)
    assert words in advice.because
    assert advice in rules.advise(diagnosis)


def test_exposure_names_the_side_that_needs_it():
    own = found(rows("given"), rows("student", reverse_kl=2.0))
    assert rules.exposure(own).methods == (rules.GKD_REVERSE_KL,)
    assert rules.exposure(found()).methods == ("KD", "OKD")
    noisy = replace(rows("student"), measures={"reverse_kl": Estimate(2.0, 1.0)})
    assert rules.exposure(found(rows("given"), noisy)).methods == ("KD", "OKD")


def test_quietest_advantage_is_named():
    assert "variant value_baseline" in rules.quietest_credit(found()).title
    other = found(credits={("reverse KL", "centred"): fidelity(over_exact=1.1)})
    assert "variant centred" in rules.quietest_credit(other).title


def test_chunks_last_as_long_as_rollouts_are_fresh():
    assert "--data.prompts_per_rollout 4" in rules.chunks(found()).title
    stale = found(drift=(Drift(1, 0.3, 0.5, 0.8),))
    assert "One optimizer step" in rules.chunks(stale).title


def test_few_rows_are_called_a_rough_indication():
    assert "rough indication" not in rules.advise(found())[-1].title
    assert "rough indication" in rules.advise(found(rows("given", num=8)))[-1].title


def test_contenders_are_named_once_and_can_be_trained():
    assert rules.contenders(rules.advise(found(STUDENT, TEACHER))) == (
        rules.GKD_REVERSE_KL,
        "OPDPlus",
    )
    named = rules.contenders(rules.advise(found()))
    assert named == ("KD", "OKD", "OPDPlus", rules.GKD_REVERSE_KL)


def test_the_headline_is_a_fault_of_the_data_and_the_surest_follow():
    checks = tuple(Check(name, verdict, "") for name, verdict in zip("abc", VERDICTS, strict=True))
    advice = rules.advise(found(checks=checks))
    assert advice[0].title.startswith("Fix the data")
    order = [rules._ORDER.index(one.confidence) for one in advice[1:]]
    assert order == sorted(order)
    assert len(set(order)) > 1
    assert [check.name for check in rules.faults(found(checks=checks))] == ["c", "b"]
    assert not rules.advise(found())[0].title.startswith("Fix")


def test_what_is_not_a_number_is_null_in_json():
    record = to_record(found(credits={("JSD", "exact"): fidelity(float("nan"))}))
    assert record["gradients"]["estimators"][-1]["fidelity"]["along_exact"] is None
    assert record["rows"][0]["top_k"]["16"]["mean"] == 0.99
