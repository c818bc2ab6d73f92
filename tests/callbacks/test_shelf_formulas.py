"""Every plug-in of the shelf against its paper's formula, written out slowly in float64.

Frozen here: loss and gradient of every optimizer step of a run are those of the formula, row by
row, whatever the micro-batches; what makes no sense is refused in one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import reference_loss as reference
import shelf
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig
from torch import Tensor

from okd_lightning.callbacks import Stage
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Tile
from okd_lightning.rollouts import EngineSource, TransformersEngine

DATASET, STUDENT, TEACHER = 0, 1, 2

Values = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]
"""(log p, log q: [tokens, vocab]; drawn; the sampler's log-probs; source) → a loss a token."""


@pytest.fixture
def make_module(make_module):
    """In float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


class Snapshots(Callback):
    """A float64 copy of the student before every optimizer step."""

    def __init__(self) -> None:
        self.students = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.students.append(reference.double(pl_module.student))


def step_losses(student, teacher, batches, values: Values) -> dict[int, Tensor]:
    """The mean of ``values`` over the loss tokens of each source in some batches, row by row."""
    found_of: dict[int, list[Tensor]] = {}
    for batch in batches:
        for i, length in enumerate(batch.lengths.tolist()):
            ids, keep = batch.input_ids[i, :length].tolist(), batch.mask[i, 1:length]
            if not keep.any():
                continue
            read, at = ids, keep
            if batch.teacher_input_ids is not None:
                length = int(batch.teacher_lengths[i])
                read = batch.teacher_input_ids[i, :length].tolist()
                at = batch.teacher_mask[i, 1:length]
            log_p = reference.row_logprobs(student, ids, tiny.NUM_IDS)[keep]
            with torch.no_grad():
                log_q = reference.row_logprobs(teacher, read, tiny.NUM_IDS)[at]
            drawn = torch.tensor(ids[1:])[keep]
            sampler = batch.sampler_logprobs[i, 1 : len(ids)][keep].double()
            found = values(log_p, log_q, drawn, sampler, int(batch.source[i]))
            found_of.setdefault(int(batch.source[i]), []).append(found)
    return {source: torch.cat(parts).mean() for source, parts in found_of.items()}


def check(tmp_path, module, method, values: Values, **settings):
    """Fit with it, and compare every step's loss and gradient; returns what was recorded.

    The loss is the sum of the means over each source's rows.
    """
    snapshots = Snapshots()
    recorder = tiny.fit(
        tmp_path,
        module,
        [method],
        tiny.make_rows(21),
        callbacks=[snapshots],
        accumulate_grad_batches=2,
        **settings,
    )
    teacher = reference.double(module.teacher or module.student)
    for i, losses in enumerate(recorder.losses):
        means = step_losses(snapshots.students[i], teacher, recorder.steps[i], values)
        loss = method.weight * sum(means.values())
        assert losses["train/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        shared = [recorder.token_share(i, source) * mean for source, mean in means.items()]
        expected = reference.gradients(snapshots.students[i], method.weight * sum(shared))
        found = {n.removeprefix("student."): g for n, g in recorder.gradients[i].items()}
        assert tiny.distance(found, expected) < 2e-4
    assert len(recorder.losses) > 1
    return recorder


def at(logprobs: Tensor, drawn: Tensor) -> Tensor:
    return logprobs.gather(-1, drawn[:, None])[:, 0]


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


SAMPLED = {
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


@pytest.mark.parametrize("clip", [0.05, float("inf")])
def test_opsd(clip, tmp_path, make_module):
    """The teacher is the student's first weights and reads the reference before the prompt."""
    values = lambda log_p, log_q, drawn, sampler, source: (  # noqa: E731
        (log_q.exp() * (log_q - log_p)).clamp(max=clip).sum(-1)
    )
    recorder = check(
        tmp_path,
        make_module(learning_rate=0.0, teacher=None, self_teacher="frozen"),
        shelf.method("opsd.OPSD", clip=clip),
        values,
        data={"teacher_prompt_template": "{reference}p{prompt}"},
    )
    assert all(step == {STUDENT} for step in recorder.sources())
    assert recorder.losses[0]["train/loss"] != 0


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


def test_tropd_stands_a_teacher_that_rules_a_token_out():
    """There the reverse KL's credit is 0 and not -inf, and the forward KL acts alone."""
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


def test_distillm2(tmp_path, make_module):
    def values(log_p, log_q, drawn, sampler, source):
        skew = {TEACHER: reference.skew_forward, STUDENT: reference.skew_reverse}[source]
        return skew(log_p, log_q, 0.1)

    method = shelf.method("distillm2.DistiLLM2")
    recorder = check(tmp_path, make_module(learning_rate=0.02), method, values)
    assert recorder.sources()[:2] == [{STUDENT, TEACHER}] * 2  # the last step has few rows


def minillm(log_p, log_q, drawn, sampler, source):
    """Eq. 7, with PPO's clip on the long part, and the mean over the rewards to come."""
    own = at(log_p, drawn)
    if source == DATASET:
        return -0.5 * own
    weight = (own - sampler).exp()
    rewards = at(log_q - log_p, drawn).detach().tolist()
    to_come = [sum(rewards[t + 1 :]) / max(1, len(rewards) - t - 1) for t in range(len(rewards))]
    to_come = torch.tensor(to_come).double()
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


class BuiltIn(EngineSource):
    def engine(self, model, vocabulary, eos_ids):
        return TransformersEngine(model, vocabulary, eos_ids)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({}, {"teacher_prompt_template": "{prompt}p"}, "must read the same prompts"),
        (
            {"teacher": None, "self_teacher": "frozen", "student_adapter": LoraConfig(r=2)},
            {},
            "need a teacher in memory",
        ),
        ({"engine": BuiltIn()}, {}, "BuiltIn writes with one model"),
    ],
)
def test_where_teacher_and_student_cannot_draw_together(
    model, data, message, tmp_path, make_module
):
    module, method = make_module(**model), shelf.method("minillm.MiniLLM")
    with pytest.raises(ConfigError, match=message):
        tiny.fit(tmp_path, module, [method], tiny.make_rows(4), data=data)


def test_a_stage_refuses_what_changes_who_writes():
    with pytest.raises(ConfigError, match="MiniLLM changes how responses are written"):
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


REFUSED = {
    "poweropd.PowerOPD": ({"alpha": 0.0}, "alpha must be above 0, got 0.0; its limit 0 is OPD"),
    "iwopd.IWOPD": ({"gamma": -1.0}, "gamma must be a number from 0 on"),
    "tropd.TrOPD": ({"top_k": 0}, "top_k must be at least 1"),
    "distillm2.DistiLLM2": ({"alpha": 0.0}, "alpha is 0.0, expected a number strictly between"),
    "minillm.MiniLLM": ({"teacher_share": 1.0}, "teacher_share must be in"),
    "opsd.OPSD": ({"clip": 0.0}, "clip must be above 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    settings, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        shelf.method(name, **settings)


def test_distillm(tmp_path, make_module):
    def values(log_p, log_q, drawn, sampler, source):
        return reference.skew_reverse(log_p, log_q, 0.1)

    method = shelf.method("distillm.DistiLLM", share=0.5)
    settings = {"val": tiny.make_rows(4, seed=1), "max_epochs": 4}
    recorder = check(tmp_path, make_module(learning_rate=1e-2), method, values, **settings)
    assert {source for step in recorder.sources() for source in step} == {DATASET, STUDENT}
