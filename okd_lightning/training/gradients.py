"""Gradients between backward pass and optimizer step: checked, then clipped.

A non-finite loss or gradient never reaches the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from okd_lightning.errors import ConfigError, NonFiniteError
from okd_lightning.losses import Term
from okd_lightning.losses.states import projectors_of
from okd_lightning.sharding import whole
from okd_lightning.teachers import trained
from okd_lightning.training.distilled_run import DistilledRun


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
        """Check the loss and the norm of all gradients.

        Raises:
            NonFiniteError: One is NaN or infinite; the message names the step and the terms.
        """
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
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
    is_finite = bool(torch.nn.utils.get_total_norm(trained, torch.inf).isfinite())
    if trainer.strategy.reduce_boolean_decision(is_finite, all=True):
        return "are untouched"
    return "hold NaN or infinite values from a step before: resume from the last checkpoint"


def _is_rescaled(trainer: lightning.Trainer) -> bool:
    """Return whether a loss scaler skips steps with infinite gradients, and can lower its scale."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler is not None and scaler.get_scale() > 1


def clip_by_side(
    run: DistilledRun, limit: float | None, algorithm: str | None, acting: Sequence[Term]
) -> bool:
    """Clip student and projectors by the Trainer's value and the online module by its own norm.

    Args:
        run: The module.
        limit: The Trainer's gradient_clip_val.
        algorithm: The Trainer's gradient_clip_algorithm.
        acting: Terms of this step. Gradients of an online module and of projectors that none of
            them trains are removed: the optimizer skips their weights and moments, and counts no
            step for them.

    Returns:
        False where the whole module is left to the Trainer's own clipping.

    Raises:
        ConfigError: The Trainer clips values, and the online module a norm.
    """
    own, idle = run.pair.teacher.online_module, list[nn.Parameter]()
    if not any(term.trains_teacher for term in acting):
        idle = run.pair.teacher.trained_parameters()
    if run.projectors is not None:
        idle = [*idle, *run.projectors.idle(projectors_of(acting))]
    for parameter in idle:
        parameter.grad = None
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
