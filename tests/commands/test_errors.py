"""Readable lines for what jsonargparse says about a user's own classes.

* A name where a class is expected whose base has no settings lists what there is.
"""

import jsonargparse
import pytest

from okd_lightning.commands.cli_errors import parse
from okd_lightning.errors import UsageError


class Sink:
    """A base without settings."""


class FileSink(Sink):
    def __init__(self, path: str = "x") -> None:
        self.path = path


class Recorder:
    def __init__(self, sink: Sink | None = None) -> None:
        self.sink = sink


def test_an_unknown_class_whose_base_has_no_settings():
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recorder, "recorder")
    with pytest.raises(UsageError) as error:
        parse(parser, ["--recorder.sink", "FileSnk"], ["--recorder.sink"])
    assert str(error.value) == (
        "--recorder.sink: expected FileSink, Sink, or the import path of your own, got 'FileSnk'"
    )
