"""Numerically safe arithmetic on log-probabilities and log-ratios.

Each function and its gradient are exact to rounding where the naive formula overflows, cancels or
divides zero by zero. Arguments of both branches of ``torch.where`` get safe values first: autograd
multiplies the gradient of the branch not taken by zero, which is NaN if that gradient is infinite.
"""

from __future__ import annotations

import math

import torch

from okd_lightning.records.shapes import LogProbs, LogRatio, RatioValues

THIN_SHARE = 1e-3
"""Share below which log1p, far from u = 1, would lose the smaller part of a mixture in float32."""


def widen(student_logprobs: LogProbs, teacher_logprobs: LogProbs) -> tuple[LogProbs, LogProbs]:
    """Return both sides in the wider of their types, at least float32."""
    dtype = torch.promote_types(student_logprobs.dtype, teacher_logprobs.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    return student_logprobs.to(dtype), teacher_logprobs.to(dtype)


def finite(log_ratio: LogRatio) -> LogRatio:
    """Clamp infinite log-ratios to the largest finite numbers.

    exp still gives 0 and inf for them, but u ln u at u = 0 becomes 0 instead of NaN.
    """
    limits = torch.finfo(log_ratio.dtype)
    return log_ratio.clamp(limits.min, limits.max)


def mixture_log_ratios(
    log_ratio: LogRatio, share: float, rest: float
) -> tuple[RatioValues, RatioValues]:
    """Log m - log p and log m - log q for the mixture m = share * q + rest * p, share + rest = 1.

    These are ln(share * u + rest) and the same minus ln u, precise near u = 1 and in range at both
    ends. ``rest`` is an argument because 1 - share would round a small rest.
    """
    above, zero = log_ratio > 0, torch.zeros_like(log_ratio)
    shrunk = torch.where(above, -log_ratio, log_ratio).expm1()  # in (-1, 0]
    fall = torch.where(above, rest * shrunk, share * shrunk)
    is_thin, is_near = min(share, rest) < THIN_SHARE, fall > -0.5
    near = torch.where(is_near, fall, zero) if is_thin else fall
    over_larger = near.log1p()  # ln(m / max(p, q)); exactly 0 at u = 1
    over_student = over_larger + torch.where(above, log_ratio, zero)
    over_teacher = over_larger - torch.where(above, zero, log_ratio)
    if not is_thin:
        return over_student, over_teacher
    log_share = torch.full_like(log_ratio, math.log(share))
    log_rest = torch.full_like(log_ratio, math.log(rest))
    return (
        torch.where(is_near, over_student, torch.logaddexp(log_ratio + log_share, log_rest)),
        torch.where(is_near, over_teacher, torch.logaddexp(log_share, log_rest - log_ratio)),
    )


def scaled_expm1(log_scale: LogRatio, exponent: LogRatio) -> RatioValues:
    """exp(log_scale) * (exp(exponent) - 1), infinite only where the product itself overflows.

    Args:
        log_scale: Any shape; -inf gives 0 where ``exponent`` is finite.
        exponent: Same shape.
    """
    above = exponent > 0
    zero = torch.zeros_like(exponent)
    rising, falling = torch.where(above, exponent, zero), torch.where(above, zero, exponent)
    return torch.where(
        above,
        -(log_scale + rising).exp() * (-rising).expm1(),
        log_scale.exp() * falling.expm1(),
    )
