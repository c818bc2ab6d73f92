"""A LightningDataModule that is made of arguments given now, never of what a checkpoint says."""

from __future__ import annotations

from typing import Any, NoReturn

import lightning

from okd_lightning.errors import ConfigError


class NewDataModule(lightning.LightningDataModule):
    """Lightning's, without its way to build one out of a file."""

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: Lightning's own imports and calls what the file names as its hyperparameters.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"a checkpoint holds no data: make {cls.__name__}(train=..., ...) with the run's "
            "arguments; trainer.fit(module, data, ckpt_path=...) restores where it was"
        )
