"""Lightning's rich progress bar over the steps of the whole run, with a row for each phase.

If the output is not a terminal (a file), plain lines are logged at intervals instead of a bar.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import lightning
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.callbacks.progress.rich_progress import CustomBarColumn
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import ProgressColumn, Task, TaskID, TextColumn
from rich.style import Style
from rich.table import Column
from rich.text import Text

from okd_lightning.callbacks.monitors.pace import Pace
from okd_lightning.data.progress import alone
from okd_lightning.engines.engine import Progress
from okd_lightning.errors import ConfigError
from okd_lightning.rollouts import RolloutLoader
from okd_lightning.training.lightning_messages import follow_stderr

_TRAINING = "training"


class _Cell(ProgressColumn):
    """Text about a task, without line breaks."""

    def __init__(self, text: Callable[[Task], str], style: str | Style) -> None:
        super().__init__(Column(no_wrap=True, justify="right"))
        self._text, self._style = text, style

    def render(self, task: Task) -> Text:
        return Text(self._text(task), style=self._style)


class RunProgressBar(RichProgressBar):
    """RichProgressBar over the optimizer steps of the whole run.

    Its row shows the tokens trained on per second (of generation, training and validation together)
    and the remaining time of the run. With rollouts, the rows below it show the progress of
    generation and training of the rollout batch, each with its speed.

    If the output is not a terminal, the same is logged in one line, after the first step, after the
    last, and at intervals between them.

    Args:
        refresh_rate: Most redraws per second; 0 for no bar and no lines.
        leave: Keep the bar of every epoch.
        seconds_between_lines: Seconds between lines if the output is not a terminal.
        console_kwargs: Arguments of rich's Console.

    Raises:
        ConfigError: seconds_between_lines not above 0.
    """

    def __init__(
        self,
        refresh_rate: int = 10,
        leave: bool = False,
        seconds_between_lines: float = 30.0,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if not seconds_between_lines > 0:
            raise ConfigError(f"seconds_between_lines must be above 0, got {seconds_between_lines}")
        super().__init__(refresh_rate, leave, console_kwargs=console_kwargs)
        self.seconds_between_lines = seconds_between_lines
        self._pace = Pace()
        self._validation = ExitStack()
        self._has_lines = False
        self._said_at = -math.inf
        self._rows: dict[str, TaskID] = {}
        self._rows_of: Any = None  # the rich Progress that they are in
        self._num_steps = math.inf

    def setup(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str
    ) -> None:
        """Replace the bar by lines if the output is not a terminal."""
        super().setup(trainer, pl_module, stage)
        console = Console(**self._console_kwargs)
        is_watched = console.is_interactive or console.is_jupyter
        if self.is_enabled and not is_watched:  # in a second fit it is already disabled
            self._has_lines = trainer.is_global_zero
            self.disable()
        follow_stderr()

    def configure_columns(self, trainer: lightning.Trainer) -> list[ProgressColumn]:
        """Return columns: description, bar (shrinks if narrow), count, tokens/second, time left."""
        theme = self.theme
        return [
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            CustomBarColumn(
                bar_width=None,
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            _Cell(_count, theme.batch_progress),
            _Cell(_speed, theme.time),
            _Cell(_time_left, theme.time),
        ]

    def get_metrics(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> dict[str, Any]:
        """Return the metrics logged for the bar, with train/loss as loss."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}

    # ---------------------------------------------------------------- the run's row

    @property
    def total_train_batches(self) -> int | float:
        """Optimizer steps of the whole run."""
        return self._num_steps

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        if last == 1:
            return "run"
        return f"epoch {current_epoch}" + ("" if last in (None, -1) else f"/{last - 1}")

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start the clock and show the run's row, also for a run resumed within an epoch."""
        super().on_train_start(trainer, pl_module)
        self._num_steps = trainer.estimated_stepping_batches
        self._pace.start(trainer.global_step)
        if self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()
            self._show_run(trainer.global_step)

    def on_train_epoch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Restore the run's row, which Lightning resets."""
        super().on_train_epoch_start(trainer, pl_module)
        self._show_run(trainer.global_step)

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the training of the rollout batch, if one was generated."""
        start, end = _chunk(trainer, batch_idx)
        first = trainer.global_step - batch_idx // trainer.accumulate_grad_batches
        self._pace.batch_begins(first + end)
        if not self._written_rows:
            return
        accumulate = trainer.accumulate_grad_batches
        done, total = batch_idx - start * accumulate, (end - start) * accumulate
        self._show(_TRAINING, done, total, self._pace.training_tokens_per_second)
        if (speed := batch.metrics.get("rollout/tokens_per_second")) is not None:
            for name in self._written_rows:  # also of engines that report no tokens
                self.progress.update(self._rows[name], speed=speed)  # type: ignore[union-attr]

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count steps; Lightning's bar counts micro-batches of the epoch."""
        accumulate, step = trainer.accumulate_grad_batches, trainer.global_step
        is_whole = (batch_idx + 1) % accumulate == 0
        self._pace.batch_ends(step, sum(batch.step_counts or ()) if is_whole else 0)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, step - 1)
        self._show_run(step)
        if self._written_rows:
            start, end = _chunk(trainer, batch_idx)
            done, total = batch_idx + 1 - start * accumulate, (end - start) * accumulate
            self._show(_TRAINING, done, total, self._pace.training_tokens_per_second)
        if is_whole:
            self._say_step(trainer, pl_module)

    def on_train_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Hide all rows but the run's, and log the last line."""
        for task in self._own_rows.values():
            self.progress.update(task, visible=False)  # type: ignore[union-attr]
        super().on_train_end(trainer, pl_module)
        self._say_step(trainer, pl_module, is_last=True)

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Keep the displayed remaining time until the next step's end, and stop the clock."""
        super().on_validation_start(trainer, pl_module)
        self._validation.enter_context(self._pace.stopped())
        if self.is_enabled and trainer.state.fn == "fit" and not trainer.sanity_checking:
            assert self.progress is not None
            assert self.train_progress_bar_id is not None
            task = self.train_progress_bar
            self.progress.update(task.id, held=_time_left(task))

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Start the clock again."""
        super().on_validation_end(trainer, pl_module)
        self._validation.close()

    def stopped(self) -> AbstractContextManager[None]:
        """Stop the clock within the context, for work that is not a part of training."""
        return self._pace.stopped()

    def _show_run(self, step: int) -> None:
        if self.progress is None or self.is_disabled or self.train_progress_bar_id is None:
            return
        left = self._seconds_left()
        self.progress.update(
            self.train_progress_bar_id,
            completed=step,
            speed=self._pace.tokens_per_second,
            ends_at=None if left is None else time.monotonic() + left,
            held=None,
            is_run=True,
        )
        self.refresh()

    def _seconds_left(self) -> float | None:
        """Return the remaining seconds of the run, by its steps or by a time limit."""
        left = self._pace.seconds_left(self._num_steps)
        limits = [
            timer.time_remaining()
            for timer in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(timer, Timer)
        ]
        return min((limit for limit in (left, *limits) if limit is not None), default=None)

    # ---------------------------------------------------------------- the rows of its phases

    @property
    def _own_rows(self) -> dict[str, TaskID]:
        """Row ids by name; reset when Lightning starts a new display (``leave``)."""
        if self._rows_of is not self.progress:
            self._rows_of, self._rows = self.progress, {}
        return self._rows

    @property
    def _written_rows(self) -> list[str]:
        return [name for name in self._own_rows if name != _TRAINING]

    def _show(self, name: str, done: int, total: int, speed: float | None) -> None:
        """Create or update a phase's row."""
        if self.progress is None or self.is_disabled:
            return
        rows = self._own_rows
        if name not in rows:
            rows[name] = self.progress.add_task(name, total=total)
        self.progress.update(rows[name], completed=done, total=total, speed=speed, visible=True)
        self.refresh()

    @contextmanager
    def writing(self, description: str, total: int) -> Iterator[Progress | None]:
        """Show a row for what a model generates or reads; see ``ShowsWriting``."""
        is_for_training = bool(self.trainer.training) and not self._pace.is_stopped
        with self._pace.writing() if is_for_training else nullcontext():
            if self._has_lines:
                yield self._telling(description, total, self._say_written)
            elif self.is_disabled:
                yield None
            elif self.progress is None:
                with alone(description, total) as told:
                    yield told
            else:
                self._show(description, 0, total, None)
                if is_for_training and _TRAINING in self._own_rows:
                    self.progress.update(self._own_rows[_TRAINING], completed=0)
                yield self._telling(description, total, self._show)
                if not is_for_training and _TRAINING not in self._own_rows:
                    task = self._own_rows.pop(description)
                    self.progress.update(task, visible=False)

    def _telling(
        self, name: str, total: int, show: Callable[[str, int, int, float | None], None]
    ) -> Progress:
        """Return the progress callback of an engine, which limits the rate of updates."""
        pause = self.seconds_between_lines if self._has_lines else 1 / self.refresh_rate
        began = shown = time.monotonic()
        num_rows = num_tokens = 0

        def told(rows: int, tokens: int = 0) -> None:
            nonlocal num_rows, num_tokens, shown
            num_rows, num_tokens = num_rows + rows, num_tokens + tokens
            now = time.monotonic()
            if num_rows == total or now - shown >= pause:
                shown = now
                speed = num_tokens / max(now - began, 1e-9) if num_tokens else None
                show(name, num_rows, total, speed)

        return told

    # ---------------------------------------------------------------- lines

    def _say_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        is_last: bool = False,
    ) -> None:
        if not self._is_due(is_last):
            return
        step, pace = trainer.global_step, self._pace
        parts = [f"step {step}" + (f"/{self._num_steps}" if self._num_steps < math.inf else "")]
        if pace.tokens_per_second is not None:
            parts.append(_rate(pace.tokens_per_second))
        left = self._seconds_left()
        if is_last:
            parts.append(f"{_duration(pace.elapsed)} in all")
        elif left is not None:
            parts.append(f"{_duration(left)} left")
        self._say("  ".join([*parts, *_shown(self.get_metrics(trainer, pl_module))]))

    def _say_written(self, name: str, done: int, total: int, speed: float | None) -> None:
        at = "" if speed is None else f"  {_rate(speed)}"
        if done < total and self._is_due():
            self._say(f"{name} {done}/{total}{at}")

    def _is_due(self, is_last: bool = False) -> bool:
        since = time.monotonic() - self._said_at
        return self._has_lines and (is_last or since >= self.seconds_between_lines)

    def _say(self, line: str) -> None:
        self._said_at = time.monotonic()
        rank_zero_info(line)


