"""Lightning's records of logged training metrics: values of one optimizer step only.

Lightning writes the last known value of every metric into each row until the epoch ends: a metric
that is logged only in some steps (a rollout's length, a stage's loss) would seem constant.
"""

from __future__ import annotations

from typing import Any

import lightning

from okd_lightning.training.lightning_privates import logged_results, row_for_loggers

_HOOK_BEFORE = "on_train_batch_start"


def forget_last_step(trainer: lightning.Trainer) -> None:
    """Omit the last step's values from later rows; for ``on_train_batch_start``.

    Epoch means and metric objects continue; ``trainer.callback_metrics`` keeps its values.
    """
    for metric in logged_results(trainer):
        meta = metric.meta
        if meta.on_step and not meta.on_epoch and metric.is_tensor and meta.fx != _HOOK_BEFORE:
            metric.reset()


def unlogged_row(trainer: lightning.Trainer) -> dict[str, float] | None:
    """Return the row of the step that was just done, if its loggers have not received it yet.

    Returns:
        Values by name, with epoch and step; None outside ``on_train_batch_end``, or where this step
        is not logged.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    is_open = progress.completed < progress.processed
    row = row_for_loggers(trainer) if is_open and not trainer.validating else None
    if row is None:
        return None
    values = {name: float(value) for name, value in row.items()}
    return {**values, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}
