"""Comparison of tool calls with reference calls: names, arguments, and both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from okd_lightning.callbacks.measures.answer_scores import Answers, AnswerScores
from okd_lightning.tools.tool_calls import CallShares, match_tool_calls


class ToolCallScore(AnswerScores):
    """Log ``tool_call_match``, ``tool_name_match``, ``tool_arguments_match``, ``tool_calls_equal``.

    The student answers greedily, and its calls over all turns are compared with those of the
    dataset response: the share with the right name, the share with the right name and the right
    arguments, and whether all are equal (``CallShares``). Missing and extra calls count as wrong.
    ``tool_call_match`` is the mean of both shares, the reward of ``ToolCallMatch``. Rows whose
    response has no calls are left out.

    Args:
        num_prompts: Number of prompts, from the start of the dataset; None for all.
        num_val_prompts: A smaller number in validation; None for ``num_prompts``.
        ordered: Compare calls in order; otherwise each with any call of the reference, for parallel
            calls. ``tool_calls_equal`` ignores order in both cases.

    Raises:
        ConfigError: No prompts at all.
    """

    measured = (
        "tool_call_match",
        "tool_name_match",
        "tool_arguments_match",
        "tool_calls_equal",
    )

    def __init__(
        self,
        num_prompts: int | None = None,
        num_val_prompts: int | None = None,
        ordered: bool = True,
    ) -> None:
        super().__init__(num_prompts, num_val_prompts)
        self.ordered = ordered

    def score(self, answers: Answers) -> Mapping[str, Sequence[float]]:
        """Return the shares of each answer's calls."""
        pairs = zip(answers.texts(0, is_last_turn=False), answers.references, strict=True)
        found = [match_tool_calls(*pair, self.ordered) for pair in pairs]
        rows = [(math.nan,) * 4 if shares is None else _measures(shares) for shares in found]
        return dict(zip(self.measured, zip(*rows, strict=True), strict=True)) if rows else {}


def _measures(shares: CallShares) -> tuple[float, ...]:
    mean = (shares.names + shares.arguments) / 2
    return mean, shares.names, shares.arguments, shares.all_equal
