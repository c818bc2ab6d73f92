"""``okd-lightning export``: the options, and the module that is built from a checkpoint."""

from __future__ import annotations

import jsonargparse
import yaml

from okd_lightning.bounded_files import load_yaml
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.commands.cli import DistillationCLI
from okd_lightning.commands.cli_arguments import prepare, take_flag
from okd_lightning.commands.cli_errors import parse
from okd_lightning.commands.config_trust import FLAG, add_trust_flag
from okd_lightning.commands.export import (
    AdapterForm,
    ExportPart,
    StoredFormat,
    export_online_module,
    export_student,
)
from okd_lightning.training.config_paths import output_folder


def export_parser() -> jsonargparse.ArgumentParser:
    """Return the parser of ``okd-lightning export``."""
    parser = jsonargparse.ArgumentParser(
        prog="okd-lightning export",
        usage="okd-lightning export --ckpt_path FILE --out FOLDER [--OPTION VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        description="Write a checkpoint's student (or online module) as a Hugging Face folder.",
    )
    parser.add_argument("--ckpt_path", type=str, required=True, help="a checkpoint of fit")
    parser.add_argument("--out", type=str, required=True, help="the folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="write also into a folder of something else"
    )
    add_trust_flag(parser)
    parser.add_argument(
        "--adapter", type=AdapterForm, default="merged", help="a LoRA student: merged, or apart"
    )
    parser.add_argument(
        "--what", type=ExportPart, default="student", help="the student, or OKD's online module"
    )
    parser.add_argument(
        "--dtype",
        type=StoredFormat,
        help="number format of the written weights; by default that of training",
    )
    return parser


def export_command(arguments: list[str], debug: bool = False) -> int:
    """Write a checkpoint's student, or its online module.

    Args:
        arguments: The words after ``export``.
        debug: Unused: the caller handles errors.

    Raises:
        OKDLightningError: An unknown option, a checkpoint that does not exist or is not ours, or a
            folder that cannot be written.
    """
    del debug
    parser = export_parser()
    is_trusted, words = take_flag(arguments)
    options = parse(parser, words, list(parser._option_string_actions))
    out = output_folder(options.out, "--out")
    flag = [FLAG] if is_trusted else []
    _, _, text = prepare(["fit", "--ckpt_path", options.ckpt_path, *flag], can_type=False)[:3]
    checkpoint = read_checkpoint(options.ckpt_path, with_weights=True)
    model_only = yaml.safe_dump({"model": load_yaml(text)["model"]})
    cli = DistillationCLI(args=["--config", model_only], run=False)
    if options.what == "online_module":
        export_online_module(cli.model, checkpoint, out, options.overwrite, options.dtype)
    else:
        export_student(
            cli.model, checkpoint, out, options.adapter, options.overwrite, options.dtype
        )
    print(f"{options.what} written to {out}")
    return 0
