"""Plug-ins with several terms, generators or prompts against their papers' formulas, in float64.

Frozen here: loss and gradient of every optimizer step of DistiLLM-2, MiniLLM, DistiLLM and OPSD are
those of the formula, row by row, as published and with the options of their released code; the
generator of each row; runs in which they cannot generate are refused in one line.
"""

from __future__ import annotations

from functools import partial

import pytest
import reference_loss as reference
import shelf
import tiny
import torch
from peft import LoraConfig
from shelf_reference import DATASET, STUDENT, TEACHER, at, check

from okd_lightning.callbacks import Stage
from okd_lightning.engines import EngineSource, TransformersEngine
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Tile
from okd_lightning.teachers import FrozenSelf


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


@pytest.mark.parametrize("clip", [0.05, float("inf")])
def test_opsd(clip, tmp_path, make_module):
    """The teacher is the student's first weights and reads the reference before the prompt."""
    values = lambda log_p, log_q, drawn, sampler, source: (  # noqa: E731
        (log_q.exp() * (log_q - log_p)).clamp(max=clip).sum(-1)
    )
    recorder = check(
        tmp_path,
        make_module(learning_rate=0.0, teacher=FrozenSelf()),
        shelf.method("opsd.OPSD", clip=clip),
        values,
        data={"teacher_prompt_template": "{reference}p{prompt}"},
    )
    assert all(step == {STUDENT} for step in recorder.sources())
    assert recorder.losses[0]["train/loss"] != 0


def stopped_skew_reverse(log_p, log_q, alpha):
    """KL(p‖m) with the student's share of m a constant, id by id."""
    mixture = (1 - alpha) * log_q.exp() + alpha * log_p.exp().detach()
    return (log_p.exp() * (log_p - mixture.log())).sum(-1)


@pytest.mark.parametrize("stop_mixture", [False, True])
@pytest.mark.parametrize("beta", [1.0, 1.5])
def test_distillm2(stop_mixture, beta, tmp_path, make_module):
    push = stopped_skew_reverse if stop_mixture else reference.skew_reverse

    def values(log_p, log_q, drawn, sampler, source):
        share, skew = {TEACHER: (2 - beta, reference.skew_forward), STUDENT: (beta, push)}[source]
        return share / beta * skew(log_p, log_q, 0.1)  # the method's own weight is beta / 2

    method = shelf.method("distillm2.DistiLLM2", beta=beta, stop_mixture=stop_mixture)
    recorder = check(tmp_path, make_module(learning_rate=0.02), method, values)
    assert recorder.sources()[:2] == [{STUDENT, TEACHER}] * 2  # the last step has few rows


