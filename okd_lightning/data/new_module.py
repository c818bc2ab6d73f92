"""A LightningDataModule that is constructed from arguments only, and works inside a Trainer."""

from __future__ import annotations

from typing import Any, NoReturn, cast

import lightning
import torch
from torch import Tensor

from okd_lightning.errors import ConfigError


class NewDataModule(lightning.LightningDataModule):
    """LightningDataModule without construction from a checkpoint file."""

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
            raise ConfigError("RolloutDataModule works inside a Trainer: trainer.fit(module, data)")
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
