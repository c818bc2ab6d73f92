"""Float32 linear layers on x86 CPUs by oneDNN's kernels instead of MKL's.

The arithmetic is float32 all the same, summed in another order. On an AMD processor with AVX-512,
where MKL does not use the wide registers, a head over 32,000 ids takes 7 ms instead of 18 for 64
rows; figures in benchmarks/rollouts.md. Without gradient only: torch differentiates its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

_MIN_WEIGHTS = 1 << 16
"""Smaller layers stay as they are: oneDNN's calls cost 20 microseconds, MKL's 5. The rows do not
enter into it, so that the batch's size does not change the kernel and with it the rounding."""


def has_fast_linear() -> bool:
    """Whether this machine and this torch have the kernels, and wide registers to use."""
    has_kernels = torch.backends.mkldnn.is_available() and hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    )
    return has_kernels and torch.backends.cpu.get_cpu_capability() == "AVX512"


@contextmanager
def fast_linears(model: nn.Module) -> Iterator[None]:
    """Within it, a model's plain float32 layers on the CPU run on oneDNN; nothing is copied.

    Args:
        model: Runs without gradient meanwhile; layers with a ``forward`` of their own, in other
            number formats or on other devices are left alone.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and _is_plain(m)]
    patched = linears if has_fast_linear() else []
    for module in patched:
        module.forward = partial(_linear, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _is_plain(module: nn.Linear) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    is_plain_tensor = type(weight.data) is Tensor and weight.device.type == "cpu"
    return is_plain_tensor and weight.dtype == torch.float32 and weight.numel() >= _MIN_WEIGHTS


def _linear(module: nn.Linear, rows: Tensor) -> Tensor:
    weight, bias = module.weight, module.bias
    if rows.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.is_grad_enabled():
        return functional.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
