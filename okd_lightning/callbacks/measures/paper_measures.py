"""Further metrics of the OKD paper, optional: UNC, ExAccErr, logit spread, ROUGE-L."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import lightning
from torch import Tensor
from torchmetrics import MeanMetric

from okd_lightning.callbacks.measures.evaluation import EvaluationCallback
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ForwardKL
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.errors import ConfigError
from okd_lightning.losses import DrawnLogProb, ExactDivergence, Measured
from okd_lightning.metrics import (
    ExcessAccumulatedError,
    LogitStd,
    Uncertainty,
    response_uncertainty,
)
from okd_lightning.records.batches import DistillBatch, Example, TrainingRow
from okd_lightning.records.collation import dataset_row, micro_batches, sampled_rows
from okd_lightning.records.noise import NoiseDomain
from okd_lightning.records.requests import Generator, Request, Rollout
from okd_lightning.rewards.rouge import rouge_l
from okd_lightning.rollouts.plan import share
from okd_lightning.training.module import DistillationModule

_FORWARD_KL = ExactDivergence(ForwardKL())
_STUDENT_TARGET, _TEACHER_TARGET = DrawnLogProb("student"), DrawnLogProb("teacher")
_STUDENT_STD, _TEACHER_STD = LogitStd("student"), LogitStd("teacher")


@dataclass(frozen=True)
class _Pass:
    """Inputs of one validation or test.

    Attributes:
        module: The module with student and base teacher.
        data: The data module.
        examples: This rank's prompts with their references.
    """

    module: DistillationModule
    data: RolloutDataModule
    examples: Sequence[Example]

    def alone(self) -> AbstractContextManager[object]:
        """Return a context in which ranks may run the models different numbers of times."""
        return self.module.pair.alone(*self.module.pair.models)


class PaperMeasures(EvaluationCallback):
    """Logs the OKD paper's metrics besides divergences (arXiv 2409.12512), with the base teacher.

    On dataset responses: ``uncertainty`` (UNC, Eq. 4: 1 - the student's probability of the target;
    mean over a response's tokens, then over responses) and ``uncertainty_easy``, ``_medium`` and
    ``_hard`` (thirds of the responses by the teacher's UNC); ``student_logit_std`` and
    ``teacher_logit_std`` (over the vocabulary, mean over tokens). On responses that each model
    samples at temperature 1: ``excess_accumulated_error`` (Eq. 5-7, percent), and ``rouge_l`` of
    the student's against the references (F measure, 0 to 1; a reference is cut at
    max_response_length, like the student's responses). Names start with ``val/`` or ``test/``.

    Slow, because both models generate at every validation.

    Args:
        num_prompts: Number of prompts, from the start of the dataset; None for all.
        seed: Seed of the samples, which are the same at every validation.

    Raises:
        ConfigError: Fewer than 3 prompts, which cannot be divided into thirds.
    """

    measured = (
        *(f"uncertainty{part}" for part in ("", "_easy", "_medium", "_hard")),
        *("student_logit_std", "teacher_logit_std", "excess_accumulated_error", "rouge_l"),
    )

    def __init__(self, num_prompts: int | None = 32, seed: int = 0) -> None:
        if num_prompts is not None and num_prompts < 3:
            raise ConfigError(f"num_prompts must be at least 3 (thirds), got {num_prompts}")
        self.num_prompts = num_prompts
        self.seed = seed

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Refuse a teacher that cannot generate responses of the student's tokenizer.

        Raises:
            ConfigError: The run uses a cached, served or foreign teacher; or another callback logs
                the same metrics.
        """
        super().setup(trainer, pl_module, stage)
        if not isinstance(pl_module, DistillationModule):
            return
        teacher = pl_module.pair.teacher
        if teacher.exists and not teacher.generates:
            raise ConfigError(
                f"PaperMeasures has the teacher generate, and {type(teacher.base).__name__} "
                f"generates no responses: {teacher.base.to_generate}, or leave PaperMeasures out"
            )

    def _log(self, trainer: lightning.Trainer, pl_module: Any, part: str) -> None:
        assert isinstance(pl_module, DistillationModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, RolloutDataModule):
            raise ConfigError("PaperMeasures reads its prompts from a RolloutDataModule")
        if not pl_module.has_teacher:
            raise ConfigError("PaperMeasures compares with a teacher: give --model.teacher")
        examples = [e for e in data.examples(part).examples if e.response_ids][: self.num_prompts]
        if len(examples) < 3:
            raise ConfigError(
                f"PaperMeasures needs 3 {part} prompts with responses, got {len(examples)}"
            )
        own = share(examples, trainer.global_rank, trainer.world_size)
        inputs = _Pass(pl_module, data, own)
        with pl_module.pair.teacher.as_base(), trainer.precision_plugin.forward_context():
            values = {**_on_given(inputs), **_on_written(inputs, self.seed)}
        for name, value in values.items():
            pl_module.log(f"{part}/{name}", value.float(), batch_size=1, rank_zero_only=True)


def _on_given(inputs: _Pass) -> dict[str, Tensor]:
    device = inputs.module.device
    uncertainty = Uncertainty().to(device)
    spreads = {
        name: (MeanMetric().to(device), quantity)
        for name, quantity in (("student", _STUDENT_STD), ("teacher", _TEACHER_STD))
    }
    quantities = (_STUDENT_TARGET, _TEACHER_TARGET, _STUDENT_STD, _TEACHER_STD)
    with inputs.alone():
        for batch in _batches(inputs, [dataset_row(example) for example in inputs.examples]):
            measured = inputs.module.measure(batch, quantities)
            uncertainty.update(
                *(
                    response_uncertainty(measured[target], measured.row, len(batch))
                    for target in (_STUDENT_TARGET, _TEACHER_TARGET)
                )
            )
            for metric, quantity in spreads.values():
                metric.update(measured[quantity])
    found = uncertainty.compute()
    values = {f"uncertainty_{name}": value for name, value in found.items() if name != "all"}
    values["uncertainty"] = found["all"]
    return values | {f"{name}_logit_std": m.compute() for name, (m, _) in spreads.items()}


def _on_written(inputs: _Pass, seed: int) -> dict[str, Tensor]:
    module, device = inputs.module, inputs.module.device
    error = ExcessAccumulatedError(inputs.data.max_response_length).to(device)
    rouge = MeanMetric().to(device)
    generators: tuple[Generator, ...] = ("student", "teacher")
    for generator in generators:
        rollout = _rollout(inputs, generator, seed)
        rows = sampled_rows(inputs.examples, generator, rollout)
        with inputs.alone():
            for batch in _batches(inputs, rows):
                measured = module.measure(batch, (_FORWARD_KL,))
                error.update(*_steps(batch, measured), is_student_prefix=generator == "student")
        if generator == "student":
            for example, response in zip(inputs.examples, rollout, strict=True):
                reference = module.decode(example.response_ids)
                rouge.update(rouge_l(module.decode(response.turns[-1]), reference))
    return {"excess_accumulated_error": error.compute(), "rouge_l": rouge.compute()}


def _rollout(inputs: _Pass, generator: Generator, seed: int) -> Rollout:
    request = Request(
        prompts=tuple(example.prompt_for(generator) for example in inputs.examples),
        sampling=Sampling(),
        noise=NoiseStream(seed, NoiseDomain.PAPER_MEASURES),
        max_new_tokens=inputs.data.max_response_length,
        generator=generator,
    )
    return inputs.module.respond(request)


def _batches(inputs: _Pass, rows: Sequence[TrainingRow]) -> Iterator[DistillBatch]:
    if rows:
        for batch in micro_batches(rows, -(-len(rows) // inputs.data.batch_size)):
            yield batch.to(inputs.module.device)


def _steps(batch: DistillBatch, measured: Measured) -> tuple[Tensor, Tensor]:
    """Return KL(q‖p) at every sampled position, and the number of sampled tokens before it."""
    mask = batch.mask[:, 1:]
    return measured[_FORWARD_KL], (mask.cumsum(1) - 1)[mask]
