"""``best-step=N.ckpt``: where validation liked the student most."""

from __future__ import annotations

from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

MONITORS = (
    "val/reverse_kl",
    "val/on_policy_reverse_kl",
    "val/top_k_reverse_kl",
    "val/cross_entropy",
)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoint with the lowest reverse KL to the teacher.

    What is watched is the first of ``MONITORS`` that validation takes: on given responses, on the
    student's own where the data hold prompts alone, through the ids that are known of a cached
    teacher, or cross-entropy where there is no teacher.
    Where it takes none of them nothing is kept.

    Args:
        folder: Where the checkpoint goes.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(
            Path(folder),
            filename="best-{step}",
            monitor=MONITORS[0],
            save_on_train_epoch_end=False,
        )

    @property
    def state_key(self) -> str:
        """Stable, whatever is watched."""
        return type(self).__qualname__

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save if this validation was the best so far."""
        taken = [name for name in MONITORS if name in trainer.callback_metrics]
        if taken:
            self.monitor = taken[0]
            super().on_validation_end(trainer, pl_module)
