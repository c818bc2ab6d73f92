"""The page for people who come from TRL knows the TRL that is installed.

* Every option of GKDConfig, DistillationConfig and SFTConfig beyond TrainingArguments is in its
  table, with its default where the table has one, and no other is.
* Every option of ours that the page names exists, with the default that it says.
* The table of foreign names that error messages use has every name of the page's tables, with an
  option that the page names too; its names are TRL's, and its right-hand sides are real options.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings

import lightning
import pytest
from doc_pages import ROOT
from peft import LoraConfig
from torch.optim import AdamW
from transformers import TrainingArguments

from okd_lightning import DistillationModule, RolloutDataModule, callbacks
from okd_lightning.commands.foreign_options import OTHERS, TRL, hint_for
from okd_lightning.engines import Sampling, VLLMEngine, VLLMServer

TEXT = (ROOT / "docs" / "from_trl.md").read_text()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[dev]'")
    from trl import DistillationConfig, ModelConfig, ScriptArguments, SFTConfig
    from trl.experimental.gkd import GKDConfig


def fields(config: type, above: type) -> dict[str, object]:
    """Name → default of what a config has beyond another."""
    known = {field.name for field in dataclasses.fields(above)}
    return {f.name: f.default for f in dataclasses.fields(config) if f.name not in known}


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    text = TEXT.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


@pytest.mark.parametrize(
    ("config", "above", "extra"),
    [
        (GKDConfig, SFTConfig, set()),
        (DistillationConfig, TrainingArguments, set()),
        (SFTConfig, TrainingArguments, {"SFTTrainer", "peft_config"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_option_is_in_the_table(config, above, extra):
    listed = [name for row in rows(config.__name__) for name in names(row[0])]
    assert len(listed) == len(set(listed))
    assert set(listed) - extra == set(fields(config, above))


def test_gkd_defaults_are_theirs():
    expected = {name: str(default) for name, default in fields(GKDConfig, SFTConfig).items()}
    assert {names(row[0])[0]: row[1] for row in rows("GKDConfig")} == expected


def test_training_arguments_exist():
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    section = "TrainingArguments, as far as they matter"
    assert {name for row in rows(section) for name in names(row[0])} <= known


def test_version_is_named():
    assert f"of {trl.__version__}" in TEXT


OWNERS = {
    "data.sampling": Sampling,
    "model.engine": (VLLMServer, VLLMEngine),
    "model.optimizer": AdamW,
    "model.student_adapter": LoraConfig,
    "data": RolloutDataModule,
    "model": DistillationModule,
    "method": (callbacks.OKD, callbacks.GKD),  # of what both have, the page shows GKD's defaults
    "trainer": lightning.Trainer,
}


def parameters(section: str) -> dict[str, object]:
    owners = OWNERS[section] if isinstance(OWNERS[section], tuple) else (OWNERS[section],)
    found = [inspect.signature(owner).parameters.items() for owner in owners]
    return {name: parameter.default for items in found for name, parameter in items}


@pytest.mark.parametrize(
    "option", sorted(set(re.findall(r"--((?:data|model|method)\.[\w.]+)", TEXT)))
)
def test_our_options_exist(option):
    section, _, name = option.rpartition(".")
    if option in ("method.gamma", "method.lmbda"):  # of the shelf's IWOPD; an example of TRL's name
        return
    assert name in parameters(section), option


@pytest.mark.parametrize(
    ("option", "default"), re.findall(r"`--((?:data|method)\.[\w.]+)` \(([\d.]+)\)", TEXT)
)
def test_our_defaults_are_ours(option, default):
    section, _, name = option.rpartition(".")
    ours = parameters(section)[name]
    assert float(default) == (0.5 if name == "beta" else ours)  # beta None means 0.5


# ---------------------------------------------------------------- foreign names

SECTIONS = ("GKDConfig", "DistillationConfig", "SFTConfig")
ARGUMENTS = "TrainingArguments, as far as they matter"
TOP_LEVEL = {"seed_everything", "ckpt_path", "method"}
NO_OPTIONS = {"SFTTrainer"}


def options(text: str) -> set[str]:
    return set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)*)", text))


@pytest.mark.parametrize("section", [*SECTIONS, ARGUMENTS])
def test_error_messages_know_every_name_of_the_page(section):
    for row in rows(section):
        here = row[1] if section == "SFTConfig" else row[2]
        for name in set(names(row[0])) - NO_OPTIONS:
            hint = TRL.get(name) or OTHERS[name]
            if options(here) and not hint.startswith("nothing"):
                assert options(hint) & options(here), (name, hint, here)


def test_foreign_names_are_trls():
    configs = (GKDConfig, DistillationConfig, SFTConfig, TrainingArguments, ModelConfig)
    known = {f.name for config in (*configs, ScriptArguments) for f in dataclasses.fields(config)}
    assert TRL.keys() <= known
    assert not OTHERS.keys() & (known - {"max_prompt_length"})


@pytest.mark.parametrize("name", [*TRL, *OTHERS])
def test_what_is_advised_exists(name):
    advised = TRL.get(name) or OTHERS[name]
    found = options(advised)
    assert found or advised.startswith(("nothing: ", "okd-lightning", "the ", "engine_args"))
    for option in found - TOP_LEVEL - {"method.gamma"}:
        section, _, setting = option.rpartition(".")
        assert setting in parameters(section), option


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--model.lr", "here it is --model.learning_rate"),
        ("--per-device-train-batch-size=4", "here it is --data.batch_size"),
        ("max_new_tokens", "here it is --data.max_response_length"),
        ("--min_p", "no such option here: responses are"),
        ("--model.learning_rate", None),
        ("--nonsense", None),
    ],
)
def test_hints(typed, expected):
    found = hint_for(typed)
    assert found is None if expected is None else found.startswith(expected)
