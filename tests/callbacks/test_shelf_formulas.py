"""Sampled plug-ins of the shelf against their papers' formulas, written out slowly in float64.

Frozen here: loss and gradient of every optimizer step of a run are those of the formula, row by
row, whatever the micro-batches; what makes no sense is refused in one line.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import reference_loss as reference
import shelf
import tiny
import torch
from shelf_reference import DATASET, STUDENT, Values, at, check

from okd_lightning.callbacks import OPD
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Tile


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def sampled(credit) -> Values:
    """-ρ A with A = credit(log p, log q, drawn)."""

    def values(log_p, log_q, drawn, sampler, source):
        assert source == STUDENT
        return -(at(log_p, drawn) - sampler).exp() * credit(log_p.detach(), log_q, drawn)

    return values


def vopd(log_p, log_q, drawn):
    return at(log_q - log_p, drawn) + (log_p.exp() * (log_p - log_q)).sum(-1)


def poweropd(alpha):
    return lambda log_p, log_q, drawn: (
        at(log_q, drawn).exp() ** alpha - at(log_p, drawn).exp() ** alpha
    )


def iwopd(gamma):
    def credit(log_p, log_q, drawn):
        own = at(log_q - log_p, drawn).tolist()
        whole = sum(abs(a) for a in own)
        weights = [1 + gamma * (1 - sum(map(abs, own[:t])) / whole) for t in range(len(own))]
        return torch.tensor([w * a for w, a in zip(weights, own, strict=True)]).double()

    return credit


def topd(alpha, correction=0.0, future=False):
    """ln(α q/p + 1-α); with the correction α - α u/m of the skew reverse KL; with Eq. 8's mean."""

    def credit(log_p, log_q, drawn):
        ratios = at(log_q - log_p, drawn).exp().tolist()
        mixtures = [alpha * u + 1 - alpha for u in ratios]
        rewards = [math.log(m) for m in mixtures]
        found = []
        for t, (u, m) in enumerate(zip(ratios, mixtures, strict=True)):
            later = rewards[t + 1 :]
            mean = sum(later) / len(later) if future and later else 0.0
            found.append(rewards[t] + correction * (alpha - alpha * u / m) + mean)
        return torch.tensor(found).double()

    return credit


def idaopd(log_p, log_q, drawn):
    """The entropy's change is differentiated, not written out."""
    found = []
    for p, q, y in zip(log_p, log_q, drawn.tolist(), strict=True):
        logits = p.clone().requires_grad_()
        entropy = -(logits.log_softmax(-1).exp() * logits.log_softmax(-1)).sum()
        (slope,) = torch.autograd.grad(entropy, logits)
        step = torch.eye(len(p)).double()[y] - p.exp()
        advantage = float(q[y] - p[y])
        is_contracting = advantage * float(slope @ step) < 0
        p_y, q_y = math.exp(p[y]), math.exp(q[y])
        found.append(advantage * (abs(q_y - p_y) / (q_y + p_y) if is_contracting else 1.0))
    assert len(set(found)) > 1 or len(found) == 1
    return torch.tensor(found).double()


SAMPLED = {
    "topd.TOPD": ({}, topd(0.2)),
    "topd.TOPD, later": ({"alpha": 0.7, "future": True}, topd(0.7, future=True)),
    "topd.TOPD, corrected": ({"alpha": 0.4, "variant": "centred"}, topd(0.4, correction=1.0)),
    "idaopd.IDAOPD": ({}, idaopd),
    "vopd.VOPD": ({}, vopd),
    "poweropd.PowerOPD": ({}, poweropd(5)),
    "poweropd.PowerOPD, small": ({"alpha": 0.3, "weight": 2.0}, poweropd(0.3)),
    "iwopd.IWOPD": ({}, iwopd(0.5)),
    "iwopd.IWOPD, more": ({"gamma": 2.0}, iwopd(2.0)),
}


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("is_stale", [False, True], ids=["fresh", "stale"])
def test_sampled_methods(name, is_stale, tmp_path, make_module):
    settings, credit = SAMPLED[name]
    method = shelf.method(name.partition(",")[0], **settings)
    data = {"data": {"prompts_per_rollout": 16}} if is_stale else {}
    recorder = check(tmp_path, make_module(learning_rate=0.02), method, sampled(credit), **data)
    gaps = [losses["train/sampler_gap"] for losses in recorder.losses]
    assert gaps[0] < 1e-5
    assert (gaps[1] > 1e-3) == is_stale


