"""Effect of an advantage on the student, in float64, for every divergence of the library.

Frozen here (METHODS.md section 5, tests 1 to 4):

* over one state, the expected gradient of the corrected advantages is that of the exact divergence,
  by enumeration and by sampling; that of the stopped reward only for reverse KL;
* w_f's expected gradient is the same for f + c (u - 1), that of -f is not;
* over sequences of two and three tokens, with and without a discount, the same by enumeration;
* in a tabular run the stopped reward of forward KL and JSD ends worse than it began, the
  corrected advantage below 1e-3;
* known traps are refused by name.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from divergence_cases import CASES, Case
from torch import Tensor

from okd_lightning.advantages import FDivergenceAdvantage, Variant
from okd_lightning.divergences import (
    Divergence,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    Tempered,
    TopK,
)
from okd_lightning.errors import ConfigError

CORRECTED = [variant for variant in get_args(Variant) if variant != "stopped_reward"]


def distributions(num: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """[num, vocab] logits of a student and a teacher that are not far from each other."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, num, vocab, generator=generator, dtype=torch.float64)
    return student, teacher


def credits_of_all_tokens(advantage, log_p, log_q) -> Tensor:
    """[states, vocab]: the advantage of every token that can be sampled in every state."""
    value = None
    if advantage.state_value_of is not None:
        value = advantage.state_value_of.expected_weight(log_p, log_q)[:, None].expand_as(log_p)
    return advantage.credit(log_p, log_q, torch.ones_like(log_p, dtype=torch.bool), value)


def expected_gradient(advantage, student, teacher) -> Tensor:
    """E_{a~p}[-A ∇ log p(a)] with respect to the student's logits, by enumeration."""
    leaf = student.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher.log_softmax(-1)
    credit = credits_of_all_tokens(advantage, log_p.detach(), log_q)
    return torch.autograd.grad(-(log_p.detach().exp() * credit * log_p).sum(), leaf)[0]


def exact_gradient(divergence, student, teacher) -> Tensor:
    leaf = student.clone().requires_grad_()
    value = divergence.value(leaf.log_softmax(-1), teacher.log_softmax(-1))
    return torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("variant", CORRECTED)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_corrected_advantages_have_the_exact_gradient(case: Case, variant):
    student, teacher = distributions(3, 6)
    found = expected_gradient(FDivergenceAdvantage(case.divergence, variant), student, teacher)
    exact = exact_gradient(case.divergence, student, teacher)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9 * float(exact.abs().max() + 1))


@pytest.mark.parametrize("variant", CORRECTED)
@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.5)], ids=repr)
def test_of_a_top_k_it_is_the_gradient_of_the_top_k(divergence, side, variant):
    student, teacher = distributions(3, 6)
    coarse = TopK(divergence, 2, side)
    leaf = student.clone().requires_grad_()
    log_p, log_q = leaf.log_softmax(-1), teacher.log_softmax(-1)
    advantage = FDivergenceAdvantage(coarse, variant)
    total = 0.0
    for token in range(6):
        ids = torch.full((3,), token)
        p, q = coarse.drawn(log_p.detach(), log_q, ids)
        value = coarse.expected_weight(log_p.detach(), log_q)[:, None]
        credit = advantage.credit(p[:, None], q[:, None], torch.ones(3, 1, dtype=bool), value)
        total = total - (log_p[:, token].detach().exp() * credit[:, 0] * log_p[:, token]).sum()
    found = torch.autograd.grad(total, leaf)[0]
    torch.testing.assert_close(found, exact_gradient(coarse, student, teacher))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_the_stopped_reward_is_right_for_reverse_kl_alone():
    student, teacher = distributions(5, 8)
    by = {
        divergence: cosine(
            expected_gradient(FDivergenceAdvantage(divergence, "stopped_reward"), student, teacher),
            exact_gradient(divergence, student, teacher),
        )
        for divergence in (ReverseKL(), ForwardKL(), JensenShannon(0.5))
    }
    assert by[ReverseKL()] == pytest.approx(1.0)
    assert by[ForwardKL()] < -0.5  # the opposite way
    assert abs(by[JensenShannon(0.5)]) < 0.9


