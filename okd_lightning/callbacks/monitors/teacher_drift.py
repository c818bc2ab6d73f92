"""Alarm for an adaptive teacher that moves away from the data."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.errors import ConfigError
from okd_lightning.training.module import DistillationModule

DriftAction: TypeAlias = Literal["warn", "freeze", "stop"]


class TeacherDrift(Callback):
    """Compares the adapted teacher's cross-entropy with its base's at every validation.

    If ``val/adapted_teacher_cross_entropy`` is more than ``margin`` above
    ``val/teacher_cross_entropy``, the teacher has moved from the data towards the student. It warns
    once, and again if the drift returns after it has ended.

    Args:
        margin: Allowed difference, in nats per token.
        action: "warn" only warns; "freeze" also stops training the online module for the rest of
            the run; "stop" ends the run.

    Raises:
        ConfigError: A margin that is not above 0.
    """

    def __init__(self, margin: float = 0.2, action: DriftAction = "warn") -> None:
        if not margin > 0:
            raise ConfigError(f"margin must be above 0 nats per token, got {margin}")
        self.margin = margin
        self.action = action
        self.is_frozen = False
        self.is_drifting = False

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Reset for a new run; a resumed run's state is loaded after this."""
        if stage == "fit" and trainer.global_step == 0:
            self.is_frozen = False

    def state_dict(self) -> dict[str, Any]:
        """Return whether the module is frozen, and whether a drift is reported."""
        return {"is_frozen": self.is_frozen, "is_drifting": self.is_drifting}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state: a frozen module stays frozen."""
        self.is_frozen = state_dict["is_frozen"]
        self.is_drifting = state_dict.get("is_drifting", False)  # missing in older checkpoints

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Compare and act."""
        metrics = trainer.callback_metrics
        adapted = metrics.get("val/adapted_teacher_cross_entropy")
        if adapted is None or trainer.state.fn != "fit":
            return
        drift = float(adapted - metrics["val/teacher_cross_entropy"])
        was_drifting, self.is_drifting = self.is_drifting, drift > self.margin
        if was_drifting or not self.is_drifting or self.is_frozen:
            return
        consequence = {
            "warn": "lower method.learning_rate or method.alpha",
            "freeze": "its online module is frozen for the rest of the run",
            "stop": "the run stops here",
        }[self.action]
        rank_zero_warn(
            f"the teacher drifts: at step {trainer.global_step} its cross-entropy on validation is "
            f"{drift:.3f} nats per token above its base's (margin {self.margin}); {consequence}"
        )
        self.is_frozen = self.action == "freeze"
        trainer.should_stop = trainer.should_stop or self.action == "stop"

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: Any,
    ) -> None:
        """Remove the gradient of a frozen module, so that the optimizer skips it."""
        if self.is_frozen:
            assert isinstance(pl_module, DistillationModule)
            assert pl_module.teacher is not None
            for parameter in pl_module.teacher.parameters():
                parameter.grad = None
