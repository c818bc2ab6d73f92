"""``okd-lightning compare``: the options, the order of the runs, and the final report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.text import Text

from okd_lightning.commands.cli_arguments import ENDS, OF_ONE_RUN, load_config, take_flag
from okd_lightning.commands.cli_errors import readable
from okd_lightning.commands.compare.budget import Budget
from okd_lightning.commands.compare.entries import checked_seed, own_method, read_entries
from okd_lightning.commands.compare.folder import ComparisonFolder, Plan, RunFolder, comparison_lock
from okd_lightning.commands.compare.runs import check_entry, check_shared, run_one
from okd_lightning.commands.config_trust import add_trust_flag
from okd_lightning.commands.reports import (
    comparison_table,
    cost_table,
    plot_comparison,
    reading,
    write_metrics_csv,
    write_results,
    write_table_csv,
)
from okd_lightning.commands.unknown_options import check_names
from okd_lightning.errors import UsageError, one_line
from okd_lightning.training.config_paths import output_folder
from okd_lightning.training.lightning_messages import PrintableConsole, only_warnings


def compare_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that ``compare`` has besides those of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="okd-lightning compare",
        usage="okd-lightning compare --config FILE|NAME --methods KD,GKD,FILE.yaml --out DIR "
        "[--SECTION.OPTION VALUE ...]",
        description="Run several methods on one config under an equal budget. All --model.*, "
        "--data.* and --trainer.* options of fit apply to every run. The same command continues a "
        "comparison that was interrupted, and adds methods or seeds to a finished one.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--methods",
        metavar="LIST",
        help="method classes with their defaults, import paths of your own, and YAML files with a "
        "method: section or trainer.callbacks, separated by commas",
    )
    parser.add_argument("--seeds", metavar="LIST", default="0", help="such as 0,1,2; default: 0")
    parser.add_argument(
        "--budget",
        metavar="UNIT=N",
        help="steps=N, tokens=N (trained on), seconds=N (training and rollouts) or cpu_seconds=N "
        "(the same in CPU time, which other jobs do not change) for every run; "
        "default: the config's own trainer.max_steps",
    )
    parser.add_argument("--out", type=str, default="compare-out", help="default: %(default)s")
    add_trust_flag(parser)
    parser.add_argument(
        "--config",
        metavar="FILE|NAME",
        action="append",
        help="what all runs share; may be repeated",
    )
    return parser


def compare_command(arguments: Sequence[str], debug: bool = False) -> int:
    """Run a comparison, or its unfinished runs.

    Args:
        arguments: The words after ``compare``.
        debug: Stop at the first run that fails, with its traceback.

    Returns:
        1 if a run failed, else 0.

    Raises:
        OKDLightningError: An error that concerns the comparison as a whole.
    """
    check_names("compare", arguments)
    parser = compare_parser()
    try:
        is_trusted, words = take_flag(arguments)
        own, options = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UsageError(readable(error)) from error
    console = PrintableConsole(
        file=sys.stdout, quiet=getattr(rank_zero_only, "rank", 0) != 0, highlight=False
    )
    out = output_folder(own.out, "--out")
    plan = _plan(own, options, console)
    with only_warnings():
        check_shared(plan)
        for entry in plan.entries:
            check_entry(entry, plan)
        with comparison_lock(out):
            return Comparison(ComparisonFolder(out, plan, is_trusted), console, debug).run()


class Comparison:
    """The unfinished runs of a comparison, and the report of all runs.

    Args:
        folder: The comparison's folder.
        console: For output.
        debug: Raise a run's error instead of reporting it.
    """

    def __init__(self, folder: ComparisonFolder, console: Console, debug: bool = False) -> None:
        self.folder = folder
        self.console = console
        self.debug = debug

    def run(self) -> int:
        """Run one run after the other; report a failed run and continue with the next.

        Returns:
            The exit status.
        """
        runs = list(self.folder.runs())
        waiting = [run for run in runs if run.result is None]
        if len(waiting) < len(runs):
            self.console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished")
        for run in waiting:
            self._run(run, f"{1 + runs.index(run)}/{len(runs)}")
            self._write()
        failed = [run for run in runs if run.failure is not None]
        self._report(failed)
        return 1 if failed else 0

    def _run(self, run: RunFolder, number: str) -> None:
        at = "" if run.checkpoint is None else ", from its checkpoint"
        self.console.print(Text.assemble((f"{number}  {run.name}", "bold"), at))
        try:
            run_one(run, self.folder.plan)
        except (KeyboardInterrupt, SystemExit):
            self.console.print("stopped; the same command continues the comparison")
            raise
        except Exception as error:
            if self.debug:
                raise
            run.fail(f"{type(error).__name__}: {one_line(str(error))}")
            self.console.print(Text.assemble(("failed", "red"), f": {one_line(str(error))}"))

    @rank_zero_only
    def _write(self) -> None:
        results, path = self.folder.results(), self.folder.path
        if results:
            write_results(path / "results.json", results)
            write_table_csv(path / "results.csv", results)
            write_metrics_csv(path / "metrics.csv", results)
            budget = self.folder.plan.budget
            is_cpu = budget is not None and budget.unit == "cpu_seconds"
            picture = path / "comparison.png"
            plot_comparison(
                picture, results, self._title(), clock="cpu_seconds" if is_cpu else "seconds"
            )

    def _title(self) -> str:
        budget = self.folder.plan.budget
        if budget is None:
            return "Validation"
        return f"Validation, {budget.amount:g} {budget.unit.replace('cpu_', 'CPU ')} a run"

    def _report(self, failed: Sequence[RunFolder]) -> None:
        results = self.folder.results()
        if results:
            self.console.print(comparison_table(results))
            reasons = {run.name: str(run.failure) for run in failed}
            self.console.print(cost_table(results, reasons))
            self.console.print(reading(results))
        for run in failed if not results else ():
            self.console.print(Text.assemble(("failed", "red"), f"  {run.name}: {run.failure}"))
        if failed:
            self.console.print("the same command tries failed runs once more")
        if results:
            files = "results.json, results.csv, metrics.csv and comparison.png"
            self.console.print(f"{files} are in {self.folder.path}")


def _plan(own: argparse.Namespace, options: Sequence[str], console: Console) -> Plan:
    """Return the plan that the options describe.

    Raises:
        UsageError: An option that compare does not have, or a list that cannot be read.
        ConfigError: A config or method that does not exist.
    """
    if not own.methods:
        raise UsageError("--methods must be given, such as --methods KD,GKD,OKD,OPDPlus")
    budget = None if own.budget is None else Budget.parse(own.budget)
    for word in options:
        name = word.split("=")[0]
        for start, advice in OF_ONE_RUN.items():
            if name == start or name.startswith(f"{start}."):
                raise UsageError(f"{name} is not an option of compare; {advice}")
        if budget is not None and name in ENDS:
            raise UsageError(f"{name} and --budget both set the end of a run; give one of them")
    configs = [load_config(name) for name in own.config or ()]
    for config in configs:
        method = own_method(config)
        if method is not None:
            console.print(
                f"the config's own method section ({method}) is left out: every method starts from "
                "its defaults, or from a YAML file given in --methods"
            )
        config.pop("method", None)
        config.pop("seed_everything", None)
        trainer = config.get("trainer") or {}
        trainer.pop("default_root_dir", None)
        for option in ENDS if budget is not None else ():
            name = option.removeprefix("--")
            if trainer.pop(name.removeprefix("trainer."), None) is not None:
                console.print(f"the config's {name} is left out: --budget sets the end of a run")
    return Plan(
        entries=tuple(read_entries(own.methods)),
        seeds=_seeds(own.seeds),
        budget=budget,
        configs=tuple(configs),
        options=tuple(options),
    )


def _seeds(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() for word in words):
        raise UsageError(f"--seeds {text!r}: expected whole numbers such as 0,1,2")
    seeds = (checked_seed(int(word[:20]), f"--seeds {text!r}") for word in words)
    return tuple(dict.fromkeys(seeds))