@dataclass(frozen=True)
class Shifted(Divergence):
    """f(u) + c (u - 1): the same divergence, written otherwise."""

    inner: Divergence
    shift: float

    def generator(self, log_ratio: Tensor) -> Tensor:
        return self.inner.generator(log_ratio) + self.shift * log_ratio.expm1()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_how_f_is_written_does_not_matter_to_w_f(case: Case):
    student, teacher = distributions(3, 6)
    shifted = Shifted(case.divergence, 2.0)
    for variant in CORRECTED:
        pair = [
            expected_gradient(FDivergenceAdvantage(f, variant), student, teacher)
            for f in (case.divergence, shifted)
        ]
        scale = float(pair[0].abs().max() + 1)
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-6, atol=1e-8 * scale)
    stopped = [
        expected_gradient(FDivergenceAdvantage(f, "stopped_reward"), student, teacher)
        for f in (case.divergence, shifted)
    ]
    assert (stopped[0] - stopped[1]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", CORRECTED)
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.25)], ids=repr)
def test_sampling_converges_to_the_exact_gradient(divergence, variant):
    student, teacher = distributions(1, 5, seed=3)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    advantage = FDivergenceAdvantage(divergence, variant)
    credit = credits_of_all_tokens(advantage, log_p, log_q)[0]
    num = 400_000
    drawn = torch.multinomial(log_p.exp()[0], num, True, generator=torch.manual_seed(0))
    scores = torch.eye(5, dtype=torch.float64)[drawn] - log_p.exp()  # ∇_z log p(a)
    samples = -credit[drawn][:, None] * scores
    error = samples.mean(0) - exact_gradient(divergence, student, teacher)[0]
    assert (error.abs() <= 4.5 * samples.std(0) / num**0.5).all()


class TwoModels:
    """Tabular models over sequences: logits for every prefix."""

    def __init__(self, vocab: int, length: int, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.length = vocab, length
        prefixes = [
            prefix for n in range(length) for prefix in itertools.product(range(vocab), repeat=n)
        ]
        self.student = {
            prefix: torch.randn(vocab, generator=generator, dtype=torch.float64).requires_grad_()
            for prefix in prefixes
        }
        self.teacher = {
            prefix: torch.randn(vocab, generator=generator, dtype=torch.float64)
            for prefix in prefixes
        }

    def logprobs(self, prefix) -> tuple[Tensor, Tensor]:
        return self.student[prefix].log_softmax(-1), self.teacher[prefix].log_softmax(-1)

    def sequences(self):
        return itertools.product(range(self.vocab), repeat=self.length)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat(torch.autograd.grad(loss, list(self.student.values()), allow_unused=False))


def sampled_gradient(models: TwoModels, advantage) -> Tensor:
    """E over whole sequences of -Σ A_k ∇ log p_k, by enumeration."""
    total = torch.zeros((), dtype=torch.float64)
    for sequence in models.sequences():
        prefixes = [sequence[:n] for n in range(models.length)]
        sides = [models.logprobs(prefix) for prefix in prefixes]
        log_p = torch.stack([p[a] for (p, _), a in zip(sides, sequence, strict=True)])
        log_q = torch.stack([q[a] for (_, q), a in zip(sides, sequence, strict=True)])
        value = None
        if advantage.state_value_of is not None:
            values = [advantage.state_value_of.expected_weight(p.detach(), q) for p, q in sides]
            value = torch.stack(values)[None]
        mask = torch.ones(1, models.length, dtype=torch.bool)
        credit = advantage.credit(log_p.detach()[None], log_q[None], mask, value)[0]
        total = total - log_p.detach().sum().exp() * (credit * log_p).sum()
    return models.gradient(total)


def objective_gradient(models: TwoModels, divergence, discount: float) -> Tensor:
    """Each token's own divergence, plus γ^n times what comes n tokens later, by recursion.

    The token at prefix s is credited with E_{a~p(s)}[f(u) + γ V(s·a)], differentiated through
    p(s) alone, V the discounted divergence of what follows; every prefix counts as often as the
    student comes there.
    """

    def value(prefix) -> Tensor:
        if len(prefix) == models.length:
            return torch.zeros((), dtype=torch.float64)
        log_p, log_q = models.logprobs(prefix)
        later = torch.stack([value((*prefix, a)) for a in range(models.vocab)])
        return (
            divergence.value(log_p[None], log_q[None])[0] + discount * (log_p.exp() * later).sum()
        )

    total = torch.zeros((), dtype=torch.float64)
    for prefix in models.student:
        visits = math.prod(
            models.logprobs(prefix[:n])[0][a].exp().item() for n, a in enumerate(prefix)
        )
        log_p, log_q = models.logprobs(prefix)
        later = torch.stack([value((*prefix, a)).detach() for a in range(models.vocab)])
        own = divergence.value(log_p[None], log_q[None])[0]
        total = total + visits * (own + discount * (log_p.exp() * later).sum())
    return models.gradient(total)


@pytest.mark.parametrize("variant", CORRECTED)
@pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_over_sequences_by_enumeration(case: Case, discount, variant):
    models = TwoModels(3, 2)
    found = sampled_gradient(models, FDivergenceAdvantage(case.divergence, variant, discount))
    exact = objective_gradient(models, case.divergence, discount)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-8 * float(exact.abs().max() + 1))


def test_undiscounted_it_is_the_gradient_of_the_sequences_divergence():
    """γ = 1 over three tokens, against autograd through Σ p(y) Σ_n f(u_n)."""
    models, divergence = TwoModels(3, 3), JensenShannon(0.5)
    total = torch.zeros((), dtype=torch.float64)
    for sequence in models.sequences():
        log_sequence, cost = 0.0, 0.0
        for n, token in enumerate(sequence):
            log_p, log_q = models.logprobs(sequence[:n])
            log_sequence = log_sequence + log_p[token]
            cost = cost + divergence.generator(log_q[token] - log_p[token])
        total = total + log_sequence.exp() * cost
    found = sampled_gradient(models, FDivergenceAdvantage(divergence, "centred", 1.0))
    torch.testing.assert_close(found, models.gradient(total))


