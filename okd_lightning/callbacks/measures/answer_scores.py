"""Base of task metrics: the student answers the prompts of a dataset, and the answers are scored.

Prompts are distributed over the ranks. The noise of a sample depends only on the seed, the row's
number in its dataset and the sample's number, so that ranks and batches do not change results.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch

from okd_lightning.callbacks.measures.evaluation import EvaluationCallback
from okd_lightning.data import RolloutDataModule
from okd_lightning.data.progress import rollout_progress
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.records.batches import Example
from okd_lightning.records.noise import NoiseDomain
from okd_lightning.records.requests import Generator, Prompt, Request, Rollout
from okd_lightning.rollouts.generation import naming_the_prompts
from okd_lightning.rollouts.plan import share
from okd_lightning.training.module import DistillationModule


@dataclass(frozen=True)
class Answers:
    """Prompts and the student's answers.

    Attributes:
        examples: The prompts with their references.
        turns: Texts of the student's turns, by example and by sample; several turns if it called
            tools.
    """

    examples: Sequence[Example]
    turns: Sequence[Sequence[Sequence[str]]]

    def texts(self, sample: int, is_last_turn: bool) -> list[str]:
        """Return one answer per example: its last turn, or all turns joined by line breaks."""
        rows = [samples[sample] for samples in self.turns]
        return ["\n".join(turns[-1:] if is_last_turn else turns) for turns in rows]

    @property
    def prompts(self) -> list[str]:
        """The prompts as text."""
        return [example.prompt for example in self.examples]

    @property
    def references(self) -> list[str]:
        """The dataset responses."""
        return [example.response for example in self.examples]


class AnswerScores(EvaluationCallback):
    """Generates the student's answers to prompts, and logs the means of ``score`` over them.

    A complete subclass:

        class Length(AnswerScores):
            measured = ("answer_length",)

            def score(self, answers):
                return {"answer_length": [len(text) for text in answers.texts(0, True)]}

    Args:
        num_prompts: Number of prompts, from the start of the dataset; None for all.
        num_val_prompts: A smaller number in validation, to save time; None for ``num_prompts``.

    Raises:
        ConfigError: No prompts at all, or more in validation than otherwise.
    """

    num_samples: int = 1
    sampling: Sampling = Sampling(temperature=0)
    seed: int = 0

    def __init__(self, num_prompts: int | None = None, num_val_prompts: int | None = None) -> None:
        limits = {"num_prompts": num_prompts, "num_val_prompts": num_val_prompts}
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ConfigError(f"{name} must be at least 1, got {limit}")
        if num_prompts is not None and (num_val_prompts or 1) > num_prompts:
            raise ConfigError(
                f"num_val_prompts {num_val_prompts} is above num_prompts {num_prompts}, which "
                "holds for validation too; raise num_prompts or leave it out"
            )
        self._limits = {"test": num_prompts, "val": num_val_prompts or num_prompts}

    @abstractmethod
    def score(self, answers: Answers) -> Mapping[str, Sequence[float]]:
        """Score this rank's answers.

        Returns:
            Scores by name (the names of ``measured``), one per example; NaN where there is none.
        """

    def _log(self, trainer: lightning.Trainer, pl_module: Any, part: str) -> None:
        assert isinstance(pl_module, DistillationModule)
        name = type(self).__name__
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, RolloutDataModule):
            raise ConfigError(f"{name} reads its prompts from a RolloutDataModule")
        examples = [e for e in data.examples(part).examples if e.response][: self._limits[part]]
        if not examples:
            raise ConfigError(
                f"{name} has nothing to compare with: no row of --data.{part} has a response "
                f"(column {data.columns.response!r}; another name: --data.response_column)"
            )
        own = list(share(examples, trainer.global_rank, trainer.world_size))
        rollout = self._generate(trainer, pl_module, data, own)
        turns = [[pl_module.decode(ids) for ids in response.turns] for response in rollout]
        samples = [turns[i : i + self.num_samples] for i in range(0, len(turns), self.num_samples)]
        self._log_scores(trainer, pl_module, data, part, Answers(own, samples))

    def _log_scores(
        self,
        trainer: lightning.Trainer,
        module: DistillationModule,
        data: RolloutDataModule,
        part: str,
        answers: Answers,
    ) -> None:
        """Log the mean of each metric over all ranks' answers."""
        scores = self._score_together(data, answers)
        name = type(self).__name__
        for measure in self.measured:
            found = [value for value in scores.get(measure, ()) if not math.isnan(value)]
            counts = torch.tensor([sum(found), len(found)], dtype=torch.float32)
            total = trainer.strategy.reduce(counts.to(module.device), reduce_op="sum")
            if not total[1]:
                raise ConfigError(
                    f"{name} cannot score a single answer to --data.{part}: {measure} is not a "
                    "number for any of them; see whether the responses are what it compares with"
                )
            module.log(
                f"{part}/{measure}",
                total[0] / total[1],
                prog_bar=measure == self.measured[0],
                batch_size=1,
                sync_dist=True,  # equal on all ranks, which all read it for the best checkpoint
            )

    def _score_together(
        self, data: RolloutDataModule, answers: Answers
    ) -> Mapping[str, Sequence[float]]:
        """Return this rank's scores; an error on one rank is raised on all ranks."""
        scores: Mapping[str, Sequence[float]] = {}
        problem = None
        try:
            scores = self.score(answers) if answers.examples else {}
        except RewardError as error:
            problem = str(error)
        for found in data.agreement().gather(problem):
            if found is not None:
                raise RewardError(found)
        return scores

    def _generate(
        self,
        trainer: lightning.Trainer,
        module: DistillationModule,
        data: RolloutDataModule,
        examples: Sequence[Example],
    ) -> Rollout:
        """Generate every sample of every example; a stop request stops all ranks together."""
        prompts = sampled_prompts(examples, self.num_samples)
        agreement = data.agreement()

        def generate() -> Rollout:
            shown = rollout_progress(trainer, "student answers", len(prompts))
            with shown as progress:
                request = Request(
                    prompts=prompts,
                    sampling=self.sampling,
                    noise=NoiseStream(self.seed, NoiseDomain.TASK_MEASURES),
                    max_new_tokens=data.max_response_length,
                    progress=agreement.progress(progress),
                )
                with naming_the_prompts(request):
                    return module.respond(request)

        return agreement.together(generate)


def sampled_prompts(examples: Sequence[Example], num_samples: int) -> tuple[Prompt, ...]:
    """Return every prompt ``num_samples`` times in succession, with sample numbers."""
    numbers = range(num_samples)
    return tuple(example.prompt_for("student", i) for example in examples for i in numbers)


def greedy_answers(
    module: DistillationModule,
    data: RolloutDataModule,
    examples: list[Example],
    generator: Generator = "student",
) -> list[str]:
    """Return the greedy responses (their last turns) of the student or the teacher, as text."""
    request = Request(
        prompts=tuple(example.prompt_for(generator) for example in examples),
        sampling=Sampling(temperature=0),
        noise=NoiseStream(0, 0),
        max_new_tokens=data.max_response_length,
        generator=generator,
    )
    return [module.decode(response.turns[-1]) for response in module.respond(request)]
