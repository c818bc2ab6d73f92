"""The brick of every sampled method: a credit for the tokens that the student drew itself."""

from __future__ import annotations

import math
from abc import abstractmethod

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
from okd_lightning.training.safeguards.vital_signs import EXTREME_LOG_RATIO

_STUDENT = DrawnLogProb("student")


class PolicyGradientCallback(DistillationCallback):
    """Minimise -Σ ρ A over the tokens of the student's own responses; abstract in A.

    Gradient flows to the student through ρ alone, the credit A is a constant. One optimizer step a
    rollout is strictly on-policy; with larger chunks (``data.prompts_per_rollout``) ρ corrects for
    what the student has learned since it wrote. Logged besides the loss: ``sampler_gap``, the mean
    |log p_θ - log p_sampler| in nats.

    Args:
        max_ratio: Truncation of ρ; inf for off.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.
    """

    sources: tuple[Source, ...] = ("student",)
    on_policy_fraction: float | None = 1.0

    def __init__(
        self,
        max_ratio: float = math.inf,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.ratio = ImportanceRatio(max_ratio, clip)

    @abstractmethod
    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """[positions] A (nats, zero off this term's rows), and [positions] values to be logged."""

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The student's log-prob of the drawn token."""
        return (_STUDENT,)

    def loss(self, measured: Measured) -> LossOutput:
        """The sum of -ρ A over the student's own tokens."""
        mask = measured.mask(self.sources)
        logprobs, sampler = measured[_STUDENT], measured.sampler_logprobs
        sampler = sampler.to(logprobs.dtype).where(mask, logprobs.detach())
        credit, logged = self.credit(measured)
        logged = {**logged, **self.ratio.metrics(logprobs, sampler)}
        if credit.shape != mask.shape:
            raise ConfigError(
                f"{self.name}: credit returned a Tensor of shape {list(credit.shape)} for "
                f"{len(mask)} positions; expected one number a position"
            )
        if credit.requires_grad:
            raise ConfigError(
                f"{self.name}: the credit carries a gradient. Differentiated directly a sampled "
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
    """Policy gradient with an ``Advantage`` of the drawn tokens' log-probs.

    Logged besides: ``<name>_log_ratio``, the mean of log teacher - log student, and
    ``<name>_extreme_log_ratio``, the share of tokens where it is more than 10 nats either way.

    Args:
        advantage: From student's and teacher's log-probs to a credit.
        max_ratio: Truncation of ρ; inf for off.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.
        frozen_credit: The credit reads the log-probs that the student's tokens were sampled with,
            and not the current ones: the same where ρ = 1, and elsewhere the credit that tinker and
            verl compute once a rollout batch. At a sampling temperature other than 1 they are
            those of the tempered distribution.

    Raises:
        ConfigError: Something that is no advantage, or one without a detached, finite credit of the
            log-probs' shape; a frozen credit that needs the current student.
    """

    def __init__(
        self,
        advantage: Advantage,
        max_ratio: float = math.inf,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
        frozen_credit: bool = False,
    ) -> None:
        super().__init__(max_ratio, clip, weight, name)
        self.frozen_credit = frozen_credit
        self.advantage = advantage = as_advantage(advantage)
        self.is_positionwise = advantage.is_positionwise
        seen_by = advantage.divergence or ReverseKL()  # which reads a token as it is
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
        """Both sides' log-probs of the drawn token, and the state's value where it is needed."""
        value = () if self._value is None else (self._value,)
        return (*super().quantities, self._student, self._teacher, *value)

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """The advantage's, row by row."""
        mask = measured.mask(self.sources)
        rows = Rows(measured.row, mask, not self.is_positionwise)
        current = measured[self._student]
        sampled = measured.sampler_logprobs.to(current.dtype).where(mask, current)
        student = rows.split(sampled if self.frozen_credit else current)
        teacher = rows.split(measured[self._teacher])
        value = None if self._value is None else rows.split(measured[self._value])
        credit = self.advantage.credit(student, teacher, rows.mask, value)
        logged = self.advantage.metrics(student, teacher, rows.mask)
        log_ratio = (teacher - student).detach().where(rows.mask, 0.0)
        is_extreme = (log_ratio.abs() > EXTREME_LOG_RATIO).to(log_ratio.dtype)
        logged = {**logged, "log_ratio": log_ratio, "extreme_log_ratio": is_extreme}
        logged["square"] = credit.detach().square()
        return rows.join(credit), {name: rows.join(values) for name, values in logged.items()}


class Rows:
    """Positions laid end to end, as [rows, tokens] and back.

    Args:
        row: [positions] the row of each; rows stand one after the other.
        mask: [positions] True where the term acts.
        is_split: Whether rows are told apart; else all positions are one row.
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
        """[positions] → [rows, tokens], zero (False) behind a row's end."""
        return values.new_zeros(self._shape).index_put(self._at, values)

    def join(self, values: Tensor) -> Tensor:
        """[rows, tokens] → [positions]."""
        return values[self._at]
