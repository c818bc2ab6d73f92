"""The abstract advantage: one detached value per token from log-probabilities of sampled tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from okd_lightning.divergences import Divergence
from okd_lightning.records.shapes import RowMask, RowValues


class Advantage(ABC):
    """Advantage A in the policy gradient -ρ A ∇log p, one for each token the student sampled.

    A complete one, the reverse-KL reward without tokens whose q/p is below a half:

        @dataclass(frozen=True)
        class Thresholded(Advantage):
            threshold: float = 0.7

            def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
                log_ratio = teacher_logprobs - student_logprobs
                return log_ratio.where(log_ratio > -self.threshold, 0.0).detach()

    Attributes:
        divergence: Divergence whose ``drawn`` reads the sampled tokens' log-probabilities; None to
            read them unchanged.
        state_value_of: Divergence whose E_p[w_f] is computed at each position and passed as
            ``state_value``; None for none.
        max_log_ratio: Clip of the log-ratio within ``state_value``, in nats.
        discount: Weight of a later token's reward in an earlier one's advantage; 0 for none.
        is_positionwise: True if a token's advantage depends on that token alone, so that a row may
            be processed in pieces.
    """

    divergence: Divergence | None = None
    discount: float = 0.0
    is_positionwise: bool = True
    max_log_ratio: float = math.inf

    @property
    def state_value_of(self) -> Divergence | None:
        """None: no state value is needed."""
        return None

    @abstractmethod
    def credit(
        self,
        student_logprobs: RowValues,
        teacher_logprobs: RowValues,
        mask: RowMask,
        state_value: RowValues | None = None,
    ) -> RowValues:
        """Return the advantage of every sampled token.

        Args:
            student_logprobs: [rows, tokens] log p of the sampled tokens (nats), in sampling order.
            teacher_logprobs: [rows, tokens] log q of the same tokens.
            mask: [rows, tokens] True where a token was sampled; other values are arbitrary.
            state_value: [rows, tokens] E_p[w_f] if ``state_value_of`` is a divergence.

        Returns:
            [rows, tokens] nats, larger is better; without gradient.
        """

    def chunk_credit(
        self,
        student_logprobs: RowValues,
        teacher_logprobs: RowValues,
        mask: RowMask,
        state_value: RowValues | None = None,
    ) -> RowValues:
        """Return the advantage of every chunk of text, where the teacher has another tokenizer.

        The arguments are as above, a chunk in place of a token. Where a chunk begins may depend on
        later bytes, so that sums over the rest of a response are biased. The default is for
        advantages without such sums.
        """
        return self.credit(student_logprobs, teacher_logprobs, mask, state_value)

    def metrics(
        self, student_logprobs: Tensor, teacher_logprobs: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        """Return further [rows, tokens] values to average over tokens and log; none by default."""
        del student_logprobs, teacher_logprobs, mask
        return {}