FROZEN = {
    "iwopd.IWOPD": iwopd(0.5),
    "topd.TOPD": topd(0.2),
    "OPD": lambda log_p, log_q, drawn: at(log_q - log_p, drawn),
}


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_advantage_is_of_the_student_at_rollout_time(name, tmp_path, make_module):
    """The first rollout batch serves several steps, with the first weights' advantage."""
    settings = {"frozen_credit": True}
    method = OPD(**settings) if name == "OPD" else shelf.method(name, **settings)
    first = reference.double(tiny.make_llama(1))

    def values(log_p, log_q, drawn, sampler, source):
        at_rollout = log_p.detach().clone()
        at_rollout[range(len(drawn)), drawn] = sampler
        return -(at(log_p, drawn) - sampler).exp() * FROZEN[name](at_rollout, log_q, drawn)

    data = {"prompts_per_rollout": 16}
    recorder = check(tmp_path, make_module(learning_rate=0.02), method, values, data=data)
    assert recorder.losses[1]["train/sampler_gap"] > 1e-3
    ids = recorder.steps[1][0].input_ids[0, : int(recorder.steps[1][0].lengths[0])].tolist()
    keep = recorder.steps[1][0].mask[0, 1 : len(ids)]
    expected = at(reference.row_logprobs(first, ids, tiny.NUM_IDS), torch.tensor(ids[1:]))[keep]
    found = recorder.steps[1][0].sampler_logprobs[0, 1 : len(ids)][keep]
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_frozen_advantage_has_no_state_value():
    with pytest.raises(ConfigError, match="a state value needs the current student's distribution"):
        shelf.method("topd.TOPD", variant="value_baseline", frozen_credit=True)


def test_topd_is_bounded_where_the_teacher_rules_a_token_out():
    credit = shelf.method("topd.TOPD", alpha=0.2).advantage.credit
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 0.5]]).log()
    found = credit(student, teacher, torch.ones(1, 2, dtype=torch.bool))
    assert found.tolist() == [[pytest.approx(math.log(0.8)), 0.0]]


def test_the_corrected_weight_of_topd_is_its_divergences(tmp_path):
    """Summed over the vocabulary, centred and with a state value: the exact gradient."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    log_q = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_p = logits.log_softmax(-1)
    exact = reference.skew_reverse(log_p[None], log_q[None], 0.7).sum()
    (truth,) = torch.autograd.grad(exact, logits, retain_graph=True)
    found = {}
    for variant in ("stopped_reward", "centred"):
        advantage = shelf.method("topd.TOPD", alpha=0.3, variant=variant).advantage
        mask = torch.ones(1, 5, dtype=torch.bool)
        credit = advantage.credit(log_p.detach()[None], log_q[None], mask)[0]
        (found[variant],) = torch.autograd.grad(
            -(log_p.exp().detach() * credit * log_p).sum(), logits, retain_graph=True
        )
    torch.testing.assert_close(found["centred"], truth, rtol=1e-6, atol=1e-9)
    assert float((found["stopped_reward"] - truth).norm()) > 0.1 * float(truth.norm())


def test_lightning_opd(tmp_path, make_module):
    """Lightning OPD trains on the data's responses, without importance weights."""

    def values(log_p, log_q, drawn, sampler, source):
        assert source == DATASET
        credit = at(log_q - log_p, drawn).detach()
        return -credit * (at(log_p, drawn) - at(log_p, drawn).detach()).exp()

    method = shelf.method("lightningopd.LightningOPD", weight=0.5)
    recorder = check(tmp_path, make_module(learning_rate=0.02), method, values)
    losses = recorder.losses[0]
    assert losses["train/lightning_opd_log_ratio"] == pytest.approx(-losses["train/lightning_opd"])


