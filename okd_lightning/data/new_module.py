"""A LightningDataModule that is constructed from arguments only, never from a checkpoint."""

from __future__ import annotations

from typing import Any, NoReturn

import lightning

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
