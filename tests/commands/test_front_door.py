"""Output of the program in a shell.

* ``--version``, ``--help`` and a mistyped command answer without torch;
* a run's console output names the data, the steps, the folder and the next command, and holds no
  library's chatter.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_workbench import LENGTHS, NOISE, Assets, Result
from forked import type_command

import okd_lightning
from okd_lightning.__main__ import COMMANDS, main, usage
from okd_lightning.callbacks import KD
from okd_lightning.commands.stored_help import stored_help
from okd_lightning.commands.unknown_options import check_names

OWN_OPTIONS = {
    **{"quickstart": "--steps", "compare": "--methods", "diagnose": "--rows"},
    "shrink": "--drop_layers",
}
"""An option of each command; --ckpt_path of the others."""

WATCHED = """
import sys
from okd_lightning.__main__ import main
status = main(sys.argv[1:])
print("heavy:", sorted({"torch", "transformers", "lightning", "jsonargparse"} & set(sys.modules)))
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["--version"], 0, [f"okd-lightning {okd_lightning.__version__}"]),
        (["--help"], 0, [*COMMANDS, "okd-lightning quickstart"]),
        ([], 2, ["usage"]),
        (["fit", "--help"], 0, ["--method", "--model.student", "--data.train"]),
        (["export", "--out", "x", "-h"], 0, ["--adapter"]),
        (["fit", "--model.studnet", "x"], 2, ["did you mean --model.student?"]),
        (["fit", "--method", "GDK"], 2, ["did you mean GKD?"]),
        (["export", "--ckpt_pth", "x"], 2, ["did you mean --ckpt_path?"]),
        (["fitt"], 2, ["unknown command 'fitt'", "did you mean fit?"]),
        (["--config", "x.yaml"], 2, ["unknown command '--config'"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value),
)
def test_answers_without_heavy_imports(argv: list[str], status: int, words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED, *argv], capture_output=True, text=True)
    assert done.returncode == status
    assert "heavy: []" in done.stdout
    assert all(word in done.stdout + done.stderr for word in words)


def test_the_first_steps_are_commands_that_run(okd: Callable[..., Result], assets: Assets) -> None:
    lines = usage().split("first steps:")[1].replace("\\\n", " ").strip().splitlines()
    quickstart, fit = (line.split()[1:] for line in lines)
    assert quickstart == ["quickstart"]
    given = {"STUDENT": assets.student, "TEACHER": assets.teacher}
    given |= {"train.jsonl": assets.train, "val.jsonl": assets.val}
    result = okd([given.get(word, word) for word in fit], "--trainer.max_steps", "1")
    assert result.status == 0, result.err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    text = stored_help(command, ["--help"])
    assert text is not None
    assert f"usage: okd-lightning {command} " in text
    assert OWN_OPTIONS.get(command, "--ckpt_path") in text


def test_next_to_another_lightning_the_parser_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser is used, because that Trainer may have other options than the stored ones."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.6.99")
    assert stored_help("fit", ["--help"]) is None
    check_names("fit", ["--trainer.later_option", "1"])


def test_a_whole_run_on_the_console(assets: Assets, tmp_path: Path) -> None:
    """The output has no sharding tips, deprecations or bars in a pipe, and each message once."""
    words = ["fit", *assets.models, *LENGTHS, "--data.train", assets.train]
    words += ["--data.val", assets.val, "--method", "GKD", "--trainer.accelerator", "cpu"]
    words += ["--model.gradient_checkpointing", "true", "--trainer.log_every_n_steps", "1"]
    words += ["--trainer.default_root_dir", "run"]
    done = type_command(words, tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    text = done.stdout + done.stderr
    assert not [noise for noise in NOISE if noise in text], text
    for words in (
        "train: 12 rows",
        "an epoch is 6 optimizer steps of 2 rows",
        "run folder: run",
        "okd-lightning test --ckpt_path",
        "okd-lightning export --ckpt_path",
    ):
        assert text.count(words) == 1, text


def test_many_methods_of_ones_own_do_not_hide_the_librarys(capsys, assets: Assets):
    own = [type(f"Own{i}", (KD,), {}) for i in range(30)]
    assert main(["fit", *assets.models, *assets.data, "--method", "KDD"]) != 0
    listed = capsys.readouterr().err.split("there are ")[1]
    assert "GKD" in listed
    assert own[0].__name__ not in listed
