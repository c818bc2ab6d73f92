"""Commands and code on the pages work as shown.

* Every fenced block has a language. One that a reader cannot run at the desk says so in its title,
  with the reason, and is counted here.
* Blocks run page by page, in order, in one folder and one namespace: Python as it stands; files
  that a title names are saved; YAML parses as a config of ``fit``; every ``okd-lightning`` command
  runs on a small pair, shortened to a few steps (quickstart: tests/commands/quickstart), make
  targets and scripts exist. Mistakes fail with the message that the page shows.
* Commands of blocks that do not run are parsed by the command line's own parser.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from doc_pages import (
    MISTAKE,
    NOT_RUN,
    ROOT,
    Block,
    all_blocks,
    blocks_of,
    commands_of,
    own_arguments,
    page_names,
)
from lightning import Trainer

from okd_lightning import KD, DistillationModule, RolloutDataModule
from okd_lightning.__main__ import COMMANDS, main
from okd_lightning.commands.cli import DistillationCLI, quiet
from okd_lightning.commands.cli_arguments import prepare
from okd_lightning.commands.compare.command import compare_parser
from okd_lightning.commands.diagnose.command import diagnose_parser
from okd_lightning.commands.export_command import export_parser
from okd_lightning.commands.quickstart.command import quickstart_parser, with_default_method
from okd_lightning.commands.shrink.options import data_options, shrink_parser
from okd_lightning.errors import OKDLightningError

LANGUAGES = {"bash", "json", "python", "text", "yaml"}
NUM_NOT_RUN = {
    "README.md": 1,  # Qwen from the hub
    "docs/concepts/advantages.md": 2,  # a reward model from the hub; a judge's server
    "docs/concepts/another-tokenizer.md": 1,  # vLLM
    "docs/concepts/models.md": 1,  # a quantised folder
    "docs/from_trl.md": 2,  # TRL's side; Qwen
    "docs/images.md": 1,  # SmolVLM
    "docs/privileged.md": 1,  # GSM8K from the hub
    "docs/recipes.md": 1,  # models from the hub, GPUs
    "docs/running.md": 1,  # wandb
    "docs/scaling.md": 3,  # several devices, twice; SLURM
    "docs/real.md": 8,  # packages, a data set of the hub, SmolLM2
    "docs/shrink.md": 1,  # SmolLM2
    "docs/state.md": 1,  # SLURM
    "docs/tools.md": 1,  # Qwen
    "docs/vllm.md": 3,  # vLLM
}
"""Blocks that say so in their title; the README's own Python blocks run in test_readme."""
RUN_ELSEWHERE = {"docs/evaluation.md": "tests/commands/test_evaluation_doc.py"}
"""Pages whose blocks another test runs, and checks what comes of them."""

TINY = [
    *("--data.batch_size", "4", "--data.val_rollouts", "2", "--trainer.limit_val_batches", "1"),
    *("--data.max_prompt_length", "12", "--data.max_response_length", "12"),
    *("--trainer.val_check_interval", "1", "--trainer.enable_progress_bar", "false"),
    *("--trainer.accelerator", "cpu"),
]
SHORTER = {
    "fit": TINY,
    "diagnose": ["--rows", "4", "--batches", "3", *TINY[:4], *TINY[6:10]],
    "compare": ["--budget", "steps=2", "--seeds", "0", *TINY],
    "shrink": ["--rows", "4", "--data.max_prompt_length", "12", "--data.max_response_length", "12"],
}
PLACEHOLDERS = ["--model.student", "STUDENT", "--model.teacher", "TEACHER"]
"""Configs to which YAML blocks that are parts of a config are added."""
FLAGS = {"FLAGS": [*PLACEHOLDERS, "--data.train", "train.jsonl"]}
"""The README's word for a pair and its data."""


class ParsedError(Exception):
    """Thrown where instances would be made: everything has been parsed."""


class ParsingCLI(DistillationCLI):
    def before_instantiate_classes(self) -> None:
        raise ParsedError


def parse(arguments: list[str]) -> None:
    """Everything that a command's parser refuses raises."""
    command, *rest = arguments
    assert command in COMMANDS, command
    if command == "export":
        export_parser().parse_args(rest)
    elif command == "shrink":
        own, of_data = data_options(rest)
        shrink_parser().parse_args(own)
        if of_data:
            parse(["fit", *PLACEHOLDERS[:2], *of_data])
    elif command == "quickstart":
        quickstart_parser().parse_args(with_default_method(rest))
    else:
        if command in ("compare", "diagnose"):
            parser = compare_parser() if command == "compare" else diagnose_parser()
            own, rest = parser.parse_known_args(rest)
            rest = [word for name in own.config or () for word in ("--config", name)] + rest
        entry = "fit" if command in ("compare", "diagnose") else command
        with pytest.raises(ParsedError):
            ParsingCLI(args=prepare([entry, *rest]))


def run(arguments: list[str], place: str, capsys) -> None:
    """A command in the current folder, shortened."""
    command, *rest = arguments
    if command == "quickstart":
        parse(arguments)
        return
    words = [command, *rest]
    if "--help" not in words:
        words += SHORTER.get(command, []) + (length_of(rest) if command == "fit" else [])
    try:
        status = main(words)
    except SystemExit as stop:  # --help
        status = stop.code
    assert not status, f"{place}: okd-lightning {' '.join(words)}\n{capsys.readouterr().err}"


def length_of(arguments: list[str]) -> list[str]:
    """Return the options of a short run: two steps, and two more where a finished run continues."""
    goes_on = "--ckpt_path" in arguments and "last" not in arguments
    return ["--trainer.max_steps", "4" if goes_on else "2"]


