"""``okd-lightning quickstart``: the options and the run."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence

import jsonargparse

from okd_lightning.callbacks.methods.base import Method
from okd_lightning.commands.help_format import HelpFormatter
from okd_lightning.commands.quickstart.recipe import GKD_DEFAULTS, Recipe
from okd_lightning.commands.quickstart.run import Quickstart
from okd_lightning.durable_files import require_writable
from okd_lightning.errors import ConfigError
from okd_lightning.training.config_paths import output_folder
from okd_lightning.training.lightning_messages import PrintableConsole


def quickstart_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of ``okd-lightning quickstart``."""
    parser = jsonargparse.ArgumentParser(
        prog="okd-lightning quickstart",
        usage="okd-lightning quickstart [--method NAME] [--out FOLDER] [--seed N] [--steps N]",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        description="Watch a student learn arithmetic: embedded task and teacher, no network.",
    )
    parser.add_subclass_arguments(
        Method, "method", help="KD, GKD, ...; compared with SFT continued"
    )
    parser.add_argument("--out", type=str, default="quickstart-out", help="results go here")
    parser.add_argument("--seed", type=int, default=0, help="determines everything but the timings")
    parser.add_argument(
        "--steps", type=int, default=Recipe.method_steps, help="optimizer steps of either run"
    )
    return parser


def with_default_method(arguments: Sequence[str]) -> list[str]:
    """Add GKD where no method is named, and the quickstart's settings for it unless typed."""
    named = [b for a, b in itertools.pairwise(arguments) if a == "--method"]
    named += [a.split("=", 1)[1] for a in arguments if a.startswith("--method=")]
    if named and named[-1].rsplit(".", 1)[-1] != "GKD":
        return list(arguments)
    typed = {argument.split("=")[0] for argument in arguments}
    defaults = list(GKD_DEFAULTS)
    if "--method.divergence" in typed:  # GKD takes beta or divergence
        at = defaults.index("--method.beta")
        del defaults[at : at + 2]
    return [*defaults, *_without_method(arguments)]


def quickstart_command(options: jsonargparse.Namespace, method: Method) -> None:
    """Run the quickstart.

    Raises:
        ConfigError: Fewer than one step.
        OutputError: ``--out`` cannot be written.
    """
    if options.steps < 1:
        raise ConfigError(f"--steps must be at least 1, got {options.steps}")
    out = output_folder(options.out, "--out")
    require_writable(out, "--out")
    start = time.perf_counter()
    console = PrintableConsole(file=sys.stdout)
    Quickstart(method, out, options.seed, Recipe(method_steps=options.steps), console).run()
    console.print(f"{time.perf_counter() - start:.0f} seconds in all")


def _without_method(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--method":
            skip = True
        elif not argument.startswith("--method="):
            kept.append(argument)
    return kept
