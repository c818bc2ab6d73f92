"""Base of every sampled method: an advantage for the tokens that the student sampled."""

from __future__ import annotations

import math
from abc import abstractmethod

import lightning
import torch
from torch import Tensor

from okd_lightning.advantages import Advantage, as_advantage
from okd_lightning.callbacks.methods.base import DistillationCallback
from okd_lightning.divergences import ReverseKL, TopK
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    DrawnLogProb,
    DrawnOutcome,
    ExpectedWeight,
    ImportanceRatio,
    Measured,
    Quantity,
)
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput, Source
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.safeguards.health_warnings import EXTREME_LOG_RATIO

_STUDENT = DrawnLogProb("student")

LAGGED_MAX_RATIO = 2.0
"""Truncation of ρ where responses are generated ahead of training and no bound is given."""


class PolicyGradientCallback(DistillationCallback):
    """Minimise -Σ ρ A over the sampled tokens of on-policy responses; abstract in A.

    Gradient flows to the student through ρ only; the advantage A is a constant. With one optimizer
    step per rollout batch, training is strictly on-policy; with larger ones
    (``data.prompts_per_rollout``) ρ corrects for the training since generation. With rollouts ahead
    of training (``data.rollout_lag``) it is truncated at 2 where neither bound is given; ρ corrects
    for a token's probability, but not for the prefix, which an earlier student sampled. Logged
    besides the loss: ``sampler_gap``, the mean |log p_θ - log p_sampler| in nats.

    Args:
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.
    """

    sources: tuple[Source, ...] = ("student",)
    on_policy_fraction: float | None = 1.0

    def __init__(
        self,
        max_ratio: float | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.ratio = ImportanceRatio(math.inf if max_ratio is None else max_ratio, clip)
        self._chooses_bound = max_ratio is None and clip is None

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Truncate ρ where responses are generated ahead of training and no bound is given."""
        if self._chooses_bound:
            lag = getattr(getattr(trainer, "datamodule", None), "rollout_lag", 0)
            self.ratio = ImportanceRatio(LAGGED_MAX_RATIO if lag else math.inf)

    @abstractmethod
    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """Return [positions] A (nats, 0 on other rows), and [positions] values to be logged."""

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The student's log-probability of the sampled token."""
        return (_STUDENT,)

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum of -ρ A over the sampled tokens."""
        mask = measured.mask(self.sources)
        logprobs, sampler = measured[_STUDENT], measured.sampler_logprobs
        # ρ is 1 on other rows, where there are no sampler log-probs
        sampler = sampler.to(logprobs.dtype).where(mask, logprobs.detach())
        credit, logged = self.credit(measured)
        logged = {**logged, **self.ratio.metrics(logprobs, sampler)}
        if credit.shape != mask.shape:
            raise ConfigError(
                f"{self.name}: credit() returned a Tensor of shape {list(credit.shape)} for "
                f"{len(mask)} positions; expected one number per position"
            )
        if credit.requires_grad:
            raise ConfigError(
                f"{self.name}: the advantage carries a gradient. Differentiated directly a sampled "
                "estimator is another one's gradient (k1: zero, k2: reverse KL, k3: forward KL); "
                "detach it"
            )
        return loss_output(
            self.ratio.loss(logprobs, sampler, credit.where(mask, 0.0)),
            mask,
            sampler_gap=(logprobs - sampler).abs(),
            **{f"{self.name}_{name}": values for name, values in logged.items()},
        )


class AdvantageCallback(PolicyGradientCallback):
    """Policy gradient with an ``Advantage`` of the sampled tokens' log-probabilities.

    Also logged: ``<name>_log_ratio``, the mean of log teacher - log student, and
    ``<name>_extreme_log_ratio``, the share of tokens where it exceeds ±10 nats.

    Args:
        advantage: The advantage from the student's and the teacher's log-probabilities.
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.
        frozen_credit: Compute the advantage from the log-probs of sampling, not the current ones:
            the same where ρ = 1, and elsewhere the advantage that tinker and verl compute once per
            rollout batch. At a sampling temperature other than 1 these log-probs are those of the
            tempered distribution.

    Raises:
        ConfigError: ``advantage`` is not an Advantage, or its values are not detached, finite and
            of the log-probs' shape; or ``frozen_credit`` with one that needs the current student.
    """

    def __init__(
        self,
        advantage: Advantage,
        max_ratio: float | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
        frozen_credit: bool = False,
    ) -> None:
        super().__init__(max_ratio, clip, weight, name)
        self.frozen_credit = frozen_credit
        self.advantage = advantage = as_advantage(advantage)
        self.is_positionwise = advantage.is_positionwise
        self.discount = advantage.discount
        seen_by = advantage.divergence or ReverseKL()  # ReverseKL reads log-probs unchanged
        self._student = DrawnOutcome("student", seen_by)
        self._teacher = DrawnOutcome("teacher", seen_by)
        valued = advantage.state_value_of
        if frozen_credit and (valued is not None or isinstance(seen_by, TopK)):
            raise ConfigError(
                f"{self.name}: frozen_credit reads the log-prob that a token was sampled with, and "
                f"{'a state value' if valued is not None else 'a TopK'} needs the current "
                "student's distribution; leave one of them out"
            )
        self._value = (
            ExpectedWeight(valued, advantage.max_log_ratio) if valued is not None else None
        )

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Both sides' log-probabilities of the sampled token, and the state value if needed."""
        value = () if self._value is None else (self._value,)
        return (*super().quantities, self._student, self._teacher, *value)

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the advantage's values, computed row by row."""
        mask = measured.mask(self.sources)
        rows = Rows(measured.row, mask, not self.is_positionwise)
        current = measured[self._student]
        # of a sampled end id, an engine may give the log-prob alone, and the outcome's is needed:
        # this adds the share of all ends; exactly 0 for every other token
        outcome = current - measured[_STUDENT].detach()
        sampled = (measured.sampler_logprobs.to(current.dtype) + outcome).where(mask, current)
        student = rows.split(sampled if self.frozen_credit else current)
        teacher = rows.split(measured[self._teacher])
        value = None if self._value is None else rows.split(measured[self._value])
        of = self.advantage.chunk_credit if measured.has_chunks else self.advantage.credit
        credit = of(student, teacher, rows.mask, value)
        logged = self.advantage.metrics(student, teacher, rows.mask)
        log_ratio = (teacher - student).detach().where(rows.mask, 0.0)
        is_extreme = (log_ratio.abs() > EXTREME_LOG_RATIO).to(log_ratio.dtype)
        logged = {**logged, "log_ratio": log_ratio, "extreme_log_ratio": is_extreme}
        logged["square"] = credit.detach().square()
        return rows.join(credit), {name: rows.join(values) for name, values in logged.items()}


class Rows:
    """Conversion of flattened positions to [rows, tokens] and back.

    Args:
        row: [positions] the row of each position; rows are consecutive.
        mask: [positions] True where the term acts.
        is_split: Whether to separate rows; else all positions are one row.
    """

    def __init__(self, row: Tensor, mask: Tensor, is_split: bool) -> None:
        positions = torch.arange(len(row), device=row.device)
        if not is_split or not len(row):
            self._at = torch.zeros_like(row), positions
            self._shape = (1, len(row))
        else:
            _, number, lengths = row.unique_consecutive(return_inverse=True, return_counts=True)
            starts = lengths.cumsum(0) - lengths
            self._at = number, positions - starts[number]
            self._shape = (len(lengths), int(lengths.max()))
        self.mask = self.split(mask)

    def split(self, values: Tensor) -> Tensor:
        """[positions] → [rows, tokens], zero (False) after a row's end."""
        return values.new_zeros(self._shape).index_put(self._at, values)

    def join(self, values: Tensor) -> Tensor:
        """[rows, tokens] → [positions]."""
        return values[self._at]
