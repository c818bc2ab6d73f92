"""Terminal output has no control characters, from any source.

Frozen here: escapes in place of controls, bidi marks, surrogates and line separators; joiners,
scripts and emoji stay; errors, warnings, Lightning's messages and rich's consoles all replace them.
"""

from __future__ import annotations

import io
import logging
import warnings

import lightning
import pytest
import tiny
from process_state import unchanged_process
from rich.table import Table
from rich.text import Text

import okd_lightning
from okd_lightning.errors import DataError, ServerError, one_line, printable
from okd_lightning.training.lightning_messages import PrintableConsole

HOSTILE = "a\x1b[2Jb\u202ec\x07\x9b\ud800\u2028d\re"
SHOWN = r"a\x1b[2Jb\u202ec\x07\x9b\ud800\u2028d\re"


def test_hidden_characters_become_their_escapes():
    assert printable(HOSTILE) == SHOWN
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"
    assert printable("नमस्ते العربية 👩\u200d🚀 日本 café") == "नमस्ते العربية 👩\u200d🚀 日本 café"


def test_one_line_joins_and_cuts():
    assert one_line(" a\n\n\tb\x1b ") == r"a b\x1b"
    assert one_line("x" * 100, longest=9) == "x" * 9 + "..."


@pytest.mark.parametrize("kind", [DataError, ServerError])
def test_errors_are_one_printable_line(kind):
    error = kind(f"row 3: {HOSTILE}\nokd-lightning: done")
    assert str(error).isprintable()
    assert r"\x1b[2J" in str(error)
    assert error.args[0].endswith("\nokd-lightning: done")


def test_a_console_prints_text_and_keeps_its_own_colours():
    file = io.StringIO()
    console = PrintableConsole(file=file, force_terminal=True, width=60, color_system="standard")
    table = Table(title=HOSTILE)
    table.add_row(Text("x", style="red"), HOSTILE.replace("\r", ""))
    console.print(table)
    console.print(f"[bold]{HOSTILE}[/bold]")
    text = file.getvalue()
    assert r"\x1b[2J" in text
    assert "\x1b[31mx" in text
    assert not any(mark in text for mark in ("\x1b[2J", "\u202e", "\x07", "\x9b", "\ud800"))


def test_messages_and_warnings_of_the_command_line_are_printable(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        okd_lightning.quiet()
        logger.warning("rows of %s", HOSTILE)
        assert file.getvalue() == f"rows of {SHOWN}\n"
    finally:
        logger.removeHandler(handler)
    line = warnings.formatwarning(UserWarning(HOSTILE), UserWarning, "x.py", 1)
    assert SHOWN in line


def test_quiet_leaves_what_a_run_says_of_itself(tmp_path, monkeypatch, capfd, caplog):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    caplog.set_level("INFO")
    rows = tiny.make_rows(4)
    with unchanged_process(), warnings.catch_warnings(record=True) as warned:
        okd_lightning.quiet()
        lightning.seed_everything(0)
        tiny.make_llama(1).save_pretrained(tmp_path / "student")
        tiny.make_tokenizer().save_pretrained(tmp_path / "student")
        module = okd_lightning.DistillationModule(
            str(tmp_path / "student"),
            tiny.make_llama(2, tiny.TEACHER_ROWS),
            tokenizer=tiny.make_tokenizer(),
        )
        data = okd_lightning.RolloutDataModule(rows, max_prompt_length=8, max_response_length=4)
        trainer = tiny.make_trainer(tmp_path, [okd_lightning.KD()], max_steps=1)
        trainer.fit(module, data)
    output = caplog.text + "".join(capfd.readouterr()) + "".join(str(w.message) for w in warned)
    assert "rows from" in output
    for noise in ("Seed set", "GPU available", "Loading weights", "eval mode", "LeafSpec", "zero"):
        assert noise not in output
