"""Float32 layers on oneDNN's kernels.

Frozen here: outputs and all gradients are torch's own within rounding, with a bias and without,
over rows of any shape, for frozen weights and inputs without gradient; small, converted and hooked
layers, other number formats and autocast are left alone; no patch remains. Which layers get the
kernels depends on processor and shape alone: all on AMD with AVX-512, elsewhere generation's head.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from okd_lightning.losses import cpu_linear
from okd_lightning.losses.cpu_linear import (
    fast_linears,
    has_fast_linear,
    matrix_product,
    onednn_layers,
)
from okd_lightning.models import hidden_at_loss, recompute_activations
from okd_lightning.records.sequences import Sequences

on_all_layers = pytest.mark.skipif(not has_fast_linear(), reason="MKL is faster on this processor")
HAS_KERNELS = torch.backends.mkldnn.is_available()


def make_stack(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 256, bias=bias), nn.GELU(), nn.Linear(256, 130, bias=bias))


def run(stack: nn.Module, rows: torch.Tensor, is_fast: bool) -> dict[str, torch.Tensor]:
    stack.zero_grad()
    rows = rows.detach().clone().requires_grad_(rows.requires_grad)
    output = stack(rows) if not is_fast else None
    if output is None:
        with fast_linears(stack, learns=True):
            output = stack(rows)
    (output.cos() * torch.arange(130)).sum().backward()
    found = {name: p.grad for name, p in stack.named_parameters() if p.grad is not None}
    found = {name: gradient.clone() for name, gradient in found.items()}
    return found | {"output": output.detach()} | ({"rows": rows.grad} if rows.requires_grad else {})


@on_all_layers
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 128), (2, 7, 128), (1, 1, 128), (3, 0, 128)])
@pytest.mark.parametrize("frozen", ["nothing", "weights", "rows"])
def test_outputs_and_gradients(bias, shape, frozen, monkeypatch):
    calls = []
    apply = cpu_linear._Linear.apply
    monkeypatch.setattr(cpu_linear._Linear, "apply", lambda *a: calls.append(1) or apply(*a))
    stack = make_stack(bias)
    if frozen == "weights":
        stack[0].requires_grad_(False)
    rows = torch.randn(shape).requires_grad_(frozen != "rows")
    truth, found = run(stack, rows, False), run(stack, rows, True)
    assert len(calls) == 2
    assert found.keys() == truth.keys()
    for name, values in truth.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-4)


@on_all_layers
def test_what_is_left_alone():
    small, wide, half = nn.Linear(8, 8), nn.Linear(128, 256), nn.Linear(128, 256).bfloat16()
    stack = nn.ModuleList([small, wide, half])
    with fast_linears(stack, learns=True):
        assert [("forward" in vars(module)) for module in stack] == [False, True, False]
        with torch.autocast("cpu", torch.bfloat16):
            assert wide(torch.randn(2, 128)).dtype == torch.bfloat16
    assert not any("forward" in vars(module) for module in stack)
    copied = copy.deepcopy(wide)
    with torch.no_grad():
        copied.weight.zero_()
    assert not torch.equal(copied(torch.ones(1, 128)), wide(torch.ones(1, 128)))


@on_all_layers
def test_products_of_other_formats():
    rows, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(matrix_product(rows, weight), rows @ weight.t(), rtol=0, atol=0)
    narrow = rows.float().t()
    torch.testing.assert_close(matrix_product(narrow, narrow), narrow @ narrow.t())


@on_all_layers
def test_recomputed_layers_take_the_same_kernels():
    gradients = []
    for recompute in (False, True):
        model = tiny.make_llama(1, hidden_size=128, intermediate_size=256).train()
        if recompute:
            recompute_activations(model, "--model.student")
        read = Sequences(torch.arange(12).reshape(2, 6), torch.tensor([6, 6]), torch.ones(2, 6) > 0)
        hidden_at_loss(model, read, packs=True).cos().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient)


@pytest.mark.parametrize(
    ("capability", "processor", "layers"),
    [
        ("AVX512", "AMD EPYC 9R45", "all"),
        ("AVX512", "Intel(R) Xeon(R) Platinum", "heads"),
        ("AVX2", "AMD EPYC", "heads"),
        ("DEFAULT", "AMD EPYC", "none"),
        ("SVE256", "", "none"),
    ],
)
@pytest.mark.skipif(not HAS_KERNELS, reason="this torch has no oneDNN")
def test_layers_by_processor(capability, processor, layers, monkeypatch):
    monkeypatch.delenv("OKD_ONEDNN", raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(cpu_linear, "_processor", lambda: processor)
    assert onednn_layers.__wrapped__() == layers
    monkeypatch.setenv("OKD_ONEDNN", "0")
    assert onednn_layers.__wrapped__() == "none"
    monkeypatch.setenv("OKD_ONEDNN", "1")
    assert onednn_layers.__wrapped__() == "all"


@pytest.mark.skipif(not HAS_KERNELS, reason="this torch has no oneDNN")
def test_heads_alone_and_without_gradient(monkeypatch):
    monkeypatch.setattr(cpu_linear, "onednn_layers", lambda: "heads")
    torch.manual_seed(0)
    head, wide = nn.Linear(64, 1 << 16, bias=False), nn.Linear(2048, 2048)
    rows = torch.randn(3, 64)
    model = nn.ModuleList([head, wide])
    with fast_linears(model), torch.no_grad():
        assert [("forward" in vars(module)) for module in model] == [True, False]
        one, several = head(rows[:1]), head(rows)
    torch.testing.assert_close(several, head(rows), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one, several[:1], rtol=1e-6, atol=1e-6)
    with fast_linears(model, learns=True):
        assert not any("forward" in vars(module) for module in model)
    assert not has_fast_linear.__wrapped__()  # kept for the process
