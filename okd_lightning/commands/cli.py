"""The command line: LightningCLI with a method section, one error formatter, and a run folder."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import lightning
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from okd_lightning.callbacks import (
    BestCheckpoint,
    LastCheckpoint,
    Preemption,
)
from okd_lightning.callbacks.methods.base import Method
from okd_lightning.callbacks.monitors.always import MONITORS
from okd_lightning.callbacks.monitors.progress_bar import RunProgressBar
from okd_lightning.checkpoints.folders import settled
from okd_lightning.commands.cli_arguments import chosen_options, prepare, read_comments_as_text
from okd_lightning.commands.cli_callbacks import check_callbacks
from okd_lightning.commands.cli_errors import instantiate, parse, readable_constructors
from okd_lightning.commands.cli_runs import choose_folder, train_in_folder
from okd_lightning.commands.config_trust import add_trust_flag
from okd_lightning.commands.default_folder import SharedFolder
from okd_lightning.commands.given_options import layers
from okd_lightning.commands.help_format import HelpFormatter, arrange_help
from okd_lightning.commands.quickstart.command import (
    quickstart_command,
    quickstart_parser,
    with_default_method,
)
from okd_lightning.commands.saved_config import flag_needed, run_folder_of
from okd_lightning.commands.settled_options import settle_rates
from okd_lightning.commands.teacher_options import check_teacher
from okd_lightning.data import RolloutDataModule
from okd_lightning.data.sources import describe_source
from okd_lightning.errors import (
    DifferingRanksError,
    NonFiniteError,
    OKDLightningError,
    PreemptedError,
    RewardError,
    RolloutTimeoutError,
    UsageError,
    WorkerError,
    one_line,
)
from okd_lightning.training.config_paths import expand_home, output_folder
from okd_lightning.training.lightning_messages import quiet
from okd_lightning.training.lightning_privates import end_at_sigterm
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.rank_faults import as_lost_rank, message_of_process
from okd_lightning.training.run_records import RunCSVLogger, note_measures
from okd_lightning.training.safeguards.idle_options import option_defaults

_TRAINER_DEFAULTS = {
    "gradient_clip_val": 1.0,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
    "num_sanity_val_steps": 0,
    "inference_mode": False,
}

_STEPS_BETWEEN_CHECKPOINTS = 100

_OUT_OF_MEMORY = (
    "; lower --data.batch_size (with --data.global_batch_size the steps stay the same) or "
    "--data.max_response_length, or set --model.gradient_checkpointing true"
)

_KNOWN = (OSError, MisconfigurationException, OKDLightningError, torch.OutOfMemoryError)
_AGREED = (
    *(DifferingRanksError, NonFiniteError, PreemptedError, RewardError),
    *(RolloutTimeoutError, WorkerError),
)
"""Errors that are raised on all ranks; rank 0 prints the message."""

_PARSERS: dict[tuple[Any, ...], dict[str, Any]] = {}
"""(Classes of an interface, command) → attributes that building its parser has set."""

_LIGHTNING = Path(lightning.__file__).parent
_TERMINATED = 128 + signal.SIGTERM


class DistillationCLI(LightningCLI):
    """``fit | validate | test | predict`` of a DistillationModule on a RolloutDataModule.

    A user's script with subclassed modules:

        DistillationCLI(MyModule, MyData, args=prepare(sys.argv[1:]))

    Attributes:
        monitors: Callbacks that every run has in addition to the configured ones.
    """

    monitors: tuple[type[Callback], ...] = MONITORS
    _has_chosen_folder = False

    def __init__(
        self,
        model_class: type[DistillationModule] = DistillationModule,
        datamodule_class: type[RolloutDataModule] = RolloutDataModule,
        **kwargs: Any,
    ) -> None:
        read_comments_as_text()
        args = kwargs.get("args")
        words = sys.argv[1:] if args is None else args
        self._typed = str(words[0]) if isinstance(words, list) and words else None
        is_plain = kwargs.keys() <= {"args"}
        classes = (type(self), model_class, datamodule_class)
        self._shared_as = (*classes, self._typed) if is_plain else None
        super().__init__(
            model_class,
            datamodule_class,
            save_config_callback=None,
            trainer_defaults=dict(_TRAINER_DEFAULTS),
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            **kwargs,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose help shortens lists of classes."""
        return super().init_parser(**{"formatter_class": HelpFormatter, **kwargs})

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command that was typed, or all of them: each needs a parser of 400 options."""
        every = super().subcommands()
        return {self._typed: every[self._typed]} if self._typed in every else every

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the ``--method`` section, and the flag that trusts a checkpoint's author."""
        parser.add_lightning_class_args(Method, "method", subclass_mode=True, required=False)
        add_trust_flag(parser)

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Load checkpoints with ``weights_only=True`` by default, and arrange ``--help``.

        Runs of one process, such as those of a comparison, share the parser of their command.
        """
        if self._shared_as is not None and self._shared_as in _PARSERS:
            vars(self).update(_PARSERS[self._shared_as])
            return
        super().setup_parser(*args, **kwargs)
        for command, parser in getattr(self, "_subcommand_parsers", {}).items():
            parser.set_defaults({"weights_only": True})
            arrange_help(command, parser)
        if self._shared_as is not None:
            names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
            _PARSERS[self._shared_as] = {name: getattr(self, name) for name in names}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse ``args``, without Lightning's own warning that ``sys.argv`` is ignored."""
        self.config = parse(parser, args, self._option_strings())
        config = self.config[self.config.subcommand] if "subcommand" in self.config else self.config
        words = [str(word) for word in args or ()]
        check_teacher(config.model.teacher, words)
        expand_home(config)
        settle_rates(config.model, layers(words))
        if config.trainer.default_root_dir is not None:
            output_folder(config.trainer.default_root_dir, "--trainer.default_root_dir")
        else:
            self._has_chosen_folder = True
            words += choose_folder(config, self.resolved_config())
        defaults = option_defaults(self.model_class, self.datamodule_class, self.trainer_class)
        self._chosen = chosen_options(self.config.get("subcommand"), words, defaults)

    def _option_strings(self) -> list[str]:
        # private: argparse has no public list of option strings
        parsers = [self.parser, *getattr(self, "_subcommand_parsers", {}).values()]
        return [option for parser in parsers for option in parser._option_string_actions]

    def instantiate_classes(self) -> None:
        """Instantiate the classes; a constructor's TypeError or ValueError becomes a ConfigError.

        Raises:
            ConfigError: A constructor refused its settings; its message is kept.
        """
        with readable_constructors():
            super().instantiate_classes()

    def _parse_ckpt_path(self) -> None:
        """Do nothing: ``prepare`` has placed a checkpoint's config below the typed options."""

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """Return the Trainer, with default loggers, monitors and checkpoints where none are set."""
        config = self._get(self.config_init, "trainer")
        method = self._get(self.config_init, "method")
        given = config["callbacks"] or []  # a single callback is not in a list
        configured = [*(given if isinstance(given, list) else [given]), *filter(None, [method])]
        folder = config["default_root_dir"]
        if (loggers := config["logger"]) is not False:
            if loggers in (None, True):
                loggers = TensorBoardLogger(
                    folder, name="tensorboard", version="", default_hp_metric=False
                )
            others = loggers if isinstance(loggers, Sequence) else [loggers]
            kwargs["logger"] = [RunCSVLogger(folder), *others]
        if config["max_epochs"] is None:
            is_open = config["max_steps"] == -1 and config["max_time"] is None
            kwargs["max_epochs"] = 1 if is_open else -1
        if config["enable_checkpointing"] is False:
            kwargs["enable_checkpointing"] = False
        else:
            if not _has(configured, ModelCheckpoint):
                configured.append(BestCheckpoint())
            if not _has(configured, LastCheckpoint):
                configured.append(LastCheckpoint(every_n_steps=_STEPS_BETWEEN_CHECKPOINTS))
            if not _has(configured, Preemption):
                configured.append(Preemption())
        if config["enable_progress_bar"] is not False and not _has(configured, ProgressBar):
            configured.append(RunProgressBar())
        configured += [kind() for kind in self.monitors if not _has(configured, kind)]
        if self._has_chosen_folder:
            configured.insert(0, SharedFolder())
        check_callbacks(configured)
        self.model.chosen_options = self._chosen
        resolved = self.resolved_config()
        self.model.run_state.config = yaml.safe_dump(resolved, sort_keys=False)
        self.model.run_state.resume_flag = flag_needed(resolved)
        self.model.run_state.started_in = str(Path.cwd())
        return self.trainer_class(**{**config, **kwargs, "callbacks": configured})

    def resolved_config(self) -> dict[str, Any]:
        """Return all settings of this run, as they go into config.yaml and into checkpoints."""
        dump = self.parser.dump(self.config, skip_none=False, format="yaml")
        config = yaml.safe_load(dump)
        config = config.get(self.config.get("subcommand"), config)
        sections = ("seed_everything", "model", "data", "method", "trainer")
        return {name: config[name] for name in sections if config.get(name) is not None}

    def fit(self, **kwargs: Any) -> None:
        """Train in the run's folder; a new run moves an older run's files to ``earlier``.

        A run that fails before its first step restores the folder.
        """
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.trainer.fit(**kwargs)
            return
        train_in_folder(self.trainer, self.model.run_state.config, **kwargs)

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        """Measure on the validation data and print one line per number."""
        self._measure("val", self.trainer.validate, verbose, **kwargs)

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        """Measure on the test data and print one line per number."""
        self._measure("test", self.trainer.test, verbose, **kwargs)

    def before_validate(self) -> None:
        """Let SIGTERM end a command that saves no checkpoint."""
        end_at_sigterm(self.trainer)

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Print the last validation's measures and the places of the run's files."""
        metrics = self.trainer.callback_metrics
        self._print({n: float(v) for n, v in metrics.items() if n.startswith("val/")})
        folder = Path(self.trainer.default_root_dir)
        last = folder / "checkpoints" / "last.ckpt"
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or last
        shown = f"{best}{self.model.run_state.resume_flag}"
        is_here = run_folder_of(str(best)).resolve() == folder.resolve()
        place = "" if is_here else f" --trainer.default_root_dir {folder}"
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(
                "trainer.fast_dev_run: every part of the run works; nothing was logged or kept"
            )
        elif settled(Path(best)).exists():
            rank_zero_info(
                f"run folder: {folder}\n"
                f"measure: okd-lightning test --ckpt_path {shown}{place}\n"
                f"export:  okd-lightning export --ckpt_path {shown} --out student"
            )
        else:
            rank_zero_info(f"run folder: {folder}; no checkpoint was written, nothing to export")

    def _measure(self, part: str, entry: Callable[..., Any], verbose: bool, **kwargs: Any) -> None:
        """Measure one part and print the numbers.

        Lightning's own table truncates names and has one column per loader.
        """
        measured = entry(verbose=False, **kwargs)
        numbers = {name: value for loader in measured for name, value in loader.items()}
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            data = describe_source(self.datamodule.sources[part])
            folder = self.trainer.default_root_dir
            note_measures(folder, part, data, kwargs.get("ckpt_path"), numbers)
        if verbose:
            self._print(numbers)

    def _print(self, numbers: Mapping[str, float]) -> None:
        if self.trainer.is_global_zero:
            width = max(map(len, numbers), default=0)
            for name, value in sorted(numbers.items()):
                print(f"{name:<{width}}  {value:.6g}")


Command: TypeAlias = Callable[[list[str], bool], int]
"""A further command: from the arguments after its name, and --debug, to the exit status."""


def run(
    arguments: Sequence[str], debug: bool = False, commands: Mapping[str, Command] | None = None
) -> int:
    """Run one command; turn any error into one line on stderr."""
    if "" not in sys.path:
        sys.path.append("")  # callbacks of the current folder, after everything installed
    quiet()
    try:
        command, *rest = arguments
        own = (commands or {}).get(command)
        return own(rest, debug) if own else _run(list(arguments))
    except Exception as error:
        if debug:
            raise
        return _failed(error)
    except (KeyboardInterrupt, SystemExit) as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)  # Lightning turns it into a SystemExit
        if not is_interrupt and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print("okd-lightning: interrupted", file=sys.stderr)
        return 130


def _failed(error: Exception) -> int:
    """Print one line about the error on stderr and return the exit status."""
    if isinstance(error, _AGREED):
        return _stopped_together(error)
    if isinstance(error, _KNOWN):
        advice = _OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"okd-lightning: {one_line(str(error))}{advice}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if _is_lightnings(error):
        print(f"okd-lightning: {one_line(str(error))}", file=sys.stderr)
        return 1
    unexpected = f"unexpected {type(error).__name__}: {one_line(str(error))} (--debug shows where)"
    known = as_lost_rank(error) or message_of_process(error)
    print(f"okd-lightning: {known or unexpected}", file=sys.stderr)
    return 1


def _is_lightnings(error: Exception) -> bool:
    """Return whether Lightning itself has refused a setting, such as a monitor without values."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None or not isinstance(error, RuntimeError | ValueError):
        return False
    return _LIGHTNING in Path(frame.tb_frame.f_code.co_filename).parents


def _stopped_together(error: Exception) -> int:
    """Print on one rank an error that all ranks have raised."""
    if getattr(rank_zero_only, "rank", 0) == 0:
        print(f"okd-lightning: {one_line(str(error))}", file=sys.stderr)
    return _TERMINATED if isinstance(error, PreemptedError) else 1


def _run(arguments: list[str]) -> int:
    command, *rest = arguments
    if command == "quickstart":
        parser = quickstart_parser()
        options = parse(parser, with_default_method(rest), list(parser._option_string_actions))
        quickstart_command(options, instantiate(parser, options).method)
        return 0
    DistillationCLI(args=prepare(arguments))
    return 0


def _has(callbacks: Sequence[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
