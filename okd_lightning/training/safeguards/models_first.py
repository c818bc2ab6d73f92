"""Construction of both models after all checks, and before other callbacks' ``setup``.

Lightning calls ``setup`` of the data module, of the callbacks in their order, and of the module,
and only then ``configure_model``. Callbacks that copy, average or prune the module in ``setup``
would find it empty. The order here:

1. the data module's ``setup``;
2. callbacks with ``precedes_models``: methods register their terms, measures check themselves;
3. ``ModelsFirst``: it checks the run and sets how checkpoints are written, the data is read (broken
   rows are reported before any weights are loaded), and the module builds its models;
4. all other callbacks, the module's ``setup``, and ``configure_model``, which finds them built.

Where the loaders are not a RolloutDataModule's, a check of their batches comes first of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning
from lightning.pytorch.callbacks import (
    Callback,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from okd_lightning.checkpoints.io import use_durable_checkpoints
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.models import check_precision
from okd_lightning.records.batches import DistillBatch
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.training.distilled_run import distilled_run
from okd_lightning.training.lightning_privates import is_compiled
from okd_lightning.training.optimizers import float16_refusal
from okd_lightning.training.pair import Pair
from okd_lightning.training.safeguards.idle_options import warn_of_idle_options

_NEED_WHOLE_MODELS = (ModelPruning, StochasticWeightAveraging, WeightAveraging)


class _ForeignBatches(Callback):
    """Refuses batches of other loaders, before any other callback reads them.

    Lightning's transfer hooks, where this could be checked too, belong to the data module.
    """

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Refuse a batch that is not a DistillBatch.

        Raises:
            ConfigError: The batch is another one; the message says how to make one.
        """
        if not isinstance(batch, DistillBatch):
            raise ConfigError(
                f"a batch is a {type(batch).__name__}; expected a DistillBatch: fit on a "
                "RolloutDataModule, or give a DataLoader a collate_fn that makes DistillBatch "
                "objects (docs/concepts/extending.md, your own batches)"
            )

    on_validation_batch_start = on_train_batch_start
    on_test_batch_start = on_train_batch_start
    on_predict_batch_start = on_train_batch_start


class ModelsFirst(Callback):
    """Callback that builds a DistillationModule's models, in the contexts in which Lightning would.

    Under fsdp2 the models are built and sharded later, and callbacks that copy or change whole
    models are refused.
    """

    precedes_models = True

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Check the run, read the data, then build the models.

        Raises:
            OKDLightningError: See ``check_run``, ``RolloutDataModule.read_ahead`` and
                ``configure_model``; or a callback that needs whole models, under fsdp2.
        """
        run = distilled_run(pl_module)
        assert run is not None
        check_run(pl_module, run.pair, stage)
        use_durable_checkpoints(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, RolloutDataModule):
            data.read_ahead(stage)
        if stage != "fit":
            warn_of_idle_options(trainer, pl_module, stage)
        if isinstance(trainer.strategy, FSDP2Strategy):
            _check_sharded(trainer.callbacks)  # type: ignore[attr-defined]
            return
        # on a CPU torch's function modes change nothing and slow every operation of trial passes
        is_on_cpu = trainer.strategy.root_device.type == "cpu"
        with (
            nullcontext() if is_on_cpu else trainer.strategy.tensor_init_context(),
            trainer.strategy.model_sharded_context(),
            trainer.precision_plugin.module_init_context(),
        ):
            pl_module.configure_model()
        run.frozen_parts.hide()

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Warn of options without effect; whether the run is resumed is known only here.

        An epoch that is resumed in its middle does not call ``on_train_epoch_start``, where
        ``StochasticWeightAveraging`` installs its schedule: it is called here.
        """
        warn_of_idle_options(trainer, pl_module, "fit")
        if trainer.fit_loop.restarted_mid_epoch:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, StochasticWeightAveraging):
                    callback.on_train_epoch_start(trainer, pl_module)

    def teardown(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Let the module list all its weights again, even where copies of it were averaged."""
        run = distilled_run(pl_module)
        assert run is not None
        run.frozen_parts.show(is_run_over=True)


def check_run(module: lightning.LightningModule, pair: Pair, stage: str) -> None:
    """Check everything that needs no models.

    Args:
        module: A DistillationModule within a Trainer.
        pair: Its pair.
        stage: "fit", "validate", "test" or "predict".

    Raises:
        ConfigError: One of Lightning's "true" precisions (models are loaded in their own number
            format), float16 weights that would be trained, a negative clip norm, or a module that
            torch.compile wraps.
    """
    if stage == "fit" and pair.dtype == "float16" and pair.student_adapter is None:
        raise ConfigError(float16_refusal("the student"))
    check_precision(str(module.trainer.precision))
    clip = module.trainer.gradient_clip_val
    if clip is not None and not clip >= 0:
        raise ConfigError(
            f"trainer.gradient_clip_val must be a number from 0 on, got {clip}; 0 clips nothing"
        )
    if is_compiled(module):
        raise ConfigError(
            "the module is wrapped by torch.compile, which cannot trace rollouts and losses; "
            "give the module as it is, and compile the blocks of both models with "
            "model.compile_blocks (--model.compile_blocks true, or compile_blocks=True)"
        )


def in_setup_order(callbacks: Sequence[Callback]) -> list[Callback]:
    """Return callbacks with ``precedes_models``, ``ModelsFirst``, and the others, each in order.

    Args:
        callbacks: A Trainer's callbacks; a ``ModelsFirst`` among them is kept, else one is added.
    """
    builder = next((c for c in callbacks if isinstance(c, ModelsFirst)), None) or ModelsFirst()
    others = [c for c in callbacks if c is not builder]
    early = [c for c in others if getattr(c, "precedes_models", False)]
    late = [c for c in others if not getattr(c, "precedes_models", False)]
    return [*early, builder, *late]


def with_batch_check(callbacks: Sequence[Callback], data: object) -> list[Callback]:
    """Return callbacks with a check of batches in front; without it where all loaders are ours.

    Args:
        callbacks: A Trainer's callbacks.
        data: Its data module, if it has one.
    """
    is_ours = isinstance(data, RolloutDataModule) and all(
        getattr(type(data), name) is getattr(RolloutDataModule, name)
        for name in ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
    )
    others = [c for c in callbacks if not isinstance(c, _ForeignBatches)]
    return others if is_ours else [_ForeignBatches(), *others]


def _check_sharded(callbacks: Sequence[Callback]) -> None:
    names = [type(c).__name__ for c in callbacks if isinstance(c, _NEED_WHOLE_MODELS)]
    if names:
        raise ConfigError(
            f"--trainer.strategy fsdp2 keeps the models in shards, and {', '.join(names)} in "
            "trainer.callbacks copies or changes whole models: leave it out, or use "
            "--trainer.strategy ddp"
        )
