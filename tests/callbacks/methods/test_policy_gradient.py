"""Sampled methods through Trainer.fit, against a slow float64 loop.

Frozen here: loss and gradient of every step are those of -Σ ρ A over the student's own tokens, for
every variant, with a discount, on fresh and on stale rollouts; rewards reach every token of their
response minus its group's baseline; a constant that does not average out is warned of; runs resume
bit for bit. (What is refused: test_broken_rewards.py.)
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import reference_loss as reference
import tiny
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning.advantages import FDivergenceAdvantage
from okd_lightning.callbacks import (
    OPD,
    LastCheckpoint,
    OPDPlus,
    Reward,
    Stage,
)
from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, TopK
from okd_lightning.engines import Sampling
from okd_lightning.rewards import RewardFunction, baselined

DATASET, STUDENT, TEACHER = 0, 1, 2


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def rows_of(recorder, step):
    """(ids, mask, source, sampler log-probs of the masked-in tokens) of an optimizer step."""
    found = []
    for batch in recorder.steps[step]:
        for i, length in enumerate(batch.lengths.tolist()):
            mask = batch.mask[i, :length]
            found.append(
                (
                    batch.input_ids[i, :length].tolist(),
                    mask.tolist(),
                    int(batch.source[i]),
                    batch.sampler_logprobs[i, :length][mask].double(),
                )
            )
    return found


def sampled_loss(student, teacher, rows, credit):
    """-Σ ρ A / count, one row at a time; ``credit(log_p, log_q, drawn)`` of [tokens, vocab]."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, mask, source, sampler in rows:
        keep = torch.tensor(mask[1:], dtype=torch.bool)
        if source != STUDENT or not keep.any():
            continue
        log_p = reference.row_logprobs(student, ids, tiny.NUM_IDS)[keep]
        with torch.no_grad():
            log_q = reference.row_logprobs(teacher, ids, tiny.NUM_IDS)[keep]
        drawn = torch.tensor(ids[1:])[keep]
        own = log_p.gather(-1, drawn[:, None])[:, 0]
        ratio = (own - sampler).exp()
        total = total - (ratio * credit(log_p.detach(), log_q, drawn)).sum()
        count += int(keep.sum())
    return total / max(1, count)


def log_ratios(log_p, log_q, drawn):
    return (log_q - log_p).gather(-1, drawn[:, None])[:, 0]


def published_jsd(log_p, log_q, drawn):
    u = log_ratios(log_p, log_q, drawn).exp()
    return -0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log())


def discounted_forward_kl(log_p, log_q, drawn):
    """w_f - w_f(1) of the own token, and 0.5^n times -f of the n-th token after it."""
    u = log_ratios(log_p, log_q, drawn).exp()
    rewards = -u * u.log()
    later = [
        sum(0.5 ** (n - k) * float(rewards[n]) for n in range(k + 1, len(u))) for k in range(len(u))
    ]
    return u - 1 + torch.tensor(later, dtype=torch.float64)


def valued_forward_kl(log_p, log_q, drawn):
    """E_p[u] = 1: for forward KL the value baseline is the centring."""
    return log_ratios(log_p, log_q, drawn).exp() - 1


CREDITS = {
    "OPD": (lambda: OPD(), log_ratios),
    "OPD, JSD": (lambda: OPD(JensenShannon(0.5), weight=2.0), published_jsd),
    "OPD+ centred": (lambda: OPDPlus(variant="centred"), log_ratios),
    "OPD+ as published": (
        lambda: OPDPlus(variant="as_published"),
        lambda p, q, drawn: log_ratios(p, q, drawn) - 1,
    ),
    "OPD+ with a value": (lambda: OPDPlus(ForwardKL(), "value_baseline"), valued_forward_kl),
    "OPD+ as it comes": (
        OPDPlus,
        lambda p, q, drawn: log_ratios(p, q, drawn) - (p.exp() * (q - p)).sum(-1),
    ),
    "OPD+ discounted": (
        lambda: OPDPlus(ForwardKL(), "centred", discount=0.5),
        discounted_forward_kl,
    ),
    "OPD+ clipped": (
        lambda: OPDPlus(variant="centred", max_log_ratio=0.7),
        lambda p, q, drawn: log_ratios(p, q, drawn).clamp(-0.7, 0.7),
    ),
    "OPD+ of a whole top-k": (
        lambda: OPDPlus(TopK(ReverseKL(), 99), "centred"),
        log_ratios,
    ),
}


