"""How a token is chosen.

Frozen here: frequencies are the probabilities, after temperature, top-k and top-p; the log-prob
that comes back is under that distribution; an id without probability is never drawn, at either end
of the noise; temperature 0 is greedy; settings out of range are refused.
"""

from __future__ import annotations

import pytest
import torch

from okd_lightning.errors import ConfigError
from okd_lightning.rollouts import Sampling
from okd_lightning.rollouts.sampling import draw

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
