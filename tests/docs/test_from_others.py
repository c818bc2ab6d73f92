"""The page for people who come from other trainers names options that exist here.

Frozen here: each option in a column *here*, and each class that it names, exists; a section cites
the commit of its source. Its data formats are read in tests/data/test_foreign_rows.py.
"""

from __future__ import annotations

import inspect
import json
import re
from importlib import resources

import pytest
from doc_pages import ROOT

from okd_lightning import callbacks, divergences, engines, teachers
from okd_lightning.engines import Sampling

TEXT = (ROOT / "docs" / "from_others.md").read_text()
INDEX = json.loads(
    resources.files("okd_lightning.commands").joinpath("option_index.json").read_text()
)
SECTIONS = ("ms-swift", "verl", "NeMo RL")
METHODS = (callbacks.GKD, callbacks.OPD)


def here(section: str) -> list[str]:
    """The cells of a section's last column."""
    text = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ")[-1] for line in lines[2:]]


def exists(option: str) -> bool:
    section, _, name = option.rpartition(".")
    if section == "--method":
        return any(name in inspect.signature(method).parameters for method in METHODS)
    if section == "--data.sampling":
        return name in inspect.signature(Sampling).parameters
    return option in {*INDEX["options"]["fit"], "--method"}


@pytest.mark.parametrize("section", SECTIONS)
def test_the_options_here_exist(section):
    cells = here(section)
    options = [option for cell in cells for option in re.findall(r"--[a-z_.]+\+?", cell)]
    assert len(options) >= 8
    assert not [option for option in options if not exists(option)]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_classes_here_exist(section):
    rooms = (callbacks, divergences, engines, teachers)
    named = re.findall(r"[` =]([A-Z]\w+)`", " ".join(here(section)))
    assert named
    assert not [name for name in named if not any(hasattr(room, name) for room in rooms)]


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_cites_its_source(section):
    text = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    assert re.search(r"from `[\w./-]+` at commit [0-9a-f]{7}\.", text)
