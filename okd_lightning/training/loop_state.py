"""Lightning's loop counters in a checkpoint, in forms from which it resumes correctly.

Lightning repairs the counters of a checkpoint by guessing in which hook it was written, and the
guess is wrong at an epoch's end, before a rollout and before a validation. This module brings a
loaded checkpoint into one of three forms: within an epoch after a whole optimizer step, at an
epoch's start, or before a validation that is still due.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning

from okd_lightning.data import RolloutDataModule
from okd_lightning.training.lightning_privates import add_hparams, will_validate

STOPPED = "okd_lightning_stopped"
"""Key of a checkpoint for whether its run was stopped, and whether a validation is still due."""


def settle_loops(checkpoint: dict[str, Any], accumulate_grad_batches: int) -> None:
    """Bring a loaded checkpoint's counters into a form that resumes correctly, in place.

    Args:
        checkpoint: The loaded checkpoint; one without loops is not changed.
        accumulate_grad_batches: Micro-batches per optimizer step in this run.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return
    epochs = loop["epoch_progress"]
    # Lightning counts the epoch that a resumed run begins in `total` alone: `current` is one less
    epochs["current"] = dict(epochs["total"])
    saved = checkpoint["okd_lightning"].get("accumulate", accumulate_grad_batches)
    _rescale(loop["epoch_loop.batch_progress"], saved, accumulate_grad_batches)
    if validation_is_due(checkpoint):
        _before_validation(loop)
        return
    _behind_validation(loop)
    batches = loop["epoch_loop.batch_progress"]
    current, total = batches["current"], batches["total"]
    is_at_end = batches["is_last_batch"] and current["processed"] >= current["ready"]
    if is_at_end or not current["ready"]:
        close_epoch(checkpoint)
        return
    _open_epoch(checkpoint)
    if total["completed"] == total["processed"]:  # before a rollout, or at the end of the run
        for part in (current, total):
            part["completed"] = part["processed"] - 1
    # Lightning adds one to it at such a resume; callbacks log with it before the first step
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1


def validation_is_due(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint precedes the validation after its last step."""
    return bool(checkpoint.get(STOPPED, {}).get("validation_is_due"))


def has_validation_data(trainer: lightning.Trainer) -> bool:
    """Return whether a fit has data to measure on; true for a foreign data module."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return not isinstance(data, RolloutDataModule) or data.sources["val"] is not None


def has_validation(trainer: lightning.Trainer) -> bool:
    """Return whether a fit validates at all, at any interval."""
    return trainer.enable_validation and has_validation_data(trainer)


def validation_follows(trainer: lightning.Trainer) -> bool:
    """Return whether the validation after this batch is still to come: a resume would skip it."""
    return has_validation_data(trainer) and will_validate(trainer)


def is_last_step(trainer: lightning.Trainer) -> bool:
    """Return whether training ends after this batch: by steps, epochs, or a request to stop."""
    epochs = trainer.max_epochs
    is_last_epoch = epochs is not None and trainer.current_epoch + 1 >= epochs >= 0
    is_at_limit = 0 <= trainer.max_steps <= trainer.global_step
    return is_at_limit or trainer.should_stop or (trainer.is_last_batch and is_last_epoch)


def mark_due_validation(trainer: lightning.Trainer, checkpoint: dict[str, Any]) -> None:
    """Record that a checkpoint written in ``on_train_batch_end`` precedes a validation.

    Lightning counts that validation as done, so that a run resumed from a ``ModelCheckpoint`` with
    ``every_n_train_steps`` would skip it.
    """
    batches = trainer.fit_loop.epoch_loop.batch_progress.current
    # a batch is completed only after the callbacks' on_train_batch_end
    is_open = batches.processed > batches.completed  # type: ignore[attr-defined]
    if trainer.training and is_open and validation_follows(trainer):
        checkpoint.setdefault(STOPPED, {"validation_is_due": True})


def record_hparams(module: lightning.LightningModule, settings: Mapping[str, Any]) -> list[str]:
    """Make settings a module's hyper-parameters, which Lightning passes to every logger.

    Those that a subclass has saved itself stay.

    Returns:
        The names that were added.
    """
    added = {name: value for name, value in settings.items() if name not in module.hparams}
    add_hparams(module, added)
    return list(added)


def _open_epoch(checkpoint: dict[str, Any]) -> None:
    """Mark the epoch as unfinished: Lightning counts one that ``max_steps`` ended as whole."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]
    num_done = epochs["total"]["ready"] - 1
    for part in ("total", "current"):
        epochs[part] = {**epochs[part], "processed": num_done, "completed": num_done}
    checkpoint["epoch"] = num_done


def close_epoch(checkpoint: dict[str, Any]) -> None:
    """Turn a checkpoint of an epoch's end, or of its first rollout, into one of its start.

    Lightning's own repair miscounts epochs where the last validation was within the epoch: a
    resumed run ends too early, and one that is resumed twice too late.
    """
    loop = checkpoint["loops"]["fit_loop"]
    batches, epochs = loop["epoch_loop.batch_progress"], loop["epoch_progress"]
    current, total = batches["current"], epochs["total"]
    num_done = total["ready"] - (0 if current["ready"] else 1)
    for part in ("total", "current"):
        epochs[part] = {**dict.fromkeys(epochs[part], num_done), "ready": num_done + 1}
    batches["is_last_batch"] = False
    batches["current"] = dict.fromkeys(current, 0)
    batches["total"]["completed"] = batches["total"]["processed"]
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1


def _before_validation(loop: dict[str, Any]) -> None:
    """Set the state of a run that was stopped within validation, so that Lightning repeats it."""
    batches = loop["epoch_loop.batch_progress"]
    for part in ("current", "total"):
        batches[part]["completed"] = batches[part]["processed"]
    validation = loop["epoch_loop.val_loop.batch_progress"]
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["total"] = {**dict.fromkeys(validation["total"], 0), "ready": 1, "started": 1}
    validation["is_last_batch"] = False


def _behind_validation(loop: dict[str, Any]) -> None:
    """Mark the last validation as done; Lightning counts a repeated one as begun but not ended."""
    validation = loop["epoch_loop.val_loop.batch_progress"]
    for part in ("current", "total"):
        validation[part] = dict.fromkeys(validation[part], validation[part]["completed"])


def _rescale(batches: dict[str, Any], saved: int, accumulate: int) -> None:
    """Convert counters to this run's micro-batches; checkpoints are between optimizer steps."""
    if saved == accumulate:
        return
    for part in ("current", "total"):
        is_open = batches[part]["processed"] - batches[part]["completed"]
        # -(-a // b) rounds up
        steps = {name: -(-number // saved) for name, number in batches[part].items()}
        batches[part] = {name: number * accumulate for name, number in steps.items()}
        batches[part]["completed"] = batches[part]["processed"] - is_open
