"""A data module whose ranks exchange objects and counts."""

from __future__ import annotations

from typing import Any, cast

import lightning
import torch
from torch import Tensor

from okd_lightning.data.new_module import NewDataModule
from okd_lightning.errors import ConfigError


class CollectiveDataModule(NewDataModule):
    """LightningDataModule with the collective calls of its run."""

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
