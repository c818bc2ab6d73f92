"""Loss of a training step: the acting terms with their factors, and the logged metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.nn import Parameter

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term, WeightedLoss, WeightedTerm
from okd_lightning.losses.reduction import Normalization
from okd_lightning.losses.states import projectors_of
from okd_lightning.records.batches import SOURCES, DistillBatch, LossOutput
from okd_lightning.teachers import trained
from okd_lightning.training.distilled_run import DistilledRun
from okd_lightning.training.sample_age import SampleAge


def acting_terms(
    terms: Sequence[Term],
    batch: DistillBatch,
    step: int,
    accumulate_grad_batches: int,
    world_size: int,
    normalization: Normalization,
) -> list[WeightedTerm]:
    """Return the terms of optimizer step ``step``, each with its weight over its divisor.

    Args:
        terms: All terms of the run.
        batch: A micro-batch of the step, with the step's counts.
        step: The optimizer step, from 0.
        accumulate_grad_batches: Micro-batches per optimizer step.
        world_size: Ranks over which gradients are averaged.
        normalization: Divisor of the sums.

    Raises:
        ConfigError: No term acts, or the batch lacks the token counts of its step.
    """
    acting = [term for term in terms if term.acts_in(step)]
    if not acting:
        raise ConfigError(
            f"no method acts from optimizer step {step} on; end the run there "
            f"(--trainer.max_steps {step}), or leave the last stage's end out"
        )
    windows = (accumulate_grad_batches, world_size)
    weights = [term.weight(step) for term in acting]
    return [
        WeightedTerm(term, weight * normalization.factor(batch, term.sources, *windows), weight)
        for term, weight in zip(acting, weights, strict=True)
    ]


def teaching_window(terms: Sequence[Term]) -> tuple[int, int | None]:
    """Return start and end of the steps that train the online module; end None: the run's end."""
    windows = [term.window for term in terms if term.trains_teacher] or [(0, None)]
    ends = [end for _, end in windows if end is not None]
    return min(start for start, _ in windows), max(ends) if len(ends) == len(windows) else None


def step_means(
    terms: Sequence[WeightedTerm],
    loss: WeightedLoss,
    batch: DistillBatch,
    teachers: Sequence[str] = (),
) -> Mapping[str, Tensor]:
    """Return the micro-batch's contribution to the logged means per token, without gradient.

    In nats per token, independent of the gradient's divisor; where rows choose among ``teachers``,
    also by teacher, with each one's tokens.
    """
    means: dict[str, Tensor] = {}
    counts = batch.step_counts
    assert counts is not None
    for weighted, output in zip(terms, loss.outputs, strict=True):
        term = weighted.term
        count = sum(counts[code] for code in term.source_codes)
        if count:
            parts = {term.name: output.sum, **output.metrics}
            means.update({name: value / count for name, value in parts.items()})
            means["loss"] = means.get("loss", 0) + weighted.weight * means[term.name]
        for number, of_one in enumerate(batch.teacher_counts):
            tokens = sum(of_one[code] for code in term.source_codes)
            if tokens and output.by_teacher is not None:
                means[f"{term.name}/{teachers[number]}"] = output.by_teacher[number] / tokens
    return {**means, **_teacher_tokens(batch, teachers)}


def _teacher_tokens(batch: DistillBatch, teachers: Sequence[str]) -> dict[str, Tensor]:
    """Return the micro-batch's loss tokens of each teacher that has rows in the step."""
    if batch.teacher is None:
        return {}
    tokens = batch.mask[:, 1:].sum(1)
    return {
        f"tokens/{teachers[number]}": (tokens * (batch.teacher == number)).sum().float()
        for number, of_one in enumerate(batch.teacher_counts)
        if any(of_one)
    }


def check_counts(
    terms: Sequence[WeightedTerm], outputs: Sequence[LossOutput], batch: DistillBatch
) -> None:
    """Check that each term sums over all loss tokens of its sources, for which it is divided.

    Raises:
        ConfigError: One sums over other tokens.
    """
    for weighted, output in zip(terms, outputs, strict=True):
        term = weighted.term
        is_own = torch.isin(batch.source, batch.source.new_tensor(term.source_codes))
        own, expected = int(output.count), int(batch.mask[is_own, 1:].sum())
        if own != expected:
            raise ConfigError(
                f"method {term.name} sums over {own} tokens of a batch, but its sources "
                f"({', '.join(term.sources)}) hold {expected}, by which it is divided; give the "
                "tokens that it leaves out the value 0, and do not mask them"
            )


