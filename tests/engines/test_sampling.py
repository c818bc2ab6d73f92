"""Sampling of a token from logits.

Frozen here: frequencies are the probabilities, after temperature, top-k and top-p; the log-prob
that comes back is under that distribution; an id without probability is never drawn, at either end
of the noise; temperature 0 is greedy; settings out of range are refused.
"""

from __future__ import annotations

import pytest
import torch

from okd_lightning.engines import Sampling
from okd_lightning.engines.drawing import draw, workspace_for
from okd_lightning.errors import ConfigError

LOGITS = torch.tensor([[2.0, 1.0, 0.5, -torch.inf, 1.5, -1.0]])


def by_hand(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """The warped distribution, in plain float64 Python."""
    probs = (LOGITS[0].double() / temperature).softmax(-1).tolist()
    order = sorted(range(6), key=lambda i: -probs[i])
    kept = order[:top_k] if top_k else order
    within = sum(probs[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += probs[i] / within
    found = torch.zeros(6, dtype=torch.float64)
    for i in nucleus:
        found[i] = probs[i]
    return found / found.sum()


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 2},
    {"top_k": 99},
    {"top_p": 0.7},
    {"top_p": 0.01},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_frequencies_and_logprobs_are_of_the_warped_distribution(settings):
    expected = by_hand(**settings)
    logprobs = Sampling(**settings).logprobs(LOGITS)
    torch.testing.assert_close(logprobs.double().exp()[0], expected, rtol=1e-5, atol=1e-7)
    num = 20_000
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    ids, drawn = draw(logprobs.expand(num, -1), uniform)
    share = torch.bincount(ids, minlength=6).double() / num
    torch.testing.assert_close(share, expected, rtol=0, atol=2 / num)
    torch.testing.assert_close(drawn.double(), expected.log()[ids], rtol=1e-5, atol=1e-6)


def test_greedy_takes_the_best_whatever_the_noise():
    logprobs = Sampling(temperature=0).logprobs(LOGITS)
    for uniform in (1e-16, 0.5, 1 - 1e-16):
        ids, drawn = draw(logprobs, torch.tensor([uniform], dtype=torch.float64))
        assert ids.tolist() == [0]
        assert drawn.tolist() == [0.0]


@pytest.mark.parametrize("uniform", [2.0**-53, 1 - 2.0**-53])
def test_impossible_ids_at_both_ends_are_never_drawn(uniform):
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, 1.0, -torch.inf, -torch.inf]])
    ids, drawn = draw(logits.log_softmax(-1), torch.tensor([uniform], dtype=torch.float64))
    assert ids.item() in (2, 3)
    assert drawn.isfinite().all()


def test_a_large_vocabulary_loses_no_tail():
    """In float32 the cumulated sum of 150,000 ids is off by more than a rare id's probability."""
    logprobs = torch.zeros(1, 150_000).log_softmax(-1)
    for i in (0, 77_777, 149_999):
        uniform = torch.tensor([(i + 0.5) / 150_000], dtype=torch.float64)
        assert draw(logprobs, uniform)[0].item() == i


@pytest.mark.parametrize(
    "settings", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}], ids=str
)
def test_settings_out_of_range(settings):
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(settings))}"):
        Sampling(**settings)


@pytest.mark.parametrize("settings", [{"temperature": float("nan")}, {"top_p": float("nan")}])
def test_nan_is_no_setting(settings):
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(settings))}"):
        Sampling(**settings)


def plainly(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """[rows] ids by a float64 sum over the whole vocabulary."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(-1)


@pytest.mark.parametrize("vocab", [1, 2, 255, 256, 257, 1000, 32_000])
def test_sums_of_blocks_draw_what_a_plain_sum_draws(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = 4 * torch.randn(200, vocab, generator=generator)
    logits[:, ::3] = -torch.inf if vocab > 2 else 0.0
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    ids, logprobs = draw(logits, uniform)
    expected = plainly(logits, uniform)
    assert (ids != expected).sum() <= 1  # a number on the border of two ids
    exact = logits.double().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    # float32 logits up to 20 have a spacing of 2e-6
    torch.testing.assert_close(logprobs.double(), exact, rtol=0, atol=1e-5)
    assert logprobs.isfinite().all()


def test_a_workspace_is_used_again_for_fewer_rows():
    generator = torch.Generator().manual_seed(0)
    workspace = workspace_for(9, 300, torch.device("cpu"))
    for num_rows in (9, 4, 7):
        logits = torch.randn(num_rows, 300, generator=generator)
        uniform = torch.rand(num_rows, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(draw(logits, uniform, workspace), draw(logits, uniform))


def test_draws_fit_their_probabilities():
    """Pearson's chi-squared over 700 ids, so over three blocks, at 200,000 draws."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 700, generator=generator)
    num = 200_000
    uniform = torch.rand(num, generator=generator, dtype=torch.float64)
    ids = torch.cat([draw(logits.expand(10_000, -1), part)[0] for part in uniform.split(10_000)])
    expected = logits[0].double().softmax(-1) * num
    found = torch.bincount(ids, minlength=700)
    statistic = ((found - expected) ** 2 / expected).sum()
    assert abs(statistic - 699) < 5 * (2 * 699) ** 0.5


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("spread", [0.1, 4.0])
def test_the_nucleus_of_a_large_vocabulary(top_p, spread):
    """Flat rows need more than the ids that are sorted first."""
    logits = spread * torch.randn(3, 5000, generator=torch.Generator().manual_seed(2))
    kept = Sampling(top_p=top_p).warp(logits).isfinite()
    probs, order = logits.double().softmax(-1).sort(-1, descending=True)
    expected = torch.zeros_like(kept).scatter(-1, order, probs.cumsum(-1) - probs < top_p)
    assert (kept != expected).sum(-1).max() <= 1
    torch.testing.assert_close(logits[kept], Sampling(top_p=top_p).warp(logits)[kept])


def test_what_ties_with_the_last_one_is_kept():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.7)):
        assert sampling.warp(logits).isfinite().tolist() == [[False, True, True, True, False]]