def _chunk(trainer: lightning.Trainer, batch_idx: int) -> tuple[int, int]:
    """Return the optimizer steps of this epoch in the rollout batch of a micro-batch."""
    step, loader = batch_idx // trainer.accumulate_grad_batches, trainer.train_dataloader
    if not isinstance(loader, RolloutLoader):
        return step, step + 1
    size = loader.shape.steps_per_rollout
    start = step // size * size
    return start, min(start + size, loader.shape.steps_per_epoch)


def _count(task: Task) -> str:
    total = f"{task.total:.0f}" if task.total is not None and math.isfinite(task.total) else "--"
    return f"{task.completed:.0f}/{total}"


def _speed(task: Task) -> str:
    speed = task.fields.get("speed")
    return "" if speed is None else _rate(speed)


def _rate(speed: float) -> str:
    return f"{speed:,.{int(speed < 10)}f} tok/s"


def _time_left(task: Task) -> str:
    if not task.fields.get("is_run"):
        return ""
    if (held := task.fields.get("held")) is not None:
        return str(held)
    ends_at = task.fields.get("ends_at")
    return "-:--:-- left" if ends_at is None else f"{_duration(ends_at - time.monotonic())} left"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


def _shown(metrics: dict[str, Any]) -> list[str]:
    return [f"{name} {value:.3f}" for name, value in metrics.items() if not isinstance(value, str)]
