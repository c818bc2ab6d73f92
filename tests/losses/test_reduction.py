"""Reduction of per-token values to a loss.

Frozen here: masked-out infinities and NaNs contribute zero to sum and gradient; an empty mask is a
zero that is connected to the graph; the gradient is (sum over the step) / (tokens of the step),
however the step is cut into micro-batches and ranks; half precision is summed in float32.
"""

from __future__ import annotations

import math

import pytest
import torch

from okd_lightning.errors import ConfigError
from okd_lightning.losses.reduction import Normalization, loss_output, masked_sum, step_factor


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_masked_out_non_finite_values_contribute_zero(bad):
    values = torch.tensor([1.0, bad, 2.0], requires_grad=True)
    total = masked_sum(values, torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 3.0
    assert values.grad.tolist() == [1.0, 0.0, 1.0]


def test_masked_out_infinite_divergence_leaves_its_logits_alone():
    logits = torch.tensor([[0.0, 1.0], [2.0, 3.0]], requires_grad=True)
    log_p = torch.log_softmax(logits, -1)
    per_token = log_p[:, 0] - torch.tensor([0.0, math.inf])
    assert per_token[1] == -math.inf
    masked_sum(per_token, torch.tensor([True, False])).backward()
    torch.testing.assert_close(logits.grad[0, 0], 1 - log_p[0, 0].exp().detach())
    assert logits.grad[1].tolist() == [0.0, 0.0]


def test_masked_in_non_finite_values_are_not_hidden():
    values = torch.tensor([1.0, math.nan])
    assert masked_sum(values, torch.tensor([True, True])).isnan()


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 3)])
def test_an_empty_mask_is_a_zero_with_a_graph(shape):
    weight = torch.tensor(2.0, requires_grad=True)
    total = masked_sum(weight * torch.ones(shape), torch.zeros(shape, dtype=torch.bool))
    total.backward()
    assert total.item() == 0.0
    assert weight.grad.item() == 0.0


def test_half_precision_is_summed_in_float32():
    values = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    assert masked_sum(values, torch.ones(4096, dtype=torch.bool)).item() == 4096.0


def test_loss_output_sums_metrics_over_the_same_tokens_without_gradient():
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    output = loss_output(values, mask, doubled=2 * values)
    assert (output.sum.item(), output.count.item()) == (5.0, 2)
    assert output.metrics["doubled"].item() == 10.0
    assert output.sum.requires_grad
    assert not output.metrics["doubled"].requires_grad


CUTS = {
    "one batch": [[[0, 1, 2, 3, 4, 5]]],
    "three micro-batches": [[[0], [1, 2, 3], [4, 5]]],
    "two ranks": [[[0, 1, 2, 3, 4]], [[5]]],
    "two ranks of two, one empty": [[[0, 1, 2], []], [[3], [4, 5]]],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_gradient_does_not_depend_on_how_the_step_is_cut(cut):
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, False, True])
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (inputs[mask] @ weight).square().mean().backward()
    truth, total = weight.grad.clone(), torch.zeros(4, dtype=torch.float64)
    for rank in cut:  # what Lightning does: divide by micro-batches, average over ranks
        for rows in rank:
            output = loss_output((inputs[rows] @ weight).square(), mask[rows])
            loss = output.sum * step_factor(int(mask.sum()), len(rank), len(cut))
            total += torch.autograd.grad(loss / len(rank), weight)[0] / len(cut)
    torch.testing.assert_close(total, truth)


def test_a_step_without_tokens_is_zero_and_not_nan():
    weight = torch.tensor(1.0, requires_grad=True)
    output = loss_output(weight * torch.ones(2), torch.tensor([False, False]))
    loss = output.sum * step_factor(0, 4, 2)
    loss.backward()
    assert (loss.item(), weight.grad.item()) == (0.0, 0.0)


@pytest.mark.parametrize("by", ["mean", 0, -3.0, math.inf, math.nan, True])
def test_a_normalization_that_is_none_is_refused(by):
    with pytest.raises(ConfigError, match=r"model.normalization is .*expected running_mean"):
        Normalization(by)
