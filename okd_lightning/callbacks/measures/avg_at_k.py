"""Task accuracy over several sampled answers a prompt: avg@k and pass@k."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from okd_lightning.callbacks.measures.answer_scores import Answers, AnswerScores
from okd_lightning.engines import Sampling
from okd_lightning.errors import ConfigError
from okd_lightning.rewards import AnswerMatch
from okd_lightning.rewards.answers import Comparison


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that one of k answers, drawn without replacement from those there are, is right.

    1 - C(n - c, k) / C(n, k): unbiased for pass@k with n ≥ k samples, of which c are right (Chen
    et al., arXiv 2107.03374, Eq. 1).
    """
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


class AvgAtK(AnswerScores):
    r"""Logs ``avg_at_<k>`` and ``pass_at_<k>`` of k sampled answers a prompt, under val/ or test/.

    avg@k is the share of the answers that are right, averaged over prompts; pass@j, for each j of
    ``pass_at``, the unbiased estimate of how often one of j answers is right. The samples are the
    same at every evaluation of the same weights, whatever the batches and ranks.

    Args:
        k: Answers a prompt.
        pattern: See ``ExactMatch``.
        compare: See ``ExactMatch``.
        temperature: Of the answers, above 0.
        top_p: Of the answers; 1 keeps all tokens.
        pass_at: For which numbers of answers pass@ is logged, k at most; by default k.
        num_prompts: How many prompts of the set, from its start; None for all.
        num_val_prompts: Fewer in validation; None for as many as in test.
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
        """Both measures of each prompt; NaN where the reference gives no answer."""
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