@pytest.mark.filterwarnings("ignore:opd. the stopped reward")
@pytest.mark.parametrize("name", CREDITS)
@pytest.mark.parametrize("is_stale", [False, True], ids=["fresh", "stale"])
def test_loss_and_gradient_of_every_step(name, is_stale, tmp_path, make_module):
    make_method, credit = CREDITS[name]
    module = make_module(learning_rate=0.02 if is_stale else 0.0)
    snapshots = reference.Snapshots()
    method = make_method()
    recorder = tiny.fit(
        tmp_path,
        module,
        [method],
        tiny.make_rows(21),
        callbacks=[snapshots],
        accumulate_grad_batches=2,
        data={"prompts_per_rollout": 16} if is_stale else None,
    )
    assert all(step == {STUDENT} for step in recorder.sources())
    teacher = reference.double(module.teacher)
    for i, losses in enumerate(recorder.losses):
        student = snapshots.students[i]
        loss = method.weight * sampled_loss(student, teacher, rows_of(recorder, i), credit)
        assert losses["train/loss"] == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
        expected = reference.gradients(student, loss * recorder.token_share(i))
        found = {n.removeprefix("student."): g for n, g in recorder.gradients[i].items()}
        assert tiny.distance(found, expected) < 2e-4
    gaps = [losses["train/sampler_gap"] for losses in recorder.losses]
    assert gaps[0] < 1e-5
    assert (gaps[1] > 1e-3) == is_stale  # the second step of a chunk has learned from the first


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


@pytest.mark.parametrize("baseline", ["none", "group_mean", "leave_one_out"])
def test_a_reward_reaches_every_token_of_its_response(baseline, tmp_path, make_module):
    module = make_module(learning_rate=0.0)
    method = Reward(length_of, baseline)
    recorder = tiny.fit(
        tmp_path,
        module,
        [method],
        tiny.make_rows(8),
        accumulate_grad_batches=2,
        data={"samples_per_prompt": 4},
    )
    student = reference.double(module.student)
    for i in range(len(recorder.losses)):
        rows, total, count, by_prompt = [], 0.0, 0, {}
        for batch in recorder.steps[i]:
            for k, length in enumerate(batch.lengths.tolist()):
                ids, mask = batch.input_ids[k, :length], batch.mask[k, :length]
                reward = length_of("", module.decode(ids[mask].tolist()), "")
                by_prompt.setdefault(int(batch.index[k]), []).append(reward)
                rows.append((ids.tolist(), mask[1:], int(batch.index[k]), reward))
        for ids, keep, index, reward in rows:
            group = by_prompt[index]
            assert len(group) == 4
            credit = {
                "none": reward,
                "group_mean": reward - sum(group) / 4,
                "leave_one_out": reward - (sum(group) - reward) / 3,
            }[baseline]
            log_p = reference.row_logprobs(student, ids, tiny.NUM_IDS)[keep]
            own = log_p.gather(-1, torch.tensor(ids[1:])[keep][:, None])[:, 0]
            total = total - credit * own.sum()
            count += int(keep.sum())
        expected = reference.gradients(student, total / count * recorder.token_share(i))
        found = {n.removeprefix("student."): g for n, g in recorder.gradients[i].items()}
        assert tiny.distance(found, expected) < 1e-4
        mean = sum(reward for *_, reward in rows) / len(rows)
        logged = recorder.steps[i][0].metrics
        assert logged["rollout/reward"] == pytest.approx(mean)
        assert logged["rollout/reward_failures"] == 0


