"""Progress of generation and of the teacher's reading, on the Trainer's progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol, runtime_checkable

import lightning
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.progress import Progress

from okd_lightning.engines import engine


@runtime_checkable
class ShowsWriting(Protocol):
    """A progress bar with a separate row for what a model generates or reads."""

    def writing(
        self, description: str, total: int
    ) -> AbstractContextManager[engine.Progress | None]:
        """Show that row within the context.

        Args:
            description: Such as "student generates".
            total: Rows to be generated or read.
        """


def progress_display(trainer: lightning.Trainer) -> engine.ProgressFactory | None:
    """Return ``rollout_progress`` of a Trainer; None for one without a progress bar."""
    return None if trainer.progress_bar_callback is None else partial(rollout_progress, trainer)


@contextmanager
def rollout_progress(
    trainer: lightning.Trainer, description: str, total: int
) -> Iterator[engine.Progress | None]:
    """Show a task next to the Trainer's that counts finished rows; nothing if bars are off.

    Args:
        trainer: The Trainer with the bar.
        description: Such as "student generates".
        total: Rows to be generated or read.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, ShowsWriting):
        with bar.writing(description, total) as told:
            yield told
    elif isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        progress = bar.progress
        task = progress.add_task(description, total=total)
        try:
            yield lambda rows, tokens=0: progress.update(task, advance=rows, refresh=rows > 0)
        finally:
            progress.remove_task(task)
    elif isinstance(bar, RichProgressBar) and bar.is_enabled:  # the Trainer's bar starts later
        with alone(description, total) as told:
            yield told
    elif isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
        with Tqdm(desc=description, total=total, leave=False, position=1) as task_bar:
            yield lambda rows, tokens=0: task_bar.update(rows) and None
    else:
        yield None


@contextmanager
def alone(description: str, total: int) -> Iterator[engine.Progress]:
    """Show a separate bar, before the Trainer's has started; see ``rollout_progress``."""
    with Progress(transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda rows, tokens=0: progress.update(task, advance=rows)
