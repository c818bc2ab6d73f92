"""Command-line options, configs and public signatures, as text.

Frozen here: the config that ``fit --print_config`` prints, the names of the options of ``fit``, and
the signature of everything that ``docs/api`` lists. ``make golden`` rewrites the three files,
and the index of options and help texts that is in the package.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
from forked import type_command
from golden.sections import WRITES
from process_state import unchanged_process

from okd_lightning.__main__ import COMMANDS, main
from okd_lightning.callbacks.methods.base import Method
from okd_lightning.commands import stored_help
from okd_lightning.commands.cli import DistillationCLI
from okd_lightning.commands.cli_arguments import OF_ONE_RUN
from okd_lightning.commands.cli_errors import subclass_names
from okd_lightning.commands.compare.command import compare_parser
from okd_lightning.commands.diagnose.command import diagnose_parser
from okd_lightning.commands.export_command import export_parser
from okd_lightning.commands.quickstart.command import quickstart_parser
from okd_lightning.commands.shrink.options import shrink_parser
from okd_lightning.training.earlier_options import EARLIER

SURFACE = Path(__file__).parent / "surface"
API = Path(__file__).parents[2] / "docs" / "api"

UNBROKEN = 100_000
"""Columns of a terminal that breaks no line."""

SCREENS = [("fit", 80), ("fit", 120), ("compare", 80), ("shrink", 80), ("quickstart", 60)]


def check(name: str, found: str) -> None:
    path = SURFACE / name
    if WRITES:
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found.splitlines() == path.read_text().splitlines()


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with unchanged_process(), pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_the_printed_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ("--model.student", "S", "--model.teacher", "T", "--data.train", "rows.jsonl")
    check("print_config.yaml", printed(capsys, "fit", "--method", "GKD", *words, "--print_config"))


def printed_help() -> int:
    """Print as JSON the help of every command at a width that breaks no line, of some at others."""
    texts = {}
    for command, width in [*((command, UNBROKEN) for command in COMMANDS), *SCREENS]:
        os.environ["COLUMNS"] = str(width)
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            main([command, "--help"])
        texts[f"{command} {width}"] = text.getvalue()
    print(json.dumps(texts))
    return 0


@pytest.fixture(scope="module")
def live_help(tmp_path_factory) -> dict[str, str]:
    """Help texts of the parsers, from a process that has imported no class of other tests."""
    done = type_command([], tmp_path_factory.mktemp("help"), printed_help)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class ParsersBuilt(Exception):
    """Ends a command once its parsers are built; its argument has them by command."""


class ParsersOnly(DistillationCLI):
    def parse_arguments(self, parser, args):
        raise ParsersBuilt(self._subcommand_parsers)


def all_parsers() -> dict[str, argparse.ArgumentParser]:
    with unchanged_process(), pytest.raises(ParsersBuilt) as built:
        ParsersOnly(args=[])
    (parsers,) = built.value.args
    own = {"compare": compare_parser(), "diagnose": diagnose_parser()}
    own |= {"export": export_parser(), "shrink": shrink_parser(), "quickstart": quickstart_parser()}
    return parsers | own


def test_the_index_of_options_is_that_of_the_parsers(live_help):
    options = {name: sorted(each._option_string_actions) for name, each in all_parsers().items()}
    sections, numbers = [], {}
    for command in COMMANDS:
        parts = [part.split("\n") for part in live_help[f"{command} {UNBROKEN}"].split("\n\n")]
        sections += [part for part in parts if part not in sections]
        numbers[command] = [sections.index(part) for part in parts]
    index = {
        "lightning": lightning.__version__,
        "options": options,
        # --data.* of shrink are read by the parser of fit
        "explained": [*(f"--model.{name}" for name in EARLIER), *OF_ONE_RUN, "--data"],
        "methods": subclass_names(Method, within="okd_lightning."),
        "help": numbers,
        "sections": sections,
    }
    path = Path(stored_help.__file__).with_name(stored_help.INDEX)
    if WRITES:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == index


@pytest.mark.parametrize(("command", "width"), SCREENS)
def test_the_stored_help_is_what_the_parser_prints(live_help, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = stored_help.stored_help(command, ["--method", "GKD", "--help"])
    assert text == live_help[f"{command} {width}"]


def test_the_options_of_fit(live_help):
    text = live_help[f"fit {UNBROKEN}"]
    options = re.findall(r"^ {2,8}(?:-\w, )?(--[\w.+]+)", text, re.M)
    check("fit_options.txt", "\n".join(options) + "\n")
    places = [text.index(f"\n  --{name}") for name in ("method ", "model.", "data.", "trainer.")]
    assert places == sorted(places)
    assert re.search(r"GKD, [\w, ]*; settings of one: --method\.help", text)
    assert re.search(r"AdamW, [\w, ]* more; settings of one: --model\.optimizer\.help", text)


def found_at(path: str) -> Any:
    """The object that a dotted name means: an export comes before a module of the same name."""
    name, *rest = path.split(".")
    found = importlib.import_module(name)
    for part in rest:
        name = f"{name}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(name)
    return found


def signature_of(found: Any) -> str:
    """Return the signature as written; for errors that of every exception."""
    if isinstance(found, type) and issubclass(found, Exception):
        return f"({found.__base__.__name__})"
    shown = str(inspect.signature(found)) if callable(found) else type(found).__name__
    return re.sub(r" at 0x[0-9a-f]+", "", shown)


def signatures() -> Iterator[str]:
    for page in sorted(API.glob("*.md")):
        for path in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M):
            yield f"{path}: {signature_of(found_at(path))}"


def test_signatures_of_what_the_pages_list():
    assert not [line for line in signatures() if line.endswith(": module")]
    check("signatures.txt", "\n".join(signatures()) + "\n")