@pytest.mark.parametrize("is_stale", [False, True], ids=["fresh", "stale"])
def test_delta_distillation(is_stale, tmp_path, make_module, tiny_tokenizer):
    """Against a plain loop that runs the base by itself; both signs of the gate occur."""
    tiny.make_llama(7).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base = reference.double(tiny.make_llama(7))
    gates = set()

    def values(log_p, log_q, drawn, sampler, source, log_q0):
        assert source == STUDENT
        credit = []
        for p, q, q0, y in zip(log_p.detach(), log_q, log_q0, drawn.tolist(), strict=True):
            mean = [float((p.exp() * (q - r)).sum()) for r in (q0, p)]
            shift, gap = float(q[y] - q0[y]) - mean[0], float(q[y] - p[y]) - mean[1]
            gates.add(shift * gap > 0)
            credit.append(shift if shift * gap > 0 else 0.0)
        return -(at(log_p, drawn) - sampler).exp() * torch.tensor(credit).double()

    method = shelf.method("deltaopd.DeltaOPD", teacher_base=str(tmp_path / "base"), weight=0.5)
    data = {"data": {"prompts_per_rollout": 16}} if is_stale else {}
    module = make_module(learning_rate=0.02)
    recorder = check(tmp_path, module, method, values, [base], **data)
    assert gates == {True, False}
    assert all(0 < losses["train/delta_opd_kept"] < 1 for losses in recorder.losses)
    assert module.pair.teacher_base is None
    assert not any("base" in name for name in module.state_dict())


@pytest.mark.parametrize("top_k", [4, 64])
@pytest.mark.parametrize("is_stale", [False, True], ids=["fresh", "stale"])
def test_tropd(top_k, is_stale, tmp_path, make_module):
    def values(log_p, log_q, drawn, sampler, source):
        assert source == STUDENT
        log_ratio = at(log_q - log_p, drawn).detach()
        trusted = torch.minimum(log_ratio.exp(), torch.ones(()).double())
        inside = -(at(log_p, drawn) - sampler).exp() * trusted * log_ratio
        best = log_q.argsort(-1, descending=True)[:, :top_k]
        terms = log_q.gather(-1, best).exp() * (log_q - log_p).gather(-1, best)
        return inside + (1 - trusted) * terms.sum(-1)

    method = shelf.method("tropd.TrOPD", top_k=top_k)
    data = {"data": {"prompts_per_rollout": 16}} if is_stale else {}
    recorder = check(tmp_path, make_module(learning_rate=0.02), method, values, **data)
    assert all(0 < losses["train/tr_opd_trusted"] < 1 for losses in recorder.losses)


def test_tropd_handles_a_teacher_that_rules_a_token_out():
    """The reverse KL's advantage is 0 there, not -inf, and the forward KL acts alone."""
    method = shelf.method("tropd.TrOPD")
    student = torch.tensor([0.7, 0.3]).log().requires_grad_()
    tile = Tile(student[None], torch.tensor([[-float("inf"), 0.0]]), torch.tensor([0]))
    values = {quantity: quantity.measure(tile) for quantity in method.quantities}
    about = {"source": torch.tensor([STUDENT]), "row": torch.tensor([0])}
    measured = Measured(values, **about, sampler_logprobs=torch.tensor([0.7]).log())
    loss = method.loss(measured).sum
    assert loss.item() == pytest.approx(-math.log(0.3))
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.tolist() == pytest.approx([0.7, -0.7])


REFUSED = {
    "poweropd.PowerOPD": ({"alpha": 0.0}, "alpha must be above 0, got 0.0; its limit 0 is OPD"),
    "iwopd.IWOPD": ({"gamma": -1.0}, "gamma must be a number from 0 on"),
    "tropd.TrOPD": ({"top_k": 0}, "top_k must be at least 1"),
    "distillm2.DistiLLM2": ({"alpha": 0.0}, "alpha is 0.0, expected a number strictly between"),
    "minillm.MiniLLM": ({"teacher_share": 1.0}, "teacher_share must be in"),
    "minillm.MiniLLM, all KL": ({"lm_kd": 1.0}, "expected a share below 1"),
    "minillm.MiniLLM, no loss": ({"lm_kd": 0.5, "lm_weight": 0.0}, "whose weight is above 0"),
    "minillm.MiniLLM, no reward": ({"reward_scale": 0.0}, "reward_scale must be above 0"),
    "distillm2.DistiLLM2, one half": ({"beta": 2.0}, "beta must be above 0 and below 2, got 2.0"),
    "topd.TOPD": ({"alpha": 1.0}, "got 1.0; at 1 it is OPD"),
    "topd.TOPD, a trap": ({"variant": "z_score"}, "variant z_score is refused"),
    "opsd.OPSD": ({"clip": 0.0}, "clip must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        shelf.method(name.partition(",")[0], **settings)
