"""Task accuracy: greedy answers against the references."""

from __future__ import annotations

from okd_lightning.callbacks.measures.task_score import TaskScore
from okd_lightning.rewards import AnswerMatch
from okd_lightning.rewards.answers import Comparison


class ExactMatch(TaskScore):
    r"""Logs ``val/exact_match`` and ``test/exact_match``: the share of prompts that are solved.

    The student answers greedily; the answer and the data set's response are compared after
    ``pattern`` has cut the final answer out of either. Where it calls tools (``data.tools``), its
    last turn is the answer: neither a tool's result nor an earlier turn counts.

    Args:
        pattern: A regular expression whose first group is the answer (the last match counts), such
            as '#### (.+)'; None takes whole responses.
        num_prompts: How many prompts of the set, from its start; None for all.
        num_val_prompts: Fewer in validation; None for as many as in test.
        compare: "text" for the same characters; "math" for the same mathematics (math-verify):
            1,234 is 1234.00, and \frac12 is 0.5. Without a pattern it finds the answer itself:
            behind the last ####, in \boxed{}, behind "the answer is", or the last number.

    Raises:
        ConfigError: The pattern is no regular expression, or has no group; an unknown compare.
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
