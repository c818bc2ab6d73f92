"""``okd-lightning diagnose``: the options and the written files."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.text import Text

from okd_lightning.commands.cli import DistillationCLI
from okd_lightning.commands.cli_arguments import prepare, shared_options
from okd_lightning.commands.cli_errors import readable
from okd_lightning.commands.diagnose.examination import Examination
from okd_lightning.commands.diagnose.findings import Advice, Diagnosis, to_record
from okd_lightning.commands.diagnose.page import write_page, write_text_page
from okd_lightning.commands.diagnose.quantisation import OPTION
from okd_lightning.commands.diagnose.rules import CONTENDERS, advise, contenders
from okd_lightning.commands.diagnose.stages import SKIPPABLE, skipped_stages
from okd_lightning.commands.diagnose.terminal import show
from okd_lightning.commands.diagnose.texts import TextDiagnosis, TextExamination, show_texts
from okd_lightning.commands.run_folder import require_writable
from okd_lightning.commands.unknown_options import check_names
from okd_lightning.durable_files import write_json
from okd_lightning.errors import ConfigError, UsageError
from okd_lightning.training.config_paths import output_folder
from okd_lightning.training.lightning_messages import PrintableConsole, only_warnings
from okd_lightning.training.lightning_privates import end_at_sigterm


def diagnose_parser() -> argparse.ArgumentParser:
    """Return the parser of the options that ``diagnose`` has besides those of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="okd-lightning diagnose",
        usage="okd-lightning diagnose --config FILE|NAME --out DIR [--model.* --data.* VALUE ...]",
        description="Measure a pair and its prompts before a long run: divergences and their "
        "positions, bias and noise of sampled gradients, drift, speed, and recommended methods. "
        "Nothing is trained; the options are those of fit.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE|NAME", action="append", help="may be repeated")
    parser.add_argument("--out", type=str, default="diagnose-out", help="default: %(default)s")
    parser.add_argument(
        "--rows", type=int, default=64, help="responses of each kind; default: %(default)s"
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=16,
        help="optimizer steps that are tried with each method, and batches for the gradients; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="--rows and --batches are lowered, to no less than 8 and 3, until the expected time "
        "is this short; default: %(default)g",
    )
    parser.add_argument(
        "--skip",
        metavar="STAGE,...",
        help="stages to leave out: "
        + "; ".join(f"{name} ({found})" for name, found in SKIPPABLE.items()),
    )
    parser.add_argument(
        OPTION,
        metavar="FOLDER|HUB_ID",
        help="the model that a quantised --model.teacher was made of: reports what the "
        "quantisation costs",
    )
    return parser


def diagnose_command(arguments: Sequence[str], debug: bool = False) -> int:
    """Diagnose a pair and write the findings.

    Args:
        arguments: The words after ``diagnose``.
        debug: Unused: the caller handles errors.

    Raises:
        OKDLightningError: What ``fit`` would refuse, or an option out of its range.
    """
    del debug
    check_names("diagnose", arguments)
    try:
        own, options = diagnose_parser().parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UsageError(readable(error)) from error
    if own.rows < 2 or own.batches < 3:
        raise UsageError(
            f"--rows {own.rows} --batches {own.batches}: expected at least 2 rows, and 3 batches "
            "for a standard error"
        )
    if not own.minutes > 0:
        raise UsageError(f"--minutes {own.minutes:g}: expected a positive number")
    skipped = skipped_stages(own.skip)
    own.out = output_folder(own.out, "--out")
    require_writable(own.out, "--out")
    console = PrintableConsole(file=sys.stdout, highlight=False)
    configs = [word for name in own.config or () for word in ("--config", name)]
    words = [*configs, *options]
    found = examine(words, own.rows, own.batches, console, own.full_teacher, skipped, own.minutes)
    if isinstance(found, TextDiagnosis):
        write_json(own.out / "diagnosis.json", to_record(found))
        write_text_page(own.out / "diagnosis.html", found)
        show_texts(console, found)
        console.print(f"diagnosis.html and diagnosis.json are in {own.out}")
        return 0
    advice = advise(found)
    command = _next_command(own, options, found, advice)
    record = to_record(found) | {"advice": to_record(list(advice)), "next": command}
    write_json(own.out / "diagnosis.json", record)
    for name, text in CONTENDERS.items():
        (own.out / name).write_text(text, encoding="utf-8")
    write_page(own.out / "diagnosis.html", found, advice, command)
    show(console, found, advice, command)
    console.print(f"diagnosis.html and diagnosis.json are in {own.out}")
    return 0


