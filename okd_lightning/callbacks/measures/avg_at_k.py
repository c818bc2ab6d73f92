"""Task accuracy over several sampled answers per prompt: avg@k and pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from okd_lightning.callbacks.measures.answer_scores import Answers, AnswerScores
from okd_lightning.engines import Sampling
from okd_lightning.errors import ConfigError
from okd_lightning.rewards import AnswerMatch
from okd_lightning.rewards.answers import Comparison


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Return the probability that one of k answers, drawn without replacement, is right.

    1 - C(n - c, k) / C(n, k): unbiased for pass@k with n ≥ k samples, of which c are right (Chen
    et al., arXiv 2107.03374, Eq. 1).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


class AvgAtK(AnswerScores):
    r"""Logs ``avg_at_<k>`` and ``pass_at_<k>`` of k sampled answers, under val/ or test/.

    avg@k is the share of right answers, averaged over prompts. pass@j, for each j of ``pass_at``,
    is the unbiased estimate of the probability that one of j answers is right. The same weights
    give the same samples at every evaluation, independent of batches and ranks.

    Args:
        k: Answers per prompt.
        pattern: See ``ExactMatch``.
        compare: See ``ExactMatch``.
        temperature: Sampling temperature, above 0.
        top_p: Top-p of the sampling; 1 keeps all tokens.
        pass_at: Values of j for which pass@j is logged, k at most; by default k.
        num_prompts: Number of prompts, from the start of the dataset; None for all.
        num_val_prompts: A smaller number in validation; None for ``num_prompts``.
        seed: Keys the sampling noise.

    Raises:
        ConfigError: A number out of its range.
    """

    def __init__(
        self,
        k: int = 8,
        pattern: str | None = None,
        compare: Comparison = "text",
        temperature: float = 1.0,
        top_p: float = 1.0,
        pass_at: list[int] | None = None,
        num_prompts: int | None = None,
        seed: int = 0,
        num_val_prompts: int | None = None,
    ) -> None:
        super().__init__(num_prompts, num_val_prompts)
        if k < 1:
            raise ConfigError(f"k must be at least 1, got {k}")
        self.pass_at = sorted({*([k] if pass_at is None else pass_at)})
        if any(not 1 <= number <= k for number in self.pass_at):
            raise ConfigError(f"pass_at must be from 1 to k {k}, got {pass_at}")
        if temperature <= 0:
            raise ConfigError(
                f"temperature must be above 0, got {temperature}: k greedy answers are one answer "
                "(ExactMatch)"
            )
        self.function = AnswerMatch(pattern, compare)
        self.num_samples = k
        self.sampling = Sampling(temperature, top_p)
        self.seed = seed
        self.measured = (f"avg_at_{k}", *(f"pass_at_{number}" for number in self.pass_at))

    def score(self, answers: Answers) -> Mapping[str, Sequence[float]]:
        """Return both metrics of each prompt; NaN if the reference has no answer."""
        k = self.num_samples
        rights = [
            self.function(answers.prompts, answers.texts(sample, True), answers.references)
            for sample in range(k)
        ]
        correct = [sum(of_prompt) for of_prompt in zip(*rights, strict=True)]
        solved = {
            f"pass_at_{number}": [
                math.nan if math.isnan(count) else pass_at_k(k, int(count), number)
                for count in correct
            ]
            for number in self.pass_at
        }
        return {f"avg_at_{k}": [count / k for count in correct], **solved}
