"""Entry point: ``okd-lightning`` and ``python -m okd_lightning``.

Handles ``--version``, ``--help``, ``COMMAND --help`` and a mistyped command, option or method at
once; everything else imports the command line (several seconds of torch and transformers).
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from okd_lightning import __version__
from okd_lightning.commands.stored_help import stored_help
from okd_lightning.commands.unknown_options import check_names
from okd_lightning.errors import UsageError

COMMANDS = {
    "quickstart": "watch a student learn: embedded task and teacher, no network, a few minutes",
    "fit": "train a student: --config FILE|NAME, --method NAME, --model.*, --data.*, --trainer.*",
    "validate": "measure a student on the validation data (--ckpt_path alone is enough)",
    "test": "measure a student on the test data (--ckpt_path alone is enough)",
    "predict": "write the student's answers to predictions.jsonl (--ckpt_path alone is enough)",
    "compare": "several methods under one budget: --config FILE|NAME --methods KD,GKD --out DIR",
    "diagnose": "measure a pair and its prompts before a long run: --config FILE|NAME --out DIR",
    "export": "write a Hugging Face folder: --ckpt_path FILE --out FOLDER",
    "shrink": "cut a student from a teacher: --model TEACHER --layers N --out FOLDER",
}

_USAGE = """\
usage: okd-lightning COMMAND [options]

Knowledge distillation of language models on PyTorch Lightning.

commands:
{commands}

options:
  --version   print the version
  --debug     show the whole traceback of an error
  --help      this text; okd-lightning COMMAND --help lists a command's options

first steps:
  okd-lightning quickstart
  okd-lightning fit --config tinystories --model.student STUDENT --model.teacher TEACHER \\
    --data.train train.jsonl --data.val val.jsonl
"""


def usage() -> str:
    """Return the overview that ``--help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return _USAGE.format(commands="\n".join(lines))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; None for ``sys.argv``.

    Returns:
        The exit status: 0, or 1 for an error, 2 for wrong usage.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage(), end="")
        return 0 if arguments else 2
    if arguments[0] in ("--version", "-V"):
        print(f"okd-lightning {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(
            f"okd-lightning: unknown command {arguments[0]!r}; {hint}commands are "
            f"{', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    if not debug and "lightning" not in sys.modules:  # else nothing is saved
        if text := stored_help(arguments[0], arguments[1:]):
            print(text, end="")
            return 0
        try:
            check_names(arguments[0], arguments[1:])
        except UsageError as error:
            print(f"okd-lightning: {error}", file=sys.stderr)
            return 2
    # takes seconds, avoided for --version
    from okd_lightning.commands.cli import run  # noqa: PLC0415
    from okd_lightning.commands.compare.command import compare_command  # noqa: PLC0415
    from okd_lightning.commands.diagnose.command import diagnose_command  # noqa: PLC0415
    from okd_lightning.commands.export_command import export_command  # noqa: PLC0415
    from okd_lightning.commands.shrink.command import shrink_command  # noqa: PLC0415

    own = {
        "compare": compare_command,
        "diagnose": diagnose_command,
        "export": export_command,
        "shrink": shrink_command,
    }
    return run(arguments, debug, own)


if __name__ == "__main__":
    sys.exit(main())