def check_other(words: list[str], place: str) -> None:
    """A command that is not ours: a target of the Makefile, or a script that is there."""
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), place
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file() or Path(words[1]).is_file(), f"{place}: {words[1]}"
    else:
        pytest.fail(
            f'{place}: {" ".join(words)!r} is nobody\'s; mark the block: title="{NOT_RUN}…"'
        )


def read_yaml(block: Block) -> None:
    """Parse a YAML block as ``--config`` with a student and a teacher."""
    Path("block.yaml").write_text(block.text)
    assert isinstance(yaml.safe_load(block.text), dict), block.place
    parse(["fit", "--config", "block.yaml", *PLACEHOLDERS])


def run_bash(block: Block, capsys) -> None:
    for words in commands_of(block):
        arguments = own_arguments(words)
        if arguments is None:
            check_other(words, block.place)
        elif block.title == MISTAKE:
            capsys.readouterr()
            assert main(arguments) != 0, block.place
            message = capsys.readouterr().err.strip().splitlines()[-1]
            assert message in (ROOT / block.page).read_text(), f"{block.place}: {message}"
        else:
            run(arguments, block.place, capsys)


def run_block(block: Block, namespace: dict, capsys) -> None:
    if block.file:
        Path(block.file).write_text(block.text)
    if block.language == "python":
        exec(compile(block.text, block.place, "exec", dont_inherit=True), namespace)
    elif block.language == "yaml":
        read_yaml(block)
    elif block.language == "json":
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
    elif block.language == "bash":
        run_bash(block, capsys)


def pages_with_blocks() -> list[str]:
    """Pages with something to run; the README's Python blocks are test_readme's."""
    runs = [block for block in all_blocks() if block.is_run and block.language != "text"]
    return [page for page in dict.fromkeys(b.page for b in runs) if page not in RUN_ELSEWHERE]


@pytest.mark.parametrize("page", pages_with_blocks())
@pytest.mark.filterwarnings("ignore")  # as a reader's Trainer warns
def test_page_runs(page, here, capsys):
    namespace: dict = {"__name__": "page"}
    is_readme = page == "README.md"
    for block in blocks_of(page):
        if block.is_run and not (is_readme and block.language == "python"):
            torch.manual_seed(0)
            run_block(block, namespace, capsys)


def not_run() -> list[Block]:
    return [block for block in all_blocks() if not block.is_run]


@pytest.mark.parametrize("block", not_run(), ids=lambda block: block.place)
@pytest.mark.filterwarnings("ignore")
def test_block_that_does_not_run_parses(block, here, checkpoint):
    if block.language == "python":
        compile(block.text, block.place, "exec", dont_inherit=True)
        return
    assert block.language == "bash"
    quiet()
    for other in blocks_of(block.page):  # the page's own configs
        if other.file is not None and other.language == "yaml":
            Path(other.file).write_text(other.text)
    for words in commands_of(block):
        arguments = own_arguments(words)
        for path in re.findall(r"--ckpt_path (\S+\.ckpt)", " ".join(arguments or [])):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(checkpoint, path)
        if arguments:
            parse([part for word in arguments for part in FLAGS.get(word, [word])])


def test_what_does_not_run_is_counted():
    found = Counter(block.page for block in not_run())
    assert found == NUM_NOT_RUN
    assert all(len(block.title) > len(NOT_RUN) + 10 for block in not_run()), "give the reason"


@pytest.mark.parametrize("block", all_blocks(), ids=lambda block: block.place)
def test_block_says_what_it_is(block):
    assert block.language in LANGUAGES, block.place


@pytest.mark.parametrize("page", page_names())
def test_options_in_the_text_exist(page):
    text = (ROOT / page).read_text()
    sections = {"model": DistillationModule, "data": RolloutDataModule}
    for section, owner in sections.items():
        known = inspect.signature(owner).parameters
        named = re.findall(rf"--{section}\.(\w+)", text)
        assert not set(named) - set(known) - {"OPTION"}, page


@pytest.mark.parametrize(("page", "test"), RUN_ELSEWHERE.items())
def test_page_is_run_elsewhere(page, test):
    """The other test selects each bash block by a word in it, and the one Python block."""
    text = (ROOT / test).read_text()
    assert f'"{Path(page).name}"' in text
    words = [word.replace("\\n", "\n") for word in re.findall(r"commands\(\"(.+?)\"\)", text)]
    for block in blocks_of(page):
        if block.language == "bash":
            assert any(word in block.text for word in words), block.place
        else:
            assert f"```{block.language}" in text, block.place
    assert Counter(block.language for block in blocks_of(page))["python"] == 1


def test_pages_are_found():
    assert {"README.md", "docs/tutorial.md", "callbacks/README.md"} <= set(page_names())
    assert len([b for b in all_blocks() if b.language == "bash"]) > 20


def test_a_broken_command_is_noticed(here):
    with pytest.raises(OKDLightningError, match="betta"):
        parse(
            [
                "fit",
                *PLACEHOLDERS,
                "--data.train",
                "train.jsonl",
                "--method",
                "GKD",
                "--method.betta",
                "0",
            ]
        )


def test_subclassed_module_trains_with_its_own_optimizer(here):
    (block,) = [b for b in blocks_of("docs/concepts/extending.md") if "WithSGD" in b.text]
    namespace: dict = {}
    run_block(block, namespace, None)
    module = namespace["WithSGD"]("STUDENT", "TEACHER", learning_rate=1e-2)
    data = RolloutDataModule("train.jsonl", max_prompt_length=12, max_response_length=12)
    trainer = Trainer(
        callbacks=[KD()],
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
