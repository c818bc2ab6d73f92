"""Options that have no effect in a run are named in one warning line.

Semantics frozen:

* every rule of ``RULES`` warns in a run where its option has no effect, and is silent in one where
  the option acts;
* from Python, arguments that are not the defaults count; a resumed run says nothing;
* on the command line, what is typed and what a config of one's own changes counts; packaged
  configs, defaults in a config, and checkpoints' configs do not;
* ``validate`` and ``test`` say that sampling settings are for training.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml

from okd_lightning.callbacks import GKD, KD, SFT, LastCheckpoint, SampleTable
from okd_lightning.commands.cli_arguments import chosen_options, packaged_configs
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import Sampling
from okd_lightning.engines.engine import EngineSource
from okd_lightning.engines.transformers_engine import TransformersEngine
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.safeguards.idle_options import RULES

MARK = "has no effect in this run"
VAL = tiny.make_rows(3, seed=2)


class OwnEngine(EngineSource):
    def engine(self, model, vocabulary, eos_ids):
        return TransformersEngine(model, vocabulary, eos_ids)


@dataclass
class Case:
    """A value of an option, and a run in which it has no effect, and one in which it acts.

    A run is what differs from one step of KD without validation data; "acts" may be None for an
    option that never acts, or acts with other models.
    """

    value: Any
    idle: dict[str, Any] = field(default_factory=dict)
    acts: dict[str, Any] | None = None


ON_POLICY = {"method": lambda: GKD(on_policy_fraction=1.0)}
MEASURED = {"val": VAL, "data": {"val_rollouts": 2}}
CASES = {
    "data.sampling": Case("Greedy", {}, ON_POLICY),
    "data.prompts_per_rollout": Case(8, {}, ON_POLICY),
    "data.rollout_lag": Case(1, {}, ON_POLICY),
    "data.max_turns": Case(2, {}, ON_POLICY),
    "data.val_rollouts": Case(2, {}, MEASURED),
    "data.subset": Case("main", {}, {"folder": "val"}),
    "data.train_split": Case("train", {}, {"folder": "train"}),
    "data.val_split": Case("test", {"val": VAL}, {"folder": "val"}),
    "data.test_split": Case("test", {}, {"folder": "test"}),
    "data.token_cache": Case("tokens", {}, {"rows": tiny.make_rows(1000)}),
    "data.images_column": Case("pictures"),  # acts in tests/training/test_images
    "model.engine": Case("my.Engine", {}, MEASURED),
    "model.teacher_dtype": Case("float64", {"teacher": None, "method": SFT}, {"teacher": "folder"}),
    "model.attn_implementation": Case("eager", {}, {"teacher": "folder"}),
    "model.freeze_vision": Case(False),  # likewise
    "trainer.gradient_clip_algorithm": Case("norm", {}, {"trainer": {"gradient_clip_val": 1.0}}),
    "trainer.use_distributed_sampler": Case(False),
    "trainer.val_check_interval": Case(1, {}, {"val": VAL}),
    "trainer.check_val_every_n_epoch": Case(1, {}, {"val": VAL}),
    "trainer.limit_val_batches": Case(1, {}, {"val": VAL}),
}


def save_rows(folder: Path) -> str:
    """A folder of splits."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(tiny.make_rows(4))
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def said(tmp_path, teacher_folder):
    """Train one step; return what is said about options without effect."""

    def train(chosen=None, folder=None, teacher="model", rows=None, val=None, **settings):
        models = {"model": tiny.make_llama(1), "folder": str(teacher_folder), None: None}
        module = DistillationModule(
            tiny.make_llama(0),
            models[teacher],
            tokenizer=tiny.make_tokenizer(),
            **settings.get("model", {}),
        )
        if chosen is not None:
            module.chosen_options = {"fit": chosen}
        parts = {"train": rows or tiny.make_rows(4), "val": val}
        if folder is not None:
            parts[folder] = save_rows(tmp_path / "rows")
        lengths = {"batch_size": 4, "max_prompt_length": 16, "max_response_length": 4}
        lengths |= {"val_rollouts": 0, "prompts_per_epoch": 4, "token_cache": None}
        data = RolloutDataModule(**parts, **{**lengths, **settings.get("data", {})})
        callbacks = [settings.get("method", KD)(), *settings.get("callbacks", [])]
        trainer = tiny.make_trainer(
            tmp_path / "run", callbacks, max_steps=1, **settings.get("trainer", {})
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, data, ckpt_path=settings.get("ckpt_path"))
        return [str(w.message) for w in caught if MARK in str(w.message)]

    return train


def test_every_rule_has_a_case():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("option", CASES)
def test_an_option_without_effect_is_named(option, said):
    case = CASES[option]
    (line,) = said({option: case.value}, **case.idle)
    assert line.startswith(f"--{option} {case.value} {MARK}: ")
    assert "\n" not in line