def check_fits(term: Term, others: Sequence[Term]) -> None:
    """Check that a term fits the others of a run.

    Args:
        term: The term to add.
        others: The terms that the run has.

    Raises:
        ConfigError: Its name is reserved or taken.
    """
    if term.name == "loss":
        raise ConfigError("a method cannot be called 'loss': train/loss is the sum of all methods")
    if any(term.name == other.name for other in others):
        raise ConfigError(
            f"two methods of this run are called {term.name!r}; give one of them another name: "
            "--method.name NAME, --trainer.callbacks.name NAME after the callback, or name= in "
            "Python"
        )


def _reduced(strategy: Strategy, sums: Tensor) -> Tensor:
    return cast(Tensor, strategy.reduce(sums, reduce_op="sum"))


class StepLoss:
    """The loss of a run's micro-batches, and the metrics of its optimizer steps.

    Attributes:
        acting: Terms of the last micro-batch.
        trains_teacher: True if one of them trains the online module.
    """

    def __init__(self) -> None:
        self.acting: list[Term] = []
        self.trains_teacher = False
        self._sums: dict[str, Tensor] = {}
        self._shown: dict[str, bool] = {}
        self._sample_age = SampleAge()

    def loss(self, run: DistilledRun, batch: DistillBatch, batch_idx: int) -> Tensor:
        """Return a micro-batch's loss: each term's sum over its divisor of the whole step.

        Args:
            run: The module, within ``training_step``.
            batch: The micro-batch.
            batch_idx: Its number in the epoch.

        Raises:
            ConfigError: No term acts, or the sums of one are not over its sources' tokens.
        """
        trainer = run.trainer
        terms = acting_terms(
            run.terms,
            batch,
            trainer.global_step,
            trainer.accumulate_grad_batches,
            trainer.world_size,
            run.normalization,
        )
        acting = [weighted.term for weighted in terms]
        is_new, self.acting = acting != self.acting, acting
        self.trains_teacher = any(term.trains_teacher for term in acting)
        is_last = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if getattr(trainer.datamodule, "rollout_lag", 0):  # type: ignore[attr-defined]
            watched = self._sample_age.watched(terms)
            loss = self._sample_age.taken(run.pair.loss_of(batch, watched, checks=is_new))
            self._log_age(run, batch, is_last)
        else:
            loss = run.pair.loss_of(batch, terms, checks=is_new)
        if is_new:
            check_counts(terms, loss.outputs, batch)
        names = run.pair.teacher.names if batch.teacher_counts else ()
        self._log(run, batch, step_means(terms, loss, batch, names), is_last)
        return loss.total + self._idle_loss(run)

    def forget(self) -> None:
        """Forget the terms of a run that has ended."""
        self.acting, self.trains_teacher = [], False

    def _idle_loss(self, run: DistilledRun) -> Tensor:
        """Return 0, tied to parameters that no term trains in this step, as DDP expects."""
        own: Iterable[Parameter] = []
        if not self.trains_teacher:
            own = run.pair.teacher.trained_parameters()
        if run.projectors is not None:
            own = [*own, *run.projectors.idle(projectors_of(self.acting))]
        if all(term.reads_states for term in self.acting):  # the head and later layers may be
            own = [*own, *trained(run.student)]
        idle = torch.zeros((), device=run.device)
        if run.pair.placement is not None:
            own = run.pair.placement.tied_to_loss(own)
        for parameter in own:
            idle = idle + 0.0 * parameter.sum()
        return idle

    def _log_age(self, run: DistilledRun, batch: DistillBatch, is_last: bool) -> None:
        """Log the age of the step's samples; all ranks have some, or none has."""
        assert batch.step_counts is not None
        if is_last and batch.step_counts[SOURCES.index("student")]:
            strategy = run.trainer.strategy
            means = self._sample_age.means(partial(_reduced, strategy))
            run.log_dict(means, batch_size=1)

    def _log(
        self, run: DistilledRun, batch: DistillBatch, means: Mapping[str, Tensor], is_last: bool
    ) -> None:
        """Add up the metrics of a step's micro-batches and log them at the last one."""
        run.log_dict(dict(batch.metrics), batch_size=1)
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        if is_last:
            shown = [name for name in self._sums if name.endswith("student_loss")] or ["loss"]
            for name, value in self._sums.items():
                # Lightning refuses another prog_bar of a name: a later stage must not change it
                is_shown = self._shown.setdefault(name, name in shown)
                run.log(
                    f"train/{name}",
                    value,
                    prog_bar=is_shown,
                    on_step=True,
                    reduce_fx="sum",
                    sync_dist=True,
                    batch_size=1,
                )
            self._sums = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Share the terms: they belong to the callbacks of the run."""
        own = type(self)()
        own.acting, own.trains_teacher = list(self.acting), self.trains_teacher
        own._sums = dict(self._sums)
        return own
