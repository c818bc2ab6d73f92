"""Stop before a broken step: a loss or gradient that is not finite never reaches the weights."""

from __future__ import annotations

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer

from okd_lightning.errors import NonFiniteError
from okd_lightning.module import DistillationModule


class FiniteGuard(Callback):
    """Logs ``train/grad_norm`` and raises before ``optimizer.step`` where it is not finite.

    Gradients are the same on all ranks by then, so that all of them stop together.
    """

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: Optimizer,
    ) -> None:
        """Check the norm of all gradients.

        Raises:
            NonFiniteError: It is NaN or infinite; names the step and the terms.
        """
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            terms = pl_module.terms if isinstance(pl_module, DistillationModule) else []
            losses = {t.name: trainer.callback_metrics.get(f"train/{t.name}") for t in terms}
            shown = ", ".join(f"{n} {float(v)}" for n, v in losses.items() if v is not None)
            raise NonFiniteError(
                f"the gradient norm is {float(norm)} at step {trainer.global_step} "
                f"(losses: {shown or 'unknown'}); the weights are untouched. Lower the learning "
                "rate, or use a divergence that is finite where the teacher gives a token no mass"
            )
        pl_module.log("train/grad_norm", norm, batch_size=1)
