"""Any reward function or text metric as a metric of validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import lightning
from torchmetrics import Metric

from okd_lightning.callbacks.measures.answer_scores import Answers, AnswerScores
from okd_lightning.callbacks.methods.base import snake_case
from okd_lightning.callbacks.methods.reward import as_function
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import RewardError
from okd_lightning.rewards import PlainFunction, RewardFunction, checked_rewards
from okd_lightning.training.module import DistillationModule


class TaskScore(AnswerScores):
    """Logs ``val/<name>`` and ``test/<name>``: the mean score of the student's greedy answers.

    ``TaskScore(RougeL())`` is ROUGE-L (``test/rouge_l``) against the dataset responses. Answers
    that the function cannot score (NaN) are left out.

    In Python, a metric of torchmetrics.text, such as ``TaskScore(CHRFScore())``, is computed from
    the answers and references (texts) of all ranks at once. If it returns several numbers, each is
    logged under its own name, after ``name/`` where a name is given.

    Args:
        function: Scores answers; in Python also a plain function of prompt, response and reference,
            or a torchmetrics Metric of predicted and target texts.
        name: Logged name; by default the function's name in snake case.
        num_prompts: Number of prompts, from the start of the dataset; None for all.
        num_val_prompts: A smaller number in validation; None for ``num_prompts``.

    Raises:
        ConfigError: No prompts at all, or ``function`` is not a function.
    """

    def __init__(
        self,
        function: RewardFunction,
        name: str | None = None,
        num_prompts: int | None = None,
        num_val_prompts: int | None = None,
    ) -> None:
        super().__init__(num_prompts, num_val_prompts)
        self.metric: Metric | None = None
        self._prefix = "" if name is None else f"{name}/"
        self._is_set_up = False
        if isinstance(function, Metric):
            self.metric = deepcopy(function)
            self.metric.sync_on_compute = False  # it gets the texts of all ranks
            self.measured = (name or snake_case(type(function).__name__),)
            return
        self.function = as_function(function)
        inner = self.function
        of = inner.function if isinstance(inner, PlainFunction) else type(inner)
        self.measured = (name or snake_case(getattr(of, "__name__", type(of).__name__)),)

    def score(self, answers: Answers) -> Mapping[str, Sequence[float]]:
        """Return the function's score of each answer.

        Raises:
            RewardError: The function raised, or did not return numbers.
        """
        texts = answers.texts(0, self.function.reads_last_turn)
        chats = [example.chat for example in answers.examples]
        found = checked_rewards(self.function, answers.prompts, texts, answers.references, chats)
        return {self.measured[0]: found}

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Refuse metrics that something else in the run logs under the same names.

        Raises:
            ConfigError: Another callback, or the run itself, logs a metric of the same name.
        """
        super().setup(trainer, pl_module, stage)
        self._is_set_up = True

    @property
    def state_key(self) -> str:
        """Key of its state in a checkpoint: its metric is in it, as a run has several.

        A function that remembers nothing has no state. It gets a key of its own, and so has every
        callback before ``setup``: the Trainer refuses two equal ones at its construction, before
        ``setup`` can name the metric that both log.
        """
        if self.metric is not None or not self._remembers or not self._is_set_up:
            return self._generate_state_key(instance=id(self))
        return self._generate_state_key(measured=self.measured)

    @property
    def _remembers(self) -> bool:
        return type(self.function).remember is not RewardFunction.remember

    def state_dict(self) -> dict[str, Any]:
        """Return the function's remembered scores, the same on all ranks; empty without any."""
        remembered = {} if self.metric is not None else dict(self.function.remembered)
        return {"scores": remembered} if remembered else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the scores of a checkpoint."""
        if self.metric is None:
            self.function.remember(state_dict.get("scores", {}))

    def _score_together(
        self, data: RolloutDataModule, answers: Answers
    ) -> Mapping[str, Sequence[float]]:
        """Return this rank's scores; all ranks remember those that are new."""
        scores = super()._score_together(data, answers)
        for new in data.agreement().gather(self.function.new_scores()):
            self.function.remember(new)
        return scores

    def _log_scores(
        self,
        trainer: lightning.Trainer,
        module: DistillationModule,
        data: RolloutDataModule,
        part: str,
        answers: Answers,
    ) -> None:
        """Log the function's mean score, or the metric of all answers."""
        if self.metric is None:
            super()._log_scores(trainer, module, data, part, answers)
            return
        texts = data.gather((answers.texts(0, is_last_turn=True), answers.references))
        responses = [text for own, _ in texts for text in own]
        references = [text for _, own in texts for text in own]
        found = self._computed(self.metric, responses, references)
        names = tuple(found)
        if names != self.measured:  # known only now; others then see these names
            self.check_names(trainer, module, names)
            self.measured = names
        for name, value in found.items():
            module.log(f"{part}/{name}", value, prog_bar=len(names) == 1, batch_size=1)

    def _computed(
        self, metric: Metric, responses: Sequence[str], references: Sequence[str]
    ) -> dict[str, float]:
        """Return the metric's numbers by name.

        Raises:
            RewardError: It does not accept texts, or does not return numbers.
        """
        name = type(metric).__name__
        metric.reset()
        try:
            metric.update(list(responses), list(references))
            found: Any = metric.compute()
            if not isinstance(found, Mapping):
                return {self.measured[0]: float(found)}
            return {f"{self._prefix}{key}": float(value) for key, value in found.items()}
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise RewardError(
                f"metric {name} cannot be computed from answers and references as texts "
                f"({type(error).__name__}: {error}); expected one of torchmetrics.text, such as "
                "CHRFScore, or a function of prompt, response and reference"
            ) from error
