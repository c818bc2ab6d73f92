"""``best-step=N.ckpt``: where validation liked the student most."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from okd_lightning.errors import ConfigError

MONITORS = (
    "val/reverse_kl",
    "val/on_policy_reverse_kl",
    "val/top_k_reverse_kl",
    "val/cross_entropy",
)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the checkpoints that validation liked most: by default the lowest reverse KL.

    What is watched is ``metric``, or the first of ``MONITORS`` that validation takes: on given
    responses, on the student's own where the data hold prompts alone, through the ids that are
    known of a cached teacher, or cross-entropy where there is no teacher. Where it takes none of
    them nothing is kept.

    Args:
        folder: Where the checkpoints go; by default checkpoints/ of the run's folder.
        metric: A measure of validation, such as val/exact_match.
        mode: Whether a low (min) or a high (max) value is good.
        keep: How many stay.

    Raises:
        ConfigError: keep below 1, or a mode that does not exist.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        metric: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep: int = 1,
    ) -> None:
        if keep < 1:
            raise ConfigError(f"BestCheckpoint: keep must be at least 1, got {keep}")
        if mode not in ("min", "max"):
            raise ConfigError(f"BestCheckpoint: mode is {mode!r}; expected min or max")
        self._folder = None if folder is None else Path(folder)
        self._metric = metric
        self._mode, self._keep = mode, keep
        self._begin(self._folder)

    def _begin(self, folder: Path | None) -> None:
        """Nothing was seen so far."""
        super().__init__(
            folder,
            filename="best-{step}",
            monitor=self._metric or MONITORS[0],
            mode=self._mode,
            save_top_k=self._keep,
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # a run that was killed behind a best one writes it again
        )

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Settle the folder; a run that begins knows nothing of one with another Trainer."""
        own = self._folder or Path(trainer.default_root_dir).absolute() / "checkpoints"
        if stage == "fit" and trainer.global_step == 0:
            self._begin(own)
        self.dirpath = self.dirpath or str(own)
        super().setup(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """Stable, whatever is watched."""
        return type(self).__qualname__

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save if this validation was one of the best so far.

        Raises:
            ConfigError: It has not taken the measure that was asked for.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        wanted = MONITORS if self._metric is None else (self._metric,)
        taken = [name for name in wanted if name in trainer.callback_metrics]
        if self._metric is not None and not taken:
            found = sorted(n for n in trainer.callback_metrics if n.startswith("val/"))
            raise ConfigError(
                f"BestCheckpoint: metric {self._metric!r} was not taken by validation, which took "
                f"{', '.join(found) or 'nothing'}"
            )
        if taken:
            self.monitor = taken[0]
            super().on_validation_end(trainer, pl_module)
