"""Commands of the option-set cases, run in this process, and their output files.

A command ends well, or with one clean line on stderr; anything else is an ``AssertionError``, which
the program counts as unexpected. ``check_resume`` trains twice: left alone, and killed somewhere
and typed again, which must give the same run folder bit for bit.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from cli_workbench import STUDENT_FIELDS, make_rows, make_tokenizer, save_model, write_jsonl
from fuzz_program import Bench
from run_comparison import differences
from soak import RUN
from soak_marks import PLACES, Board, Kill, Marks, mark_everything
from transformers import GPT2Config, GPT2LMHeadModel

# what commands import when they are typed: once here, in place of once a case
import okd_lightning.commands.compare.command
import okd_lightning.commands.diagnose.command
import okd_lightning.commands.export_command  # noqa: F401
from okd_lightning.__main__ import main
from okd_lightning.errors import OKDLightningError

Words: TypeAlias = list[str]

_LONGEST_LINE = 1500
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


class Refused(OKDLightningError):
    """A command that ended with one clean line."""


def make_assets(folder: Path) -> None:
    """Models and rows that all cases read; made once."""
    if folder.exists():
        return
    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    save_model(making / "student", seed=1)
    save_model(making / "teacher", seed=2, scale=5.0)
    save_model(making / "teacher2", seed=4, scale=3.0)
    save_model(making / "narrow", seed=3, fields={**STUDENT_FIELDS, "num_hidden_layers": 1})
    save_model(making / "tied", seed=5, fields={**STUDENT_FIELDS, "tie_word_embeddings": True})
    torch.manual_seed(6)
    small = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
    gpt2 = GPT2Config(vocab_size=261, bos_token_id=0, eos_token_id=1, **small)
    GPT2LMHeadModel(gpt2).save_pretrained(making / "gpt2")
    chats = make_tokenizer()
    chats.save_pretrained(making / "gpt2")
    save_model(making / "chats", seed=1)
    chats.chat_template = _CHAT_TEMPLATE
    chats.save_pretrained(making / "chats")
    write_jsonl(making / "train.jsonl", make_rows(12, seed=1))
    write_jsonl(making / "val.jsonl", make_rows(4, seed=2))
    making.rename(folder)


def type_command(argv: Sequence[str]) -> tuple[int, str]:
    """The exit status of a command, and what it printed."""
    with Path("typed.txt").open("w+") as printed:
        kept = os.dup(1), os.dup(2), sys.stdout, sys.stderr
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        # under a test runner the streams are not those of the process
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        try:
            status = main(list(argv))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            sys.stdout, sys.stderr = kept[2:]
            os.close(kept[0])
            os.close(kept[1])
        printed.seek(0)
        return status, printed.read()


def check_command(argv: Sequence[str]) -> str:
    """Type a command that ends well.

    Returns:
        What it printed.

    Raises:
        Refused: It ended with one clean line.
        AssertionError: It ended otherwise.
    """
    status, text = type_command(argv)
    if status == 0:
        return text
    starts = ("okd-lightning: warning: ",)
    lines = [line for line in text.splitlines() if line.startswith("okd-lightning: ")]
    lines = [line for line in lines if not line.startswith(starts)]
    is_clean = (
        status in (1, 2)
        and len(lines) == 1
        and "Traceback" not in text
        and lines[0].isprintable()
        and len(lines[0]) < _LONGEST_LINE
        and not lines[0].startswith("okd-lightning: unexpected ")
    )
    assert is_clean, f"status {status}: {text[-3000:]}"
    raise Refused(lines[0])


def kill_during(argv: Sequence[str], kill: Kill) -> int:
    """Type a command in a fork that is killed at a place; its exit status."""
    board = Board()
    child = os.fork()
    if child == 0:
        status = 99
        try:
            mark_everything(Marks(kill, board), board)
            status = type_command(argv)[0]
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    # before the first step a SIGTERM ends the process as any other: nothing has begun
    is_early = ended == -signal.SIGTERM and not board.has_trained
    return 128 + signal.SIGTERM if is_early else ended


def draw_kill(draw: random.Random) -> Kill:
    """A place of a run and how often it is passed before."""
    phase = draw.choice(list(PLACES))
    which = draw.choice((signal.SIGKILL, signal.SIGTERM))
    return Kill(draw.choice(PLACES[phase]), number=draw.randint(1, 4), signal=which)


def check_resume(bench: Bench, argv: Sequence[str], kills: Sequence[Kill]) -> None:
    """Train, and train with kills between, each time by the same command; both must be equal.

    Raises:
        Refused: The first one ended with one clean line.
        AssertionError: A run ended otherwise, or the folders differ.
    """
    places = [bench.folder / "whole", bench.folder / "cut"]
    for place in places:
        place.mkdir()
    os.chdir(places[0])
    check_command(argv)
    os.chdir(places[1])
    for kill in kills:
        status = kill_during(argv, kill)
        told = Path("typed.txt").read_text(errors="replace")[-2000:]
        assert status in (0, -signal.SIGKILL, 128 + signal.SIGTERM), f"{kill}: {status} {told}"
    try:
        check_command(argv)
    except Refused as error:
        raise AssertionError(f"{kills}: not resumed: {error}") from error
    found = differences(places[0] / RUN, places[1] / RUN)
    assert not found, f"{kills}: {found}"
