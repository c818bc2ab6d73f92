"""Shows how far the models are with what they write or read, on the Trainer's own bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, runtime_checkable

import lightning
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from rich.progress import Progress

from okd_lightning.engines import engine


@runtime_checkable
class ShowsWriting(Protocol):
    """A progress bar with a row of its own for what a model writes or reads."""

    def writing(
        self, description: str, total: int
    ) -> AbstractContextManager[engine.Progress | None]:
        """Within it that row is shown.

        Args:
            description: Such as "student writes".
            total: Rows to be written or read.
        """


@contextmanager
def rollout_progress(
    trainer: lightning.Trainer, description: str, total: int
) -> Iterator[engine.Progress | None]:
    """A task beside the Trainer's own that counts finished rows; nothing where bars are off.

    Args:
        trainer: Whose bar is used.
        description: Such as "student writes".
        total: Rows to be written or read.
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
    elif isinstance(bar, RichProgressBar) and bar.is_enabled:  # the Trainer's own comes later
        with alone(description, total) as told:
            yield told
    elif isinstance(bar, TQDMProgressBar) and not bar.is_disabled:
        with Tqdm(desc=description, total=total, leave=False, position=1) as task_bar:
            yield lambda rows, tokens=0: task_bar.update(rows) and None
    else:
        yield None


@contextmanager
def alone(description: str, total: int) -> Iterator[engine.Progress]:
    """A bar of its own, for what happens before the Trainer's; see ``rollout_progress``."""
    with Progress(transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda rows, tokens=0: progress.update(task, advance=rows)
