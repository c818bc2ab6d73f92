"""Check of a divergence where a method is constructed: its type and the conditions on its f.

Accepts an object, a class or a class name. Training with a concave or shifted f would raise no
error, but would move away from the teacher.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from okd_lightning.divergences.base import Divergence
from okd_lightning.divergences.named_classes import as_object
from okd_lightning.errors import ConfigError

_LOG_RATIOS = torch.linspace(-8.0, 8.0, 65, dtype=torch.float64).reshape(5, 13)
_AT_ONE = 32
"""Index of log-ratio 0 (u = 1) in the flattened grid."""

_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Allowed relative rounding of f, which may compute in float32."""


def as_divergence(given: object, option: str = "divergence") -> Divergence:
    """Return the argument of a method or wrapper as a divergence with a checked f.

    Args:
        given: A divergence, a divergence class that needs no arguments, or such a class's name.
        option: Name of the argument, for messages.

    Raises:
        ConfigError: It is none of those; its f is not convex, finite and 0 at u = 1 on log-ratios
            from -8 to 8 nats; or it returns no differentiable Tensor of the same shape.
    """
    divergence: Divergence = as_object(given, Divergence, option, "ReverseKL()")
    check = _check_once if type(divergence).__hash__ is not None else check_f
    check(divergence)
    return divergence


def check_f(divergence: Divergence) -> None:
    """Evaluate f on a grid of log-ratios; no graph is kept.

    Raises:
        ConfigError: See ``as_divergence``.
    """
    name = type(divergence).__name__
    with torch.inference_mode(False), torch.enable_grad():
        log_ratio = _LOG_RATIOS.clone().requires_grad_()
        values = divergence.generator(log_ratio * 1)  # a copy: generator may work in place
        _check_tensor(values, name)
        if not values.requires_grad:
            raise ConfigError(
                f"divergence {name}: generator's result has no gradient in log_ratio, so nothing "
                "would be trained; compute it with torch operations, without detach, item or numpy"
            )
        (slopes,) = torch.autograd.grad(values.sum(), log_ratio)
    if not slopes.isfinite().all():
        raise ConfigError(f"divergence {name}: the gradient of generator is not finite")
    f = values.detach().double().flatten()
    if abs(float(f[_AT_ONE])) > 1e-6:
        raise ConfigError(
            f"divergence {name}: f(1) = {float(f[_AT_ONE]):g}, so that equal distributions would "
            "not have divergence 0; expected f(1) = 0 (generator is 0 where log_ratio is 0)"
        )
    _check_convex(f, name)


@lru_cache(maxsize=256)
def _check_once(divergence: Divergence) -> None:
    check_f(divergence)


def _check_tensor(values: object, name: str) -> None:
    if not isinstance(values, Tensor):
        raise ConfigError(
            f"divergence {name}: generator returned a {type(values).__name__}; expected a Tensor "
            "of the shape of log_ratio"
        )
    if values.shape != _LOG_RATIOS.shape or not values.is_floating_point():
        raise ConfigError(
            f"divergence {name}: generator returned {values.dtype} of shape {list(values.shape)} "
            f"for log-ratios of shape {list(_LOG_RATIOS.shape)}; expected floating-point numbers "
            "of the same shape: f is taken element by element"
        )
    if not values.isfinite().all():
        at = float(_LOG_RATIOS[~values.isfinite()][0])
        raise ConfigError(
            f"divergence {name}: f is not finite at log-ratio {at:g} nats; expected finite values "
            "for all finite log-ratios (write f with expm1, softplus or tanh, not as a quotient)"
        )


def _check_convex(f: Tensor, name: str) -> None:
    """Raise ConfigError if a slope df/du between neighbours of the grid falls."""
    u = _LOG_RATIOS.flatten().exp()
    steps = u.diff()
    slopes = f.diff() / steps
    rounding = _ROUNDING * (f[1:].abs() + f[:-1].abs() + 1e-9) / steps
    fall = slopes[:-1] - slopes[1:]
    is_falling = fall > rounding[1:] + rounding[:-1] + 1e-6 * slopes[:-1].abs()
    if is_falling.any():
        at = int(is_falling.nonzero()[0])
        raise ConfigError(
            f"divergence {name}: f is not convex: its slope falls from {float(slopes[at]):g} to "
            f"{float(slopes[at + 1]):g} at u = {float(u[at + 1]):.3g}, u = q/p; training would "
            "move away from the teacher; expected a convex f (is its sign right?)"
        )
