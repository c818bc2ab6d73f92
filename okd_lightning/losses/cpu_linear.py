"""Float32 matrix products on x86 CPUs: by oneDNN's kernels instead of MKL's where they are faster.

The arithmetic is float32 too, summed in another order. The choice of kernels depends on the
processor and on the layer's shape alone, so that a resumed run, another rank and a batch of another
size compute the same:

* AMD processors with AVX-512, where MKL does not use the wide registers: oneDNN for all layers but
  small ones, with gradient and without. Products are 1.2 to 2.5 times as fast.
* Other x86 processors: oneDNN for generation's product with the head alone, in 0.7 to 0.95 of
  MKL's time at 4 to 64 rows. Narrow layers take 1.1 to 2.9 times MKL's, gradients of a head 1.1 to
  1.9 times.

Figures in benchmarks/README.md and rollouts.md.

The environment variable ``OKD_ONEDNN`` overrides the choice: 0 keeps MKL's kernels, 1 takes
oneDNN's for all layers on any processor. It is read once, at the first product.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from okd_lightning.errors import ConfigError

_MIN_WEIGHTS = {False: 1 << 16, True: 1 << 14}
"""Fewest weights of a layer that is replaced, by whether gradient is needed. A oneDNN call has an
overhead of 20 microseconds, an MKL call 5. The number of rows is not considered, so that the batch
size does not change the kernel and its rounding."""

_HEAD_WEIGHTS, _HEAD_ROWS = 1 << 22, 8
"""Fewest weights of a head, and its least ratio of outputs to inputs: no layer of a block has 8."""

Kernels: TypeAlias = Literal["none", "heads", "all"]


@cache
def onednn_layers() -> Kernels:
    """Return for which layers float32 products run on oneDNN: by processor, or ``OKD_ONEDNN``.

    Raises:
        ConfigError: ``OKD_ONEDNN`` is neither 0 nor 1, or 1 and torch has no oneDNN kernels.
    """
    asked = os.environ.get("OKD_ONEDNN", "")
    if asked not in ("", "0", "1"):
        raise ConfigError(
            f"the environment variable OKD_ONEDNN is {asked!r}; expected 0 (MKL's kernels), 1 "
            "(oneDNN's), or unset (the faster ones on this processor)"
        )
    has_kernels = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    if asked == "1" and not has_kernels:
        raise ConfigError(
            "OKD_ONEDNN is 1, and this build of torch has no oneDNN kernels; unset it"
        )
    if asked:
        return "all" if asked == "1" else "none"
    wide = {"AVX2": "heads", "AVX512": "all" if "AMD" in _processor() else "heads"}
    found = wide.get(torch.backends.cpu.get_cpu_capability(), "none") if has_kernels else "none"
    return cast(Kernels, found)


@cache
def has_fast_linear() -> bool:
    """Return whether products with gradient, and those of all layers, run on oneDNN."""
    return onednn_layers() == "all"


def _processor() -> str:
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(known.get("cpu_name") or platform.processor())


def matrix_product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows · weightᵀ + bias, without gradient, by oneDNN's kernels where they apply.

    Args:
        rows: [rows, inputs].
        weight: [outputs, inputs]; any strides.
        bias: [outputs], or None.

    Returns:
        [rows, outputs].
    """
    is_float32 = rows.dtype == weight.dtype == torch.float32
    if is_float32 and rows.device.type == "cpu" and has_fast_linear() and rows.numel():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return functional.linear(rows, weight, bias)


@contextmanager
def fast_linears(model: nn.Module, learns: bool = False) -> Iterator[None]:
    """Run a model's plain float32 layers on the CPU on oneDNN within the context, without copies.

    Args:
        model: Layers with a patched ``forward``, other number formats or other devices stay
            unchanged.
        learns: Whether the model runs with gradient. The backward pass may run after the context,
            but must not recompute layers then (gradient checkpointing).
    """
    kernels = onednn_layers()
    if kernels == "none" or (learns and kernels == "heads"):
        patched = []
    else:
        least = _MIN_WEIGHTS[learns]
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and _is_plain(m, least)]
        patched = [m for m in linears if kernels == "all" or _is_head(m)]
    for module in patched:
        module.forward = partial(_linear, module, learns)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _is_plain(module: nn.Linear, least: int) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    is_plain_tensor = type(weight.data) is Tensor and weight.device.type == "cpu"
    return is_plain_tensor and weight.dtype == torch.float32 and weight.numel() >= least


def _is_head(module: nn.Linear) -> bool:
    outputs, inputs = module.weight.shape
    return module.weight.numel() >= _HEAD_WEIGHTS and outputs >= _HEAD_ROWS * inputs


def _linear(module: nn.Linear, learns: bool, rows: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    is_plain = rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if is_plain and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    if is_plain and learns:
        output: Tensor = _Linear.apply(rows, weight, bias)
        return output
    return functional.linear(rows, weight, bias)


class _Linear(torch.autograd.Function):
    """A linear layer and its gradient: three products of the same kind."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        flat, inputs = gradient.reshape(-1, gradient.shape[-1]), rows.reshape(-1, rows.shape[-1])
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matrix_product(flat, weight.t()).view(rows.shape) if needs_rows else None,
            matrix_product(flat.t(), inputs.t()) if needs_weight else None,
            flat.sum(0) if needs_bias else None,
        )
