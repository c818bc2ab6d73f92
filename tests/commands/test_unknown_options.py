"""An option or a method that does not exist, answered from the stored index.

Frozen here: the early answer is that of the parser; what classes and mappings may have as settings
is left to the parser.
"""

from __future__ import annotations

import re
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
    ["compare", "--methds", "KD"],
    ["diagnose", "--full_techer", "x"],
    ["fit", "--full_teacher", "x"],
    ["fit", "--methods", "KD"],
    ["export", "--ckpt_pth", "x"],
    ["shrink", "--modle", "x"],
    ["quickstart", "--stpes", "3"],
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
    ("words", "hint"),
    [
        (["fit", "--full_teacher", "x"], "--full_teacher is an option of diagnose"),
        (["fit", "--full_techer", "x"], "--full_teacher is an option of diagnose"),
        (["fit", "--methods", "KD"], "did you mean --method?"),
    ],
)
def test_an_option_of_another_command_is_named(words: list[str], hint: str) -> None:
    with pytest.raises(UsageError) as error:
        check_names(words[0], words[1:])
    assert hint in str(error.value)


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
        ["--model.self_teacher", "frozen"],  # each with an explanation of its own
        ["--model.teacher_cache.folder", "cache", "--model.teacher_server", "url"],
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("fit --model.self_teacher frozen", "give --model.teacher FrozenSelf"),
        ("compare --methods KD --seed 3", "--seed is not an option of compare; give --seeds 0,1,2"),
    ],
)
def test_an_option_with_an_explanation_keeps_it(
    okd: Callable[..., Result], here: object, words: str, said: str
) -> None:
    command, *options = words.split()
    check_names(command, options)
    result = okd(command, *options)
    assert result.status == 2
    assert said in result.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("diagnose --full_techer x", "--full_techer; did you mean --full_teacher?"),
        ("compare --seds 0,1", "--seds; did you mean --seeds?"),
    ],
)
def test_options_of_a_command_are_hinted_at(words: str, line: str) -> None:
    command, *rest = words.split()
    with pytest.raises(UsageError, match=re.escape(line)):
        check_names(command, rest)


TEACHERS = ["--method", "KD", "--model.teacher", "TeacherEnsemble"]
SETTINGS = {
    "--full_teacher needs a value after it": ["diagnose", "--full_teacher"],
    "TeacherEnsemble has no setting 'teacher'; did you mean teachers?": [
        *("fit", *TEACHERS, "--model.teacher.teacher", "[a, b]")
    ],
    "--trainer.callbacks.layers: expected a whole number, got 'a'": [
        *("fit", "--method", "KD", "--trainer.callbacks+", "HiddenStates"),
        *("--trainer.callbacks.layers", "{a: 1}"),
    ],
    "--method.function: its settings need a class, and none is named; give --method.function one "
    "of AnswerMatch": ["fit", "--method", "Reward", "--method.function.path", "x"],
    "--method.divergence: its settings need a class": [
        *("fit", "--method", "KD", "--method.divergence.beta", "0.3")
    ],
    "--method : there is no such method; there are": ["fit", "--method="],
}


@pytest.mark.parametrize("line", SETTINGS)
def test_a_mistaken_setting_is_one_line(
    okd: Callable[..., Result], here: object, line: str
) -> None:
    command, *words = SETTINGS[line]
    pair = ["--model.student", "s", "--data.train", "t.jsonl"]
    result = okd(command, *pair, *words)
    assert (result.status, len(result.err.strip().splitlines())) == (2, 1), result.err
    assert line in result.err