@pytest.mark.parametrize("option", [name for name, case in CASES.items() if case.acts])
def test_an_option_that_acts_is_not_named(option, said):
    case = CASES[option]
    assert case.acts is not None
    assert said({option: case.value}, **case.acts) == []


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ({"data.sampling.temperature": 0.5}, ["--data.sampling.temperature 0.5"]),
        ({"data.val_rollouts": 0, "data.subset": None}, []),
        ({"data.batch_size": 4, "method": "KD"}, []),
    ],
)
def test_settings_below_an_option_count_and_switched_off_ones_do_not(chosen, names, said):
    assert [line.partition(f" {MARK}")[0] for line in said(chosen)] == names


def test_arguments_from_python_count_where_they_are_no_defaults(said):
    idle = {
        "model": {"engine": OwnEngine(), "attn_implementation": "eager"},
        "data": {
            **{"sampling": Sampling(0.5), "prompts_per_rollout": 8, "val_rollouts": 3},
            **{"subset": "main", "train_split": "other"},
        },
        "trainer": {"gradient_clip_algorithm": "value", "use_distributed_sampler": False},
    }
    options = {line.split()[0] for line in said(**idle)}
    expected = {f"--{s}.{n}" for s, given in idle.items() for n in given}
    assert options == expected
    assert said() == []


def test_a_callback_that_generates_uses_the_engine(said):
    engine = {"model": {"engine": OwnEngine()}}
    (line,) = said(**engine)
    assert line.startswith("--model.engine OwnEngine has no effect")
    assert said(**engine, callbacks=[tiny.Recorder()]) == []  # the user's own may
    assert said(**engine, callbacks=[SampleTable(terminal=False)]) == []
    assert said(**engine, callbacks=[SampleTable(num_prompts=0)]) != []


def test_a_resumed_run_says_nothing(said, tmp_path):
    said(callbacks=[LastCheckpoint(every_n_steps=1)])
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert said({"data.sampling": "Greedy"}, ckpt_path=last) == []


def test_other_commands_name_what_is_typed_for_them(tmp_path):
    models = (tiny.make_llama(0), tiny.make_llama(1))
    module = DistillationModule(*models, tokenizer=tiny.make_tokenizer())
    data = RolloutDataModule(val=VAL, max_response_length=4, val_rollouts=0)
    trainer = tiny.make_trainer(tmp_path)
    module.chosen_options = {"fit": {"data.sampling.temperature": 0.5}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(module, data, verbose=False)
    assert not [w for w in caught if MARK in str(w.message)]
    module.chosen_options = {"validate": {"data.sampling.temperature": 0.5}}
    with pytest.warns(UserWarning, match=f"temperature 0.5 {MARK}: on-policy measures"):
        trainer.validate(module, data, verbose=False)


# ---------------------------------------------------------------- who chose an option

DEFAULTS = {"data.val_rollouts": 64, "data.subset": None}


def as_arguments(*configs: dict[str, Any] | str, typed: tuple[str, ...] = ()) -> list[str]:
    texts = [
        config if isinstance(config, str) else yaml.safe_dump(config, sort_keys=False)
        for config in configs
    ]
    return ["fit", *(word for text in texts for word in ("--config", text)), *typed]


def chosen(*configs: dict[str, Any] | str, typed: tuple[str, ...] = ()) -> dict[str, Any]:
    return chosen_options("fit", as_arguments(*configs, typed=typed), DEFAULTS)["fit"]


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_choose_nothing(name):
    assert chosen(packaged_configs()[name].read_text()) == {}


def test_own_configs_choose_what_is_no_default():
    own = {"data": {"val_rollouts": 64, "subset": "main", "sampling": {"temperature": 0.5}}}
    expected = {"data.subset": "main", "data.sampling.temperature": 0.5}
    assert chosen(own) == expected
    gsm8k = packaged_configs()["gsm8k"].read_text()
    assert chosen(own, gsm8k) == {"data.sampling.temperature": 0.5}  # its own subset counts
    typed = ("--data.val_rollouts", "64")
    assert chosen(own, typed=typed) == expected | {"data.val_rollouts": 64}


def test_a_checkpoints_config_chooses_nothing():
    own = {"data": {"subset": "main"}}
    typed = ("--ckpt_path", "last.ckpt", "--data.val_rollouts", "3")
    assert "data.subset" not in chosen(own, typed=typed)
    found = chosen_options("test", as_arguments(own, typed=typed), DEFAULTS)
    assert found["test"]["data.val_rollouts"] == 3
    assert chosen_options(None, as_arguments(own), DEFAULTS) == {}
