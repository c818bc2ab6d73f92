"""The contract of an advantage: log-probs of drawn tokens in, one detached credit a token out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from okd_lightning.divergences import Divergence
from okd_lightning.records.shapes import RowMask, RowValues


class Advantage(ABC):
    """What -ρ A ∇log p is to be weighted with, for each token that the student drew.

    A complete one, the reverse-KL reward with every token below half its teacher's odds ignored:

        @dataclass(frozen=True)
        class Thresholded(Advantage):
            threshold: float = 0.7

            def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
                log_ratio = teacher_logprobs - student_logprobs
                return log_ratio.where(log_ratio > -self.threshold, 0.0).detach()

    Attributes:
        divergence: How the drawn tokens' log-probs are read (``Divergence.drawn``), or None for
            as they are.
        state_value_of: The divergence whose E_p[w_f] a position is to be measured and handed over
            as ``state_value``, or None.
        max_log_ratio: The clip of the log-ratio within ``state_value``, in nats.
        is_positionwise: Whether a token's credit depends on that token alone, so that a row may be
            cut into pieces.
    """

    divergence: Divergence | None = None
    is_positionwise: bool = True
    max_log_ratio: float = math.inf

    @property
    def state_value_of(self) -> Divergence | None:
        """No state value is needed."""
        return None

    @abstractmethod
    def credit(
        self,
        student_logprobs: RowValues,
        teacher_logprobs: RowValues,
        mask: RowMask,
        state_value: RowValues | None = None,
    ) -> RowValues:
        """The credit of every drawn token.

        Args:
            student_logprobs: [rows, tokens] log p of the drawn tokens (nats), in drawn order.
            teacher_logprobs: [rows, tokens] log q of the same tokens.
            mask: [rows, tokens] True where a token was drawn; what lies elsewhere is arbitrary.
            state_value: [rows, tokens] E_p[w_f] where ``state_value_of`` asks for it.

        Returns:
            [rows, tokens] nats, larger is better; without gradient.
        """

    def metrics(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Further [rows, tokens] values to be averaged over tokens and logged; none by default."""
        del student_logprobs, teacher_logprobs, mask
        return {}