def test_the_stopped_mixture_has_the_same_value_and_another_gradient():
    logits = torch.randn(6, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    teacher = torch.tensor([1.0, 0.0, -1.0, 2.0, -float("inf"), 0.5]).double()
    tile = Tile(logits[None], teacher[None], torch.tensor([0]))
    values, gradients = [], []
    for stop in (False, True):
        push = shelf.method("distillm2.DistiLLM2", stop_mixture=stop).push
        value = push.measure(tile).sum()
        gradients.append(torch.autograd.grad(value, logits, retain_graph=True)[0])
        values.append(value.item())
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    off = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    assert off > 0.05, (values, off)
    both_rule_out = torch.tensor([0.0, -float("inf")]).double()
    tile = Tile(both_rule_out[None], both_rule_out[None], torch.tensor([0]))
    assert push.measure(tile).tolist() == pytest.approx([0.0], abs=1e-12)


def minillm(log_p, log_q, drawn, sampler, source, scale=1.0, counts_own=False, lm_kd=0.0):
    """Eq. 7, with PPO's clip on the long part, and the mean over the rewards to come."""
    own = at(log_p, drawn)
    if source == DATASET:
        forward = (log_q.exp() * (log_q - log_p)).sum(-1)
        return 0.5 * (lm_kd * forward - (1 - lm_kd) * own)
    weight = (own - sampler).exp()
    rewards = at(log_q - log_p, drawn).detach().tolist()
    parts = [rewards[t if counts_own else t + 1 :] for t in range(len(rewards))]
    to_come = scale * torch.tensor([sum(part) / max(1, len(part)) for part in parts]).double()
    clipped = torch.minimum(weight * to_come, weight.clamp(0.8, 1.2) * to_come)
    return weight.detach() * reference.kl(log_p, log_q) - clipped


def test_minillm(tmp_path, make_module):
    module = make_module(learning_rate=0.02)
    method = shelf.method("minillm.MiniLLM", lm_weight=0.5)
    recorder = check(tmp_path, module, method, minillm)
    assert recorder.sources()[:2] == [{DATASET, STUDENT}] * 2
    teacher = reference.double(module.teacher)
    student = reference.double(tiny.make_llama(1))  # the first weights, which wrote the first step
    batch = recorder.steps[0][0]
    for i, length in enumerate(batch.lengths.tolist()):
        ids, keep = batch.input_ids[i, :length].tolist(), batch.mask[i, 1:length]
        if int(batch.source[i]) == STUDENT:
            p, q = (
                at(reference.row_logprobs(m, ids, tiny.NUM_IDS), torch.tensor(ids[1:])).exp()
                for m in (student, teacher)
            )
            found = batch.sampler_logprobs[i, 1:length][keep]
            assert found.tolist() == pytest.approx(
                (0.2 * q + 0.8 * p).log()[keep].tolist(), abs=1e-4
            )


def test_minillm_as_released(tmp_path, make_module):
    """The token's own reward counts, rewards are doubled, and half forward KL joins CE."""
    method = shelf.method(
        "minillm.MiniLLM", lm_weight=0.5, reward_scale=2.0, counts_own=True, lm_kd=0.5
    )
    values = partial(minillm, scale=2.0, counts_own=True, lm_kd=0.5)
    check(tmp_path, make_module(learning_rate=0.02), method, values)


class BuiltIn(EngineSource):
    def engine(self, model, vocabulary, eos_ids):
        return TransformersEngine(model, vocabulary, eos_ids)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"teacher_prompt_template": "{prompt}p"}, "must read the same prompts"),
        (
            {"teacher": FrozenSelf(), "student_adapter": LoraConfig(r=2)},
            {},
            "need a second model in memory",
        ),
        ({"engine": BuiltIn()}, {}, "BuiltIn generates with one model"),
    ],
)
def test_where_teacher_and_student_cannot_draw_together(
    model, data, message, tmp_path, make_module
):
    module, method = make_module(**model), shelf.method("minillm.MiniLLM")
    with pytest.raises(ConfigError, match=message):
        tiny.fit(tmp_path, module, [method], tiny.make_rows(4), data=data)


def test_a_stage_refuses_what_changes_the_generator():
    with pytest.raises(ConfigError, match="MiniLLM changes the generation of responses"):
        Stage(shelf.method("minillm.MiniLLM"), end=3)


def test_minillm_by_the_student_alone(tmp_path, make_module):
    """Without the teacher's share w is 1, and without the language model there is one source."""
    settings = {"teacher_share": 0.0, "lm_weight": 0.0, "clip": None}
    method = shelf.method("minillm.MiniLLM", **settings)
    recorder = check(tmp_path, make_module(), method, minillm)
    assert all(step == {STUDENT} for step in recorder.sources())


def test_opsd_needs_the_privileged_prompt(tmp_path, make_module):
    with pytest.raises(ConfigError, match="method opsd needs prompts for the teacher"):
        tiny.fit(tmp_path, make_module(), [shelf.method("opsd.OPSD")], tiny.make_rows(4))


def test_distillm(tmp_path, make_module):
    def values(log_p, log_q, drawn, sampler, source):
        return reference.skew_reverse(log_p, log_q, 0.1)

    method = shelf.method("distillm.DistiLLM", share=0.5)
    settings = {"val": tiny.make_rows(4, seed=1), "max_epochs": 4}
    recorder = check(tmp_path, make_module(learning_rate=1e-2), method, values, **settings)
    assert {source for step in recorder.sources() for source in step} == {DATASET, STUDENT}
