"""Progress display of a running run: bar, lines and remaining time.

Frozen here: the bar counts the optimizer steps of the whole run, whatever the accumulation, also
where a run resumes within a rollout batch; a row never breaks, at 80 columns and at 120; where the
output is not a terminal only whole lines are written; the remaining time counts generation by
finished responses.
"""

from __future__ import annotations

import contextlib
import io
import logging

import pytest
import rich
import tiny
from lightning.pytorch.callbacks import Callback, Timer
from parallel_runs import Killed, Killer
from rich.console import Console
from rich.progress import Task, TaskID

from okd_lightning.callbacks import GKD, KD, OKD, LastCheckpoint
from okd_lightning.callbacks.monitors.pace import Pace
from okd_lightning.callbacks.monitors.progress_bar import RunProgressBar, _speed
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError

SMALL = {"batch_size": 2, "max_response_length": 6}
CHUNKS = {**SMALL, "prompts_per_rollout": 8}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Frames(Callback):
    """Records of the bar at every hook of a run, each a list of lines."""

    def __init__(self, bar: RunProgressBar, width: int) -> None:
        self.bar, self.width = bar, width
        self.shown: dict[str, list[list[str]]] = {}

    def take(self, place: str) -> None:
        console = Console(file=io.StringIO(), width=self.width)
        tasks = [task for task in self.bar.progress.tasks if task.visible]
        console.print(self.bar.progress.make_tasks_table(tasks))
        lines = console.file.getvalue().splitlines()
        assert len(lines) == len(tasks), "a row was broken in two"
        self.shown.setdefault(place, []).append(lines)

    def on_train_batch_start(self, *args):
        self.take("batch begins")

    def on_train_batch_end(self, *args):
        self.take("batch ends")

    def on_validation_batch_end(self, *args):
        self.take("validation")

    def on_train_end(self, *args):
        self.take("end")


@pytest.fixture
def terminal():
    """Restore the state of rich's own console, which a bar changes."""
    file = io.StringIO()
    yield {"file": file, "force_terminal": True, "force_interactive": True}
    rich.reconfigure()


def fit(root, make_module, terminal, width, method, killer=None, ckpt_path=None, **settings):
    bar = RunProgressBar(console_kwargs={**terminal, "width": width})
    frames = Frames(bar, width)
    callbacks = [method, bar, frames, LastCheckpoint(1), *([killer] if killer else [])]
    trainer = tiny.make_trainer(
        root,
        callbacks,
        enable_progress_bar=True,
        accumulate_grad_batches=2,
        num_sanity_val_steps=0,
        **{"max_epochs": -1, "max_steps": 8, "val_check_interval": 4, **settings},
    )
    data = RolloutDataModule(
        tiny.make_rows(16), tiny.make_rows(5, seed=2), seed=7, val_rollouts=4, **CHUNKS
    )
    with contextlib.suppress(Killed):
        trainer.fit(make_module(), data, ckpt_path=ckpt_path)
    return frames.shown


@pytest.mark.filterwarnings("ignore:.*val_check_interval")
@pytest.mark.parametrize("width", [80, 120])
def test_rows_of_a_run(width, tmp_path, make_module, terminal):
    shown = fit(tmp_path, make_module, terminal, width, GKD(on_policy_fraction=1.0))
    for place, count in (("batch begins", 16), ("batch ends", 16), ("validation", 10), ("end", 1)):
        assert len(shown[place]) == count
    run, writing, training = shown["batch begins"][6]  # the 4th micro-batch of the second chunk
    assert run.startswith("epoch 0")
    assert "3/8" in run
    assert "8/8" in writing
    assert writing.startswith("student generates")
    assert writing.rstrip().endswith("tok/s")
    assert training.startswith("training")
    assert "2/4" in training
    run, _, training = shown["batch ends"][7]
    assert "4/8" in run
    assert "tok/s" in run
    assert " left" in run
    assert "loss: " in run
    assert "4/4" in training
    assert any(line.startswith("Validation") for line in shown["validation"][0])
    (last,) = shown["end"][0]
    assert "8/8" in last


@pytest.mark.filterwarnings("ignore:.*prompts_per_rollout 8 has no effect in this run")
def test_a_run_that_generates_nothing_has_one_row(tmp_path, make_module, terminal):
    shown = fit(tmp_path, make_module, terminal, 80, KD(), limit_val_batches=0)
    assert {len(lines) for lines in shown["batch ends"]} == {1}
    assert "8/8" in shown["batch ends"][-1][0]


@pytest.mark.filterwarnings("ignore:.*val_check_interval")
def test_a_run_continues_within_a_rollout_batch(tmp_path, make_module, terminal):
    method = GKD(on_policy_fraction=1.0)
    fit(tmp_path, make_module, terminal, 80, method, Killer(3))
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    shown = fit(tmp_path, make_module, terminal, 80, method, ckpt_path=last)
    assert "3/8" in shown["batch begins"][0][0]
    assert "5/8" in shown["batch ends"][3][0]
    assert any(line.startswith("student generates") for line in shown["batch ends"][3])


def test_without_an_end_there_is_no_time_left(tmp_path, make_module, terminal):
    bar = RunProgressBar(console_kwargs=terminal)
    frames = Frames(bar, 80)
    trainer = tiny.make_trainer(
        tmp_path,
        [KD(), bar, frames, Timer({"seconds": 2})],
        enable_progress_bar=True,
        max_epochs=-1,
        max_steps=-1,
    )
    trainer.fit(make_module(), RolloutDataModule(tiny.make_rows(16), seed=7, **SMALL))
    assert "/--" in frames.shown["batch ends"][0][0]
    left = frames.shown["batch ends"][0][0]
    assert any(f"0:00:0{seconds} left" in left for seconds in (1, 2))


