"""One run of a comparison: ``fit`` with a validation before it, a budget, and a stored curve."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint

from okd_lightning.callbacks import SampleTable
from okd_lightning.callbacks.methods.base import Method
from okd_lightning.callbacks.monitors.always import MONITORS
from okd_lightning.commands.cli import DistillationCLI
from okd_lightning.commands.compare.budget import Budget, BudgetStop
from okd_lightning.commands.compare.entries import Entry
from okd_lightning.commands.compare.folder import Plan, RunFolder
from okd_lightning.commands.reports import CurveLog, RunResult
from okd_lightning.errors import ConfigError


class ComparedCLI(DistillationCLI):
    """``fit`` as one run of a comparison.

    Args:
        args: The words to parse.
        budget: The run's budget; None where its Trainer settings set the length.
        kwargs: Arguments of DistillationCLI.
    """

    monitors = tuple(kind for kind in MONITORS if kind is not SampleTable)  # no table per run

    def __init__(self, args: Sequence[str], budget: Budget | None, **kwargs: Any) -> None:
        self.curve = CurveLog()
        self._own = [self.curve, *([BudgetStop(budget)] if budget is not None else [])]
        super().__init__(args=list(args), **kwargs)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Return the Trainer, with the curve and the budget before the checkpoint callbacks.

        Callbacks run in order, so that a checkpoint holds the curve of its own step.
        """
        trainer = super().instantiate_trainer(**kwargs)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        first = next((i for i, c in enumerate(callbacks) if isinstance(c, Checkpoint)), None)
        at = len(callbacks) if first is None else first
        callbacks[at:at] = self._own
        return trainer

    def fit(self, **kwargs: Any) -> None:
        """Validate, train, and validate again where training has not ended with a validation."""
        if kwargs.get("ckpt_path") is None:
            with _unlogged(self.trainer):
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        super().fit(**kwargs)
        if self.curve.last_step != self.trainer.global_step:
            with _unlogged(self.trainer):
                self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)

    def after_fit(self) -> None:
        """Do nothing: the comparison reports on all runs."""


def run_one(run: RunFolder, plan: Plan) -> RunResult:
    """Train one run, from its checkpoint where it has one, and write its result.

    Raises:
        Exception: Any error of ``fit``.
    """
    resumed = run.checkpoint
    run.prepare()
    arguments = [
        "fit",
        *plan.arguments(run.entry, run.seed),
        *("--trainer.default_root_dir", str(run.path)),
        *(() if resumed is None else ("--ckpt_path", str(resumed))),
    ]
    try:
        cli = ComparedCLI(arguments, plan.budget)
        result = cli.curve.result(cli.trainer, run.entry.label, run.seed)
    finally:
        gc.collect()  # a Trainer and its modules refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    run.finish(result)
    return result


def check_entry(entry: Entry, plan: Plan) -> None:
    """Build a contender's run without starting it, to find errors before the first run.

    Raises:
        OKDLightningError: What ``fit`` would refuse; no validation data; a budget that does not
            count all that is computed; a schedule that needs the last step under a budget that does
            not say it.
    """
    cli = ComparedCLI(plan.arguments(entry, plan.seeds[0]), plan.budget, run=False)
    if cli.datamodule.sources["val"] is None:
        raise ConfigError(
            "compare measures every run on the same validation data: give --data.val a JSONL "
            "file, a folder or a hub id"
        )
    device = cli.trainer.strategy.root_device
    pair = cli.model.pair
    elsewhere = {
        "--model.engine": pair.engine is not None,
        "the server of --model.teacher": pair.teacher.computes_elsewhere,
    }
    servers = [name for name, is_there in elsewhere.items() if is_there]
    refusal = plan.budget and plan.budget.refusal(device, servers)
    if refusal:
        raise ConfigError(refusal)
    budget, schedule = plan.budget, cli.model.optimization.given.schedule
    if budget is not None and budget.unit != "steps" and schedule != "constant":
        raise ConfigError(
            f"--model.schedule {schedule} needs to know a run's last step, which "
            f"--budget {budget} does not say; give --budget steps=N or --model.schedule constant"
        )


def check_shared(plan: Plan) -> None:
    """Refuse a method in the shared settings: every contender would train with it besides its own.

    Raises:
        ConfigError: ``trainer.callbacks`` of the shared configs or options holds a method.
    """
    bare = ComparedCLI(plan.arguments(Entry("", {"method": "SFT"}), 0), None, run=False)
    methods = [
        type(c).__name__
        for c in bare.trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(c, Method)
    ]
    if len(methods) > 1:
        shared = [name for name in methods if name != "SFT"] or ["SFT"]
        raise ConfigError(
            f"every contender would run with {' and '.join(shared)} besides its own method: "
            "trainer.callbacks of the shared configs or options holds it; put it into a file of "
            "its own and name that in --methods"
        )


@contextmanager
def _unlogged(trainer: lightning.Trainer) -> Iterator[None]:
    """Disable the loggers, so that a validation is not part of the run's metrics.csv."""
    loggers, trainer.loggers = trainer.loggers, []
    try:
        yield
    finally:
        trainer.loggers = loggers
