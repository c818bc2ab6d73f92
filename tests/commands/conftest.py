"""Fixtures of the command-line tests: assets made once, and a function that runs commands."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from cli_workbench import (
    LIGHTNING_LOGGERS,
    QUIET,
    Assets,
    Result,
    make_rows,
    make_tokenizer,
    save_model,
    write_jsonl,
)
from process_state import unchanged_process

from okd_lightning.__main__ import main


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """Models, tokenizer and data, made once."""
    folder = tmp_path_factory.mktemp("assets")
    save_model(folder / "student", seed=1)
    save_model(folder / "teacher", seed=2, scale=5.0)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    write_jsonl(folder / "train.jsonl", make_rows(12, seed=1))
    write_jsonl(folder / "val.jsonl", make_rows(4, seed=2))
    return Assets(folder)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def okd(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Type a command in an empty folder: ``okd("fit", "--method", "KD")``."""

    def type_command(*argv: str | Sequence[str]) -> Result:
        words = [w for part in argv for w in ([part] if isinstance(part, str) else part)]
        capsys.readouterr()
        log = logging.StreamHandler(io.StringIO())
        for name in LIGHTNING_LOGGERS:
            logging.getLogger(name).addHandler(log)
        try:
            status = main(words)
        finally:
            for name in LIGHTNING_LOGGERS:
                logging.getLogger(name).removeHandler(log)
        return Result(status, *capsys.readouterr(), log=log.stream.getvalue())

    return type_command


@pytest.fixture
def fit(okd: Callable[..., Result], assets: Assets) -> Callable[..., Result]:
    """``fit`` with the tiny models and data into ``run/``; must succeed."""

    def type_fit(*argv: str | Sequence[str], models: bool = True) -> Result:
        base = [*assets.data, *QUIET, "--trainer.default_root_dir", "run"]
        result = okd("fit", base, assets.models if models else [], *argv)
        assert result.status == 0, result.err
        return result

    return type_fit


@pytest.fixture(autouse=True)
def _leave_the_process_as_it_was() -> Iterator[None]:
    """The command line may extend the module path and seed; other tests must not notice."""
    with unchanged_process():
        yield
