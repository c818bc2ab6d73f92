"""``best-step=N.ckpt``: the checkpoints with the best validation metric."""

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
    """Keeps the checkpoints with the best validation metric: by default the lowest reverse KL.

    The metric is ``metric``, or the first of ``MONITORS`` that validation logs: reverse KL on
    dataset responses, on on-policy responses if the data has only prompts, over the known ids of a
    cached teacher, or cross-entropy without a teacher. If it logs none of them, nothing is kept.

    Args:
        folder: Folder of the checkpoints; by default checkpoints/ of the run's folder.
        metric: A validation metric, such as val/exact_match.
        mode: Whether a low (min) or a high (max) value is better.
        keep: Number of checkpoints to keep.

    Raises:
        ConfigError: keep below 1, or an unknown mode.
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
        """Reset to the state before any validation."""
        super().__init__(
            folder,
            filename="best-{step}",
            monitor=self._metric or MONITORS[0],
            mode=self._mode,
            save_top_k=self._keep,
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # a resumed run may write the same checkpoint again
        )

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Set the folder; a new run resets the state of an earlier one."""
        own = self._folder or Path(trainer.default_root_dir).absolute() / "checkpoints"
        if stage == "fit" and trainer.global_step == 0:
            self._begin(own)
        self.dirpath = self.dirpath or str(own)
        super().setup(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """Key of the state, independent of the metric."""
        return type(self).__qualname__

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Save if this validation is one of the best so far.

        Raises:
            ConfigError: It has not logged ``metric``.
        """
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        wanted = MONITORS if self._metric is None else (self._metric,)
        taken = [name for name in wanted if name in trainer.callback_metrics]
        if self._metric is not None and not taken:
            found = sorted(n for n in trainer.callback_metrics if n.startswith("val/"))
            raise ConfigError(
                f"BestCheckpoint: metric {self._metric!r} was not logged by validation, which "
                f"logged {', '.join(found) or 'nothing'}"
            )
        if taken:
            self.monitor = taken[0]
            super().on_validation_end(trainer, pl_module)
