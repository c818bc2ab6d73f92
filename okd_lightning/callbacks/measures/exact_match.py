"""Task accuracy: greedy answers against the references."""

from __future__ import annotations

from okd_lightning.callbacks.measures.task_score import TaskScore
from okd_lightning.rewards import AnswerMatch
from okd_lightning.rewards.answers import Comparison


class ExactMatch(TaskScore):
    r"""Logs ``val/exact_match`` and ``test/exact_match``: the share of solved prompts.

    The student answers greedily. Answer and dataset response are compared after ``pattern`` has
    extracted the final answer of both. With tools (``data.tools``), the answer is the last turn:
    tool results and earlier turns do not count.

    Args:
        pattern: A regular expression whose first group is the answer (the last match counts), such
            as '#### (.+)'; None takes whole responses.
        num_prompts: Number of prompts, from the start of the dataset; None for all.
        num_val_prompts: A smaller number in validation; None for ``num_prompts``.
        compare: "text" for the same characters; "math" for the same mathematics (math-verify):
            1,234 is 1234.00, and \frac12 is 0.5. Without a pattern it finds the answer itself:
            after the last ####, in \boxed{}, after "the answer is", or the last number.

    Raises:
        ConfigError: The pattern is not a regular expression, or has no group; an unknown compare.
    """

    def __init__(
        self,
        pattern: str | None = None,
        num_prompts: int | None = None,
        compare: Comparison = "text",
        num_val_prompts: int | None = None,
    ) -> None:
        function = AnswerMatch(pattern, compare)
        super().__init__(function, "exact_match", num_prompts, num_val_prompts)
