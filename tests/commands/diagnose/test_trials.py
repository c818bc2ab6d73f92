"""Trials of a diagnosis: several methods' first steps from the same weights.

* A trial's change is that of the same steps made by hand, and the weights come back bit for bit.
* Exact reverse KL on the student's own rows lowers reverse KL there, KD forward KL on given ones.
* Without dataset responses the methods that read them are left out.
* The forecast is in the order of the change; an advice names its first ones.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from test_measuring import batch_of, logprobs_at_loss
from test_rules import found

from okd_lightning.commands.diagnose import rules
from okd_lightning.commands.diagnose.findings import Estimate, Trial
from okd_lightning.commands.diagnose.positions import Tokens
from okd_lightning.commands.diagnose.responses import Responses
from okd_lightning.commands.diagnose.steps import StepProbe
from okd_lightning.commands.diagnose.trials import ON_GIVEN, ON_OWN, change_of, run_trials
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.collation import collate


@pytest.fixture
def module(make_module):
    module = make_module()
    module.configure_model()
    return module.eval()


def responses(author: str, seed: int) -> Responses:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(4):
        ids = tuple(torch.randint(3, tiny.NUM_IDS, (8,), generator=generator).tolist())
        mask = (False,) * 3 + (True,) * 5
        rows.append(TrainingRow(index, "dataset", ids, mask, 3))
    return Responses(author, tuple(rows), (True,) * 4)


def trials(module, given=(1, 2), own=(3, 4), kinds=(("given", 5), ("student", 6))):
    steps = StepProbe(module, clip_norm=0.5)
    on_given = [[collate(list(responses("given", seed).rows))] for seed in given]
    on_own = [[batch_of(seed, module)] for seed in own]
    held_out = [responses(*kind) for kind in kinds]
    return {trial.method: trial for trial in run_trials(steps, on_given, on_own, held_out)}


def test_a_trial_is_steps_made_by_hand(module):
    before = tiny.weights(module)
    found = trials(module)
    assert all(torch.equal(before[name], now) for name, now in tiny.weights(module).items())
    assert set(found) == {*ON_GIVEN, *ON_OWN}
    assert {trial.steps for trial in found.values()} == {2}

    held = collate(list(responses("given", 5).rows))

    def forward_kl():
        with torch.no_grad():
            student, teacher, _ = logprobs_at_loss(module, held)
        return float((teacher.exp() * (teacher - student)).sum(-1).mean())

    first = forward_kl()
    optimizer = torch.optim.AdamW(module.student.parameters(), lr=1e-2, weight_decay=0.0)
    for seed in (1, 2):
        batch = collate(list(responses("given", seed).rows))
        student, teacher, _ = logprobs_at_loss(module, batch)
        optimizer.zero_grad()
        (teacher.exp() * (teacher - student)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(module.student.parameters(), 0.5)
        optimizer.step()
    change = found["KD"].change["given/forward_kl"]
    assert change.mean == pytest.approx(forward_kl() - first, rel=2e-2, abs=1e-5)
    assert change.error > 0


def test_methods_lower_what_they_minimise(module):
    seeds = tuple(range(10, 20))
    found = trials(module, given=seeds, own=seeds, kinds=(("given", 5), ("student", 6)))
    assert found["KD"].change["given/forward_kl"].mean < 0
    assert found["GKD, reverse KL"].change["student/reverse_kl"].mean < 0
    kd, reverse = found["KD"].change, found["KD, reverse KL"].change
    assert kd["given/forward_kl"].mean < reverse["given/forward_kl"].mean


def test_without_given_responses(module):
    found = trials(module, given=(), kinds=(("student", 6),))
    assert set(found) == set(ON_OWN)
    assert set(found["OPD"].change) == {"student/forward_kl", "student/reverse_kl"}


def test_errors_are_those_of_paired_differences():
    row, place = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    noise = torch.tensor([5.0, 1.0, -3.0, 2.0], dtype=torch.float64)
    before = Tokens(row, place, {"reverse_kl": noise})
    after = Tokens(row, place, {"reverse_kl": noise - 0.25})
    found = change_of(before, after, "reverse_kl")
    assert (found.mean, found.error) == (pytest.approx(-0.25), pytest.approx(0.0))
    broken = Tokens(row, place, {"reverse_kl": noise.log()})
    assert math.isinf(change_of(before, broken, "reverse_kl").mean)


def test_a_step_is_all_of_its_micro_batches(module):
    rows = list(responses("given", 1).rows)
    whole, parts = [[collate(rows)]], [[collate(rows[:1]), collate(rows[1:])]]
    held_out = [responses("given", 5)]
    own = [[batch_of(3, module)]]
    found = [
        {t.method: t for t in run_trials(StepProbe(module, 0.5), given, own, held_out)}
        for given in (whole, parts)
    ]
    for name in ON_GIVEN:
        one, other = (tried[name].change["given/forward_kl"].mean for tried in found)
        assert one == pytest.approx(other, rel=1e-3)


def test_the_forecast_and_its_advice():
    def trial(method, given, own):
        change = {"given/forward_kl": Estimate(given, 0.01)}
        return Trial(method, 16, change | {"student/reverse_kl": Estimate(own, 0.01)})

    tried = (trial("SFT", 0.1, 0.2), trial("KD", -0.3, 0.1), trial("GKD, reverse KL", 0.0, -0.2))
    diagnosis = found(trials=tried)
    ranked = [trial.method for trial in diagnosis.forecast("given/forward_kl")]
    assert ranked == ["KD", "GKD, reverse KL", "SFT"]
    advice = rules.first_steps(diagnosis)
    assert advice.title == "By their first 16 steps: KD and GKD, reverse KL"
    assert "KD -0.300±0.010" in advice.because
    assert advice.methods == ("KD", rules.GKD_REVERSE_KL)
    level = (trial("GKD, forward KL", -0.31, 0.0), *tried)  # ahead by less than its errors
    assert rules.first_steps(found(trials=level)).methods[:2] == (rules.GKD_FORWARD_KL, "KD")
    assert rules.first_steps(found(trials=(trial("SFT", 0.1, 0.2),))) is None
    assert rules.first_steps(found()) is None
    assert rules.rough_start(diagnosis) is None
    rough = rules.rough_start(found(trials=(trial("SFT", 0.1, 0.2), trial("KD", 0.3, 0.1))))
    assert "forward KL on dataset responses +0.100±0.010" in rough.because
    assert "0.001" in rough.title
    assert rules.rough_start(found()) is None
