"""An option or a method that does not exist, answered from the stored index.

Frozen here: the early answer is that of the parser; what classes and mappings may have as settings
is left to the parser; torch is not imported for it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from cli_workbench import Result

from okd_lightning.commands.unknown_options import check_names
from okd_lightning.errors import UsageError

MISTAKES = [
    ["fit", "--modle.student", "x"],
    ["fit", "--model.studnet=x"],
    ["fit", "--lr", "1"],
    ["fit", "--trainer.callback", "LastCheckpoint"],
    ["fit", "--zzz.yyy", "3"],
    ["fit", "--method", "KDD"],
    ["fit", "--method=gkd"],
    ["validate", "--ckpt_pth", "x"],
    ["compare", "--methods", "KD", "--trainer.max_step", "3"],
]


@pytest.mark.parametrize("words", MISTAKES, ids=" ".join)
def test_the_early_answer_is_the_parsers(
    okd: Callable[..., Result], here: object, words: list[str]
) -> None:
    with pytest.raises(UsageError) as early:
        check_names(words[0], words[1:])
    result = okd(*words)  # in a process that has Lightning, where the parser answers
    assert (result.status, result.err.strip()) == (2, f"okd-lightning: {early.value}")


@pytest.mark.parametrize(
    "words",
    [
        ["--method", "KD", "--method.tempratur", "2"],
        ["--method", "my_module.Mine", "--method.own", "2"],
        ["--method.class_path=KD", "--method.init_args.temperature=2"],
        ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.keep", "3"],
        ["--model.student.model_type", "llama", "--data.chat_template_kwargs.thinking", "false"],
        ["--model.student_adapter", "LoraConfig", "--model.student_adapter.r", "4"],
        ["--data.prompt_template", "--- {question}"],
        ["-c", "run.yaml", "--print_config", "--trust_checkpoint", "--seed_everything=3"],
    ],
    ids=" ".join,
)
def test_what_the_index_cannot_decide_is_left_to_the_parser(words: list[str]) -> None:
    check_names("fit", words)


def test_commands_have_their_own_options() -> None:
    check_names("validate", ["--verbose", "false"])
    check_names("compare", ["--methods", "KD,GKD", "--seeds", "0,1", "--data.train", "x.jsonl"])
    check_names("shrink", ["--layers", "3"])
    with pytest.raises(UsageError, match="--methods"):
        check_names("fit", ["--methods", "KD"])


def test_torch_is_not_imported_for_it() -> None:
    program = (
        "import sys; from okd_lightning.__main__ import main; "
        "status = main(['fit', '--model.studnet', 'x']); "
        "sys.exit(99 if 'torch' in sys.modules else status)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.endswith("did you mean --model.student?\n")