def examine(
    arguments: Sequence[str],
    rows: int,
    batches: int,
    console: Console,
    full_teacher: str | None = None,
    skipped: frozenset[str] = frozenset(),
    minutes: float = math.inf,
) -> Diagnosis | TextDiagnosis:
    """Return the diagnosis of the pair and prompts that options of ``fit`` name.

    Args:
        arguments: Configs and options.
        rows: Responses of each kind.
        batches: Batches of the gradients.
        console: For progress messages.
        full_teacher: The model that a quantised teacher was made of; None for no comparison.
        skipped: Stages to leave out.
        minutes: See ``Examination``.

    Raises:
        ConfigError: No teacher, a teacher in a cache, several devices, or ``skipped`` stages where
            the teacher has another tokenizer.
    """
    command, *prepared = prepare(["fit", *arguments])
    del command
    cli = DistillationCLI(args=prepared, run=False)
    module, data = cli.model, cli.datamodule
    if not module.has_teacher:
        raise ConfigError("diagnose compares two models: give --model.teacher a folder or hub id")
    if cli.trainer.world_size > 1:
        raise ConfigError(
            f"diagnose runs on one device, this config asks for {cli.trainer.world_size}; give "
            "--trainer.devices 1 --trainer.strategy auto"
        )
    part = "val" if data.sources["val"] is not None else "train"
    if part == "train":
        data.sources["val"], data.splits["val"] = data.sources["train"], data.splits["train"]
    if full_teacher is not None:
        module.add_teacher_base(full_teacher, OPTION)
    data.val_rollouts = 1  # at least one, so that the validation begins with any rows

    def say(text: str) -> None:
        console.print(Text(text, style="dim"))

    examination: Examination | TextExamination
    if module.pair.teacher.tokenizer is None:
        examination = Examination(rows, batches, part, say, skipped, minutes)
    else:
        examination = _text_examination(rows, skipped, say)
    _validate(cli.trainer, examination, module, data)
    assert examination.found is not None
    return examination.found


def _text_examination(
    rows: int, skipped: frozenset[str], say: Callable[[str], None]
) -> TextExamination:
    """Return the examination of a teacher with another tokenizer; refuse skipped stages."""
    if skipped:
        raise ConfigError(
            f"--skip {','.join(sorted(skipped))}: the teacher has another tokenizer, and "
            "diagnose compares texts alone, without these stages; leave --skip out"
        )
    say(
        "the teacher has another tokenizer: its losses are over chunks of text; gradients, "
        "drift and trials compare single tokens and are left out, with --batches and --minutes"
    )
    return TextExamination(rows, say)


def _validate(trainer: lightning.Trainer, examination: Callback, module: Any, data: Any) -> None:
    """Run the shortest possible validation, for its start hook; it logs nothing."""
    trainer.callbacks = [examination]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.limit_val_batches = 1
    end_at_sigterm(trainer)
    with only_warnings():
        trainer.validate(module, data, verbose=False)


def _next_command(
    own: argparse.Namespace, options: Sequence[str], found: Diagnosis, advice: Sequence[Advice]
) -> str:
    """Return the ``compare`` command that would decide between the recommended methods."""
    names = [str(own.out / name) if name in CONTENDERS else name for name in contenders(advice)]
    configs = [f"--config {name}" for name in own.config or ()]
    is_steady = found.schedule == "constant"  # other schedules need the last step
    words = [
        "okd-lightning compare",
        *configs,
        f"--methods {shlex.quote(','.join(names))}",
        f"--seeds 0,1,2 --budget {'seconds=600' if is_steady else 'steps=500'}",
        *map(shlex.quote, shared_options(options)),
        *(["--data.val FILE.jsonl"] if found.part == "train" else []),
    ]
    return " ".join(words)
