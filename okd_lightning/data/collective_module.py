"""Base of the data module: numbers are checked, and ranks exchange objects and counts."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import lightning
import torch
from torch import Tensor

from okd_lightning.errors import ConfigError


def check_counts(least: int, **counts: int | None) -> None:
    """Refuse settings of the data section below ``least``; None is ignored.

    Raises:
        ConfigError: A setting is too small; the message names the first one.
    """
    for name, value in counts.items():
        if value is not None and value < least:
            raise ConfigError(f"data.{name} must be at least {least}, got {value}")


class CollectiveDataModule(lightning.LightningDataModule):
    """LightningDataModule with the collective calls of its run, constructed from arguments only."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: Lightning's method imports and calls what the file names as hyperparameters.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"a checkpoint holds no data: make {cls.__name__}(train=..., ...) with the run's "
            "arguments; trainer.fit(module, data, ckpt_path=...) restores where it was"
        )

    @property
    def _trainer(self) -> lightning.Trainer:
        if self.trainer is None:
            raise ConfigError(
                f"{type(self).__name__} works inside a Trainer: trainer.fit(module, data)"
            )
        return self.trainer

    def _reduce_sum(self, counts: Tensor) -> Tensor:
        strategy = self._trainer.strategy
        total = strategy.reduce(counts.to(strategy.root_device), reduce_op="sum")
        return cast(Tensor, total).cpu()

    def gather(self, state: Any) -> list[Any]:
        """Collect one object of every rank, on every rank; all ranks call this."""
        if self._trainer.world_size == 1:
            return [state]
        states: list[Any] = [None] * self._trainer.world_size
        torch.distributed.all_gather_object(states, state)
        return states
