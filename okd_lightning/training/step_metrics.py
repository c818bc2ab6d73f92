"""What Lightning keeps of logged training metrics: an optimizer step's own, no older ones.

Lightning writes the last known value of every metric into each row until the epoch ends: one that
is logged in some steps alone (a rollout's length, a stage's loss) would seem to stand still. What
touches Lightning's own records of logged values is here.
"""

from __future__ import annotations

from typing import Any

import lightning

_HOOK_BEFORE = "on_train_batch_start"


def forget_last_step(trainer: lightning.Trainer) -> None:
    """Leave the values of the step before out of the rows to come; for ``on_train_batch_start``.

    Means over an epoch and metric objects go on; ``trainer.callback_metrics`` keeps what it has.
    """
    for metric in (trainer._results or {}).values():
        meta = metric.meta
        if meta.on_step and not meta.on_epoch and metric.is_tensor and meta.fx != _HOOK_BEFORE:
            metric.reset()


def unlogged_row(trainer: lightning.Trainer) -> dict[str, float] | None:
    """The row of the step that has just been done, where its loggers have not seen it yet.

    Returns:
        Values by name, with epoch and step; None outside ``on_train_batch_end``, or where this step
        is not logged.
    """
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress: Any = loop.batch_progress.current
    is_open = progress.completed < progress.processed
    if not is_open or trainer.validating or not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {**values, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}
