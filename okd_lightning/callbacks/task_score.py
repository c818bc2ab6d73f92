"""Any reward function as a measure of validation and test: what training may use, test can say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from okd_lightning.advantages import PlainFunction, RewardFunction, checked_rewards
from okd_lightning.callbacks.answer_scores import Answers, AnswerScores
from okd_lightning.callbacks.base import snake_case
from okd_lightning.callbacks.reward import as_function


class TaskScore(AnswerScores):
    """Logs ``val/<name>`` and ``test/<name>``: the mean score of the student's greedy answers.

    ``TaskScore(RougeL())`` is ROUGE-L (``test/rouge_l``) against the data set's responses. Answers
    that the function cannot score (NaN) are left out.

    Args:
        function: Scores answers; in Python also a plain function of prompt, response and reference.
        name: What it is logged as; by default the function's own name, in snake case.
        num_prompts: How many prompts of the set, from its start; None for all.
        num_val_prompts: Fewer in validation; None for as many as in test.

    Raises:
        ConfigError: No prompts at all, or something that is no function.
    """

    def __init__(
        self,
        function: RewardFunction,
        name: str | None = None,
        num_prompts: int | None = None,
        num_val_prompts: int | None = None,
    ) -> None:
        super().__init__(num_prompts, num_val_prompts)
        self.function = as_function(function)
        inner = self.function
        of = inner.function if isinstance(inner, PlainFunction) else type(inner)
        self.measured = (name or snake_case(getattr(of, "__name__", type(of).__name__)),)

    def score(self, answers: Answers) -> Mapping[str, Sequence[float]]:
        """What the function says of each answer.

        Raises:
            RewardError: It raised, or returned something else than numbers.
        """
        texts = answers.texts(0, self.function.reads_last_turn)
        found = checked_rewards(self.function, answers.prompts, texts, answers.references)
        return {self.measured[0]: found}
