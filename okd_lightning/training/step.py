"""A training step: the loss of its terms, its logged metrics, and its gradients.

Between backward pass and optimizer step the gradients are checked, then clipped: a non-finite loss
or gradient never reaches the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Self, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer

from okd_lightning.errors import ConfigError, NonFiniteError
from okd_lightning.losses import Term, WeightedLoss, WeightedTerm
from okd_lightning.losses.reduction import Normalization
from okd_lightning.losses.states import projectors_of
from okd_lightning.records.batches import SOURCES, DistillBatch, LossOutput
from okd_lightning.sharding import whole
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
    """The loss of a run's micro-batches, and the metrics and clipping of its optimizer steps.

    It sets the module's ``acting``.
    """

    def __init__(self) -> None:
        self._has_idle = False  # whether no acting term trains some of the parameters
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
        is_new, run.acting = acting != run.acting, acting
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

    def _idle_parameters(self, run: DistilledRun) -> list[Parameter]:
        """Return the trained parameters of online module and projectors that no term trains.

        With FSDP2 they are other objects in the forward pass than after the backward pass.
        """
        idle: list[Parameter] = []
        if not any(term.trains_teacher for term in run.acting):
            idle += run.pair.teacher.trained_parameters()
        if run.projectors is not None:
            idle += run.projectors.idle(projectors_of(run.acting))
        return idle

    def _idle_loss(self, run: DistilledRun) -> Tensor:
        """Return 0, tied to parameters that no term trains in this step, as DDP expects."""
        tied: Iterable[Parameter] = self._idle_parameters(run)
        self._has_idle = bool(tied)
        if all(term.reads_states for term in run.acting):  # the head and later layers may be
            tied = [*tied, *trained(run.student)]
        if run.pair.placement is not None:
            tied = run.pair.placement.tied_to_loss(tied)
        idle = torch.zeros((), device=run.device)
        for parameter in tied:
            idle = idle + 0.0 * parameter.sum()
        return idle

    def clip(self, run: DistilledRun, limit: float | None, algorithm: str | None) -> bool:
        """Clip student and projectors by the Trainer's value, the online module by its own norm.

        Gradients of an online module and of projectors that no acting term trains are removed: the
        optimizer skips their weights and moments, and counts no step for them.

        Args:
            run: The module.
            limit: The Trainer's gradient_clip_val.
            algorithm: The Trainer's gradient_clip_algorithm.

        Returns:
            False where the whole module is left to the Trainer's own clipping.

        Raises:
            ConfigError: The Trainer clips values, and the online module a norm.
        """
        for parameter in self._idle_parameters(run) if self._has_idle else ():
            parameter.grad = None
        own = run.pair.teacher.online_module
        if own is None:
            return False
        if algorithm == "value":
            if own.clip_norm:
                raise ConfigError(
                    f"clip_norm {own.clip_norm} of the online module is a norm, and "
                    "trainer.gradient_clip_algorithm value clips no norms: leave one of them out"
                )
            return False
        student = [*trained(run.student), *trained(run.projectors)]
        for parameters, norm in ((student, limit), (trained(run.teacher), own.clip_norm or limit)):
            if norm:
                clip_grad_norm_(parameters, norm)
        return True

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
        """Copy the sums."""
        own = type(self)()
        own._sums = dict(self._sums)
        return own


class FiniteGuard(Callback):
    """Stop before a step with a non-finite loss or gradient norm; logs ``train/grad_norm``.

    Loss and gradients are equal on all ranks at this point, so all ranks stop together. Where a
    loss scaler (precision 16-mixed) has overflowed, it skips the step itself and lowers its scale:
    this is not an error, unless the scale cannot be lowered any more.
    """

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: Optimizer,
    ) -> None:
        """Check the loss and the norm of the gradients of all parameters that are stepped.

        Raises:
            NonFiniteError: One is NaN or infinite; the message names the step and the terms.
        """
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in stepped if p.grad is not None]
        norm = whole(get_total_norm(gradients))
        # an infinite divergence has a finite gradient: its infinite part is constant
        loss = trainer.callback_metrics.get("train/loss", norm)
        if torch.isfinite(loss) and not torch.isfinite(norm) and _is_rescaled(trainer):
            return
        if not (torch.isfinite(norm) and torch.isfinite(loss)):
            terms = getattr(pl_module, "terms", [])
            losses = {t.name: trainer.callback_metrics.get(f"train/{t.name}") for t in terms}
            shown = ", ".join(f"{n} {float(v)}" for n, v in losses.items() if v is not None)
            is_gradient = not torch.isfinite(norm)
            broken = f"the {'gradient norm' if is_gradient else 'loss'} is "
            broken += str(float(norm if is_gradient else loss))
            raise NonFiniteError(
                f"{broken} at step {trainer.global_step} (losses: {shown or 'unknown'}); the "
                f"weights {_state_of_weights(trainer, pl_module)}. Lower the learning rate, or use "
                "a divergence that is finite where the teacher gives a token no mass"
            )
        pl_module.log("train/grad_norm", norm, batch_size=1)


def _state_of_weights(trainer: lightning.Trainer, module: lightning.LightningModule) -> str:
    """Describe the weights, the same on all ranks: "untouched" only if they are finite on each."""
    trained = [whole(p.detach()) for p in module.parameters() if p.requires_grad]
    is_finite = bool(get_total_norm(trained, torch.inf).isfinite())
    if trainer.strategy.reduce_boolean_decision(is_finite, all=True):
        return "are untouched"
    return "hold NaN or infinite values from a step before: resume from the last checkpoint"


def _is_rescaled(trainer: lightning.Trainer) -> bool:
    """Return whether a loss scaler skips steps with infinite gradients, and can lower its scale."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1