@pytest.mark.filterwarnings("ignore:.*val_check_interval")
def test_a_log_gets_whole_lines(tmp_path, make_module, caplog):
    file = io.StringIO()
    bar = RunProgressBar(console_kwargs={"file": file})
    trainer = tiny.make_trainer(
        tmp_path,
        [GKD(on_policy_fraction=1.0), bar],
        enable_progress_bar=True,
        max_epochs=-1,
        max_steps=8,
        val_check_interval=4,
    )
    data = RolloutDataModule(tiny.make_rows(16), tiny.make_rows(5, seed=2), seed=7, **CHUNKS)
    with caplog.at_level(logging.INFO):
        trainer.fit(make_module(), data)
    rich.reconfigure()
    assert file.getvalue() == ""
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 1/8", "step 8/8"]
    assert " left" in lines[0]
    assert "loss " in lines[0]
    assert " in all" in lines[1]


def test_lines_come_as_often_as_asked(tmp_path, make_module, caplog):
    bar = RunProgressBar(seconds_between_lines=1e-6, console_kwargs={"file": io.StringIO()})
    trainer = tiny.make_trainer(
        tmp_path, [GKD(on_policy_fraction=1.0), bar], enable_progress_bar=True, max_steps=4
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(make_module(), RolloutDataModule(tiny.make_rows(16), seed=7, **CHUNKS))
    rich.reconfigure()
    lines = [r.getMessage() for r in caplog.records]
    assert sum(line.startswith("step ") for line in lines) == 5  # the last one twice: its end
    caplog.clear()
    trainer = tiny.make_trainer(tmp_path, [KD(), bar], enable_progress_bar=True, max_steps=2)
    with caplog.at_level(logging.INFO):
        trainer.fit(make_module(), RolloutDataModule(tiny.make_rows(16), seed=7, **SMALL))
    assert sum(r.getMessage().startswith("step ") for r in caplog.records) == 3
    with pytest.raises(ConfigError, match="seconds_between_lines"):
        RunProgressBar(seconds_between_lines=0)


def test_time_left_counts_generation_by_finished_responses():
    clock = Clock()
    pace = Pace(clock)
    pace.start(0)
    with pace.writing():
        clock.now += 40  # for the steps 0..3
    assert pace.seconds_left(8) is None
    pace.batch_begins(4)
    clock.now += 1
    pace.batch_ends(1, 100)
    assert pace.seconds_left(8) == pytest.approx(7 * 1 + 40)
    assert pace.training_tokens_per_second == pytest.approx(100)
    assert pace.tokens_per_second == pytest.approx(100 / 41)
    for step in (2, 3, 4):
        pace.batch_begins(4)
        clock.now += 1
        pace.batch_ends(step, 100)
    clock.now += 8  # a checkpoint
    assert pace.seconds_left(8) == pytest.approx(4 * (4 + 8) / 4 + 40)
    assert pace.seconds_left(float("inf")) is None


def test_the_clock_stops_for_samples_and_validation():
    clock = Clock()
    pace = Pace(clock)
    pace.start(0)
    with pace.stopped(), pace.stopped(), pace.writing():
        clock.now += 100
    pace.batch_begins(1)
    clock.now += 2
    pace.batch_ends(1, 100)
    with pace.stopped():
        clock.now += 50
    assert pace.seconds_left(4) == pytest.approx(3 * 2)
    assert pace.tokens_per_second == pytest.approx(50)
    assert pace.elapsed == pytest.approx(152)


def test_a_slow_rate_has_a_decimal():
    task = Task(TaskID(0), "run", None, 0, _get_time=lambda: 0.0)
    shown = []
    for task.fields["speed"] in (0.42, 9.5, 10.4, 12345.6):
        shown.append(_speed(task))
    assert shown == ["0.4 tok/s", "9.5 tok/s", "10 tok/s", "12,346 tok/s"]


def test_the_bar_shows_okds_student(tmp_path, make_module, caplog):
    bar = RunProgressBar(console_kwargs={"file": io.StringIO()})
    trainer = tiny.make_trainer(tmp_path, [OKD(), bar], enable_progress_bar=True, max_steps=1)
    with caplog.at_level(logging.INFO):
        trainer.fit(make_module(), RolloutDataModule(tiny.make_rows(8), seed=7, **SMALL))
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("step "))
    student = trainer.callback_metrics["train/student_loss"]
    assert f"student_loss {student:.3f}" in line
    assert student < trainer.callback_metrics["train/loss"] - 1


def test_time_left_of_a_run_that_continues_within_a_rollout_batch():
    clock = Clock()
    pace = Pace(clock)
    pace.start(2)
    pace.batch_begins(4)  # written before
    clock.now += 1
    pace.batch_ends(3, 10)
    assert pace.seconds_left(8) == pytest.approx(5)  # what writing takes is not known
    pace.batch_begins(4)
    clock.now += 1
    pace.batch_ends(4, 10)
    with pace.writing():
        clock.now += 40
    pace.batch_begins(8)
    clock.now += 1
    pace.batch_ends(5, 10)
    assert pace.seconds_left(12) == pytest.approx(7 * 1 + 40)