def test_reward_to_go_of_w_f_would_be_wrong():
    """The pathwise term u f'(u) is the own token's; later tokens bring only -f."""
    models, divergence = TwoModels(3, 2), ForwardKL()

    class Wrong(FDivergenceAdvantage):
        def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
            weights = self.divergence.weight(teacher_logprobs - student_logprobs)
            return weights.flip(-1).cumsum(-1).flip(-1)

    wrong = sampled_gradient(models, Wrong(divergence, "as_published", 1.0))
    assert (wrong - objective_gradient(models, divergence, 1.0)).abs().max() > 1e-2


def train_tabular(advantage, steps: int = 6000) -> tuple[float, float]:
    """The exact divergence before and after sampled training of four states, 64 draws a step."""
    student, teacher = distributions(4, 6, seed=5)
    student.requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    log_q, divergence = teacher.log_softmax(-1), advantage.divergence

    def measured() -> float:
        return float(divergence.value(student.detach().log_softmax(-1), log_q).mean())

    before = measured()
    for _ in range(steps):
        log_p = student.log_softmax(-1)
        drawn = torch.multinomial(log_p.detach().exp(), 64, True, generator=generator)
        own, other = log_p.gather(-1, drawn), log_q.gather(-1, drawn)
        credit = advantage.credit(own.detach(), other, torch.ones_like(drawn, dtype=torch.bool))
        loss = -(credit * own).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return before, measured()


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.5)], ids=repr)
def test_a_tabular_run_collapses_without_the_correction_and_converges_with_it(divergence):
    before, after = train_tabular(FDivergenceAdvantage(divergence, "stopped_reward"), 1500)
    assert after > before
    before, after = train_tabular(FDivergenceAdvantage(divergence, "centred"))
    assert after < 1e-3 < before


def test_clipping_acts_on_the_log_ratio_and_is_counted():
    student = torch.tensor([[-1.0, -9.0, -1.0]])
    teacher = torch.tensor([[-2.0, -1.0, -12.0]])
    mask = torch.tensor([[True, True, False]])
    advantage = FDivergenceAdvantage(ReverseKL(), max_log_ratio=4.0)
    assert advantage.credit(student, teacher, mask).tolist() == [[-1.0, 4.0, 0.0]]
    counted = advantage.metrics(student, teacher, mask)["log_ratio_clipped"]
    assert counted.tolist() == [[0.0, 1.0, 0.0]]
    assert FDivergenceAdvantage(ReverseKL()).metrics(student, teacher, mask) == {}


def test_a_clipped_state_value_is_the_mean_of_the_clipped_advantage():
    student, teacher = (3 * side for side in distributions(4, 6))
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    advantage = FDivergenceAdvantage(ForwardKL(), "value_baseline", max_log_ratio=1.0)
    value = ForwardKL().expected_weight(log_p, log_q, 1.0)[:, None].expand_as(log_p)
    credit = advantage.credit(log_p, log_q, torch.ones_like(log_p, dtype=torch.bool), value)
    mean = (log_p.exp() * credit).sum(-1)
    torch.testing.assert_close(mean, torch.zeros_like(mean))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_expected_weight_is_never_nan_however_far_apart_they_are(case: Case):
    """The value is infinite beyond float32's range, as for chi-squared at 300 nats."""
    log_p = torch.tensor([[0.0, -300.0, -math.inf, -80.0]]).log_softmax(-1)
    log_q = torch.tensor([[-300.0, 0.0, -5.0, -math.inf]]).log_softmax(-1)
    assert not case.divergence.expected_weight(log_p, log_q).isnan().any()
    near = case.divergence.expected_weight(log_p.clamp(min=-40.0), log_q.clamp(min=-40.0))
    assert near.isfinite().all()


TRAPS = ["per_state_kl", "k1", "k2", "k3", "z_score", "normalized", "whitened"]


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_are_refused_by_name_with_what_to_use(trap):
    with pytest.raises(ConfigError, match=f"variant {trap} is refused.*(use|train)"):
        FDivergenceAdvantage(ReverseKL(), trap)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="expected one of stopped_reward"):
        FDivergenceAdvantage(ReverseKL(), "centered")
    with pytest.raises(ConfigError, match="discount must be between 0 and 1"):
        FDivergenceAdvantage(ReverseKL(), discount=1.5)
    with pytest.raises(ConfigError, match="max_log_ratio must be above 0"):
        FDivergenceAdvantage(ReverseKL(), max_log_ratio=0.0)
    with pytest.raises(ConfigError, match="tempered divergence"):
        FDivergenceAdvantage(Tempered(ReverseKL(), 2.0))
