"""What people type and import, as text.

Frozen here: the config that ``fit --print_config`` prints, the names of the options of ``fit``, and
the signature of everything that ``docs/api`` lists. ``make golden`` writes the three files anew,
and the index of options that is in the package.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden.sections import WRITES
from process_state import unchanged_process

from okd_lightning.__main__ import main
from okd_lightning.callbacks.methods.base import Method
from okd_lightning.commands import unknown_options
from okd_lightning.commands.cli import DistillationCLI
from okd_lightning.commands.cli_arguments import OF_ONE_RUN
from okd_lightning.commands.cli_errors import subclass_names
from okd_lightning.commands.compare.command import compare_parser
from okd_lightning.commands.diagnose.command import diagnose_parser
from okd_lightning.training.earlier_options import EARLIER

SURFACE = Path(__file__).parent / "surface"
API = Path(__file__).parents[2] / "docs" / "api"


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


def test_the_options_of_fit(capsys):
    options = re.findall(r"^ {2,8}(?:-\w, )?(--[\w.+]+)", printed(capsys, "fit", "--help"), re.M)
    check("fit_options.txt", "\n".join(options) + "\n")
    assert "--model.student" in options
    help_text = " ".join(printed(capsys, "fit", "--help").split())
    # classes that other tests of this process define are listed too
    assert re.search(r"GKD, [\w, ]*; settings of one: --method\.help", help_text)
    assert re.search(r"AdamW, [\w, ]* more; settings of one: --model\.optimizer\.help", help_text)
    assert "--trainer.max_steps" in options


class ParsersBuilt(Exception):
    """Ends a command once its parsers are built; its argument has them by command."""


class ParsersOnly(DistillationCLI):
    def parse_arguments(self, parser, args):
        raise ParsersBuilt(self._subcommand_parsers)


def test_the_index_of_options_is_that_of_the_parser():
    with unchanged_process(), pytest.raises(ParsersBuilt) as built:
        ParsersOnly(args=[])
    (parsers,) = built.value.args
    parsers |= {"compare": compare_parser(), "diagnose": diagnose_parser()}
    options = {name: sorted(parser._option_string_actions) for name, parser in parsers.items()}
    explained = [*(f"--model.{name}" for name in EARLIER), *OF_ONE_RUN]
    index = {
        "options": options,
        "explained": explained,
        "methods": subclass_names(Method, within="okd_lightning."),
    }
    path = Path(unknown_options.__file__).with_name(unknown_options.INDEX)
    if WRITES:
        path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == index


def found_at(path: str) -> Any:
    """The object that a dotted name means: an export comes before a module of the same name."""
    name, *rest = path.split(".")
    found = importlib.import_module(name)
    for part in rest:
        name = f"{name}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(name)
    return found


def signature_of(found: Any) -> str:
    """As it is written; errors take what every exception takes."""
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