def test_baselines_by_hand():
    rewards, groups = [1.0, 3.0, math.nan, 5.0, 7.0], ["a", "a", "a", "b", "b"]
    assert baselined(rewards, groups, "none") == [1.0, 3.0, 0.0, 5.0, 7.0]
    assert baselined(rewards, groups, "group_mean") == [-1.0, 1.0, 0.0, -1.0, 1.0]
    assert baselined(rewards, groups, "leave_one_out") == [-2.0, 2.0, 0.0, -2.0, 2.0]
    assert baselined([4.0], ["a"], "leave_one_out") == [0.0]


def test_a_biased_divergence_is_warned_of(tmp_path, make_module):
    with pytest.warns(UserWarning, match="opd: the stopped reward of ForwardKL is not its grad"):
        tiny.fit(tmp_path, make_module(), [OPD(ForwardKL())], tiny.make_rows(4))


@pytest.mark.parametrize("cause", ["temperature", "top_p", "top_k", "ratio"])
def test_a_constant_that_no_longer_averages_out_is_warned_of(cause, tmp_path, make_module):
    settings = {"temperature": 0, "top_p": 0.9, "top_k": 3}
    sampling = Sampling(**{cause: settings[cause]}) if cause in settings else Sampling()
    method = OPDPlus(variant="as_published", max_ratio=2.0 if cause == "ratio" else math.inf)
    with pytest.warns(UserWarning, match="no longer has zero expected gradient.*centred"):
        tiny.fit(tmp_path, make_module(), [method], tiny.make_rows(4), data={"sampling": sampling})
    for quiet in (OPDPlus(), OPDPlus(JensenShannon(0.5), "as_published")):  # w_f(1) = 0
        tiny.fit(tmp_path, make_module(), [quiet], tiny.make_rows(4), data={"sampling": sampling})


def test_a_sampling_temperature_is_no_cause_to_warn(tmp_path, make_module):
    """ρ is p over the tempered distribution: warnings are errors here."""
    method, data = OPDPlus(variant="as_published"), {"sampling": Sampling(temperature=0.7)}
    tiny.fit(tmp_path, make_module(), [method], tiny.make_rows(4), data=data)


class Once(RewardFunction):
    """Reward with other numbers at every call, which a resumed run must not repeat."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, responses, references):
        self.calls += 1
        return [float(self.calls * i) for i in range(len(responses))]


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            raise Killed


def methods_of_a_long_run():
    return [OPDPlus(JensenShannon(0.5)), Reward(Once(), "leave_one_out", weight=0.1)]


def test_a_killed_run_resumes_bit_for_bit(tmp_path, make_module):
    """In the middle of a rollout batch: its rollouts and their advantages are the checkpoint's."""

    def run(root, callbacks=(), ckpt_path=None):
        torch.manual_seed(5)
        module = make_module(learning_rate=3e-3)
        recorder = tiny.fit(
            root,
            module,
            methods_of_a_long_run(),
            tiny.make_rows(16),
            callbacks=[LastCheckpoint(every_n_steps=1), *callbacks],
            ckpt_path=ckpt_path,
            data={"prompts_per_rollout": 8, "samples_per_prompt": 2, "val_rollouts": 0},
        )
        return tiny.weights(module), recorder

    whole, _ = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", [KillAt(5)])
    (path,) = (tmp_path / "cut").rglob("last.ckpt")
    resumed, recorder = run(tmp_path / "cut", ckpt_path=path)
    assert len(recorder.steps) == 3
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_reward_alone_needs_no_teacher(tmp_path, tiny_pair, tiny_tokenizer):
    from okd_lightning.training.module import DistillationModule

    module = DistillationModule(tiny_pair[0], tokenizer=tiny_tokenizer, learning_rate=1e-2)
    recorder = tiny.fit(tmp_path, module, [Reward(length_of)], tiny.make_rows(8))
    assert all(losses["train/reward"] != 0 for losses in recorder.losses)


def test_the_advantage_names_what_it_is():
    assert not OPDPlus(discount=0.5).is_positionwise
    assert OPDPlus().is_positionwise
    assert Stage(OPDPlus(discount=1.0)).terms[0].is_positionwise is False
    assert FDivergenceAdvantage(ReverseKL()).state_value_of is None
