"""Tool calls against golden ones: names, arguments, and both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from okd_lightning.callbacks.answer_scores import Answers, AnswerScores
from okd_lightning.tool_calls import match_tool_calls


class ToolCallScore(AnswerScores):
    """Logs ``tool_call_match``, ``tool_name_match`` and ``tool_arguments_match``, val/ or test/.

    The student answers greedily, and its calls (over all turns, in order) are compared with those
    of the data set's response: the share with the right name, and the share with the right name and
    the right arguments. A call too many or too few counts as wrong. ``tool_call_match`` is the mean
    of both, which is what ``ToolCallMatch`` rewards. Rows whose response calls nothing are left
    out.

    Args:
        num_prompts: How many prompts of the set, from its start; None for all.
        num_val_prompts: Fewer in validation; None for as many as in test.

    Raises:
        ConfigError: No prompts at all.
    """

    measured = ("tool_call_match", "tool_name_match", "tool_arguments_match")

    def score(self, answers: Answers) -> Mapping[str, Sequence[float]]:
        """Shares of each answer's calls."""
        pairs = zip(answers.texts(0, is_last_turn=False), answers.references, strict=True)
        shares = [match_tool_calls(*pair) for pair in pairs]
        names = [math.nan if share is None else share.names for share in shares]
        arguments = [math.nan if share is None else share.arguments for share in shares]
        both = [(one + other) / 2 for one, other in zip(names, arguments, strict=True)]
        return dict(zip(self.measured, (both, names, arguments), strict=True))
