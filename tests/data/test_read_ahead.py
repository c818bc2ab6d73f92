"""Semantics frozen here: rows are read before any weights, in every stage.

* A broken row is the error, whatever is wrong with the weights, which are not looked for.
* What the rows' lengths do not fit is told before models are loaded too.
"""

from __future__ import annotations

import pytest
import tiny

from okd_lightning import DistillationModule, RolloutDataModule
from okd_lightning.callbacks import GKD, KD
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.training import pair

GOOD = [{"prompt": "ab", "response": "c"}] * 4
BROKEN = [*GOOD, {"prompt": 3, "response": "c"}]
STAGES = ("fit", "validate", "test", "predict")


@pytest.fixture(scope="module")
def hollow(tmp_path_factory):
    """Folders of a student and a teacher with broken weight files."""
    root = tmp_path_factory.mktemp("hollow")
    for seed, name in enumerate(("student", "teacher")):
        tiny.make_llama(seed).save_pretrained(root / name)
        tiny.make_tokenizer().save_pretrained(root / name)
        (root / name / "model.safetensors").write_bytes(b"no weights")
    return root


def run(stage, hollow, tmp_path, rows, method=KD, **data):
    module = DistillationModule(str(hollow / "student"), str(hollow / "teacher"))
    parts = {"fit": ("train",), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
    given = dict.fromkeys(parts[stage], rows)
    trainer = tiny.make_trainer(tmp_path, [method()])
    getattr(trainer, stage)(module, RolloutDataModule(**given, **data))


@pytest.mark.parametrize("stage", STAGES)
def test_a_broken_row_is_reported_before_weights_are_read(stage, hollow, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pair, "load_checked", lambda *a, **k: pytest.fail("a model is loaded first")
    )
    with pytest.raises(DataError, match="row 5: the prompt"):
        run(stage, hollow, tmp_path, BROKEN)


def test_broken_validation_rows_are_reported_before_training(hollow, tmp_path):
    with pytest.raises(DataError, match="row 5: the prompt"):
        run("fit", hollow, tmp_path, GOOD, val=BROKEN, max_response_length=8, max_prompt_length=8)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_too_long_is_reported_before_weights_are_read(stage, hollow, tmp_path):
    with pytest.raises(ConfigError, match="the context of the student is 64"):
        run(stage, hollow, tmp_path, GOOD, max_response_length=64)


def test_prompts_alone_are_enough_for_methods_that_generate(hollow, tmp_path):
    rows = [{"prompt": "ab"}]
    with pytest.raises(DataError, match="learns from dataset responses"):
        run("fit", hollow, tmp_path, rows, method=KD)
    with pytest.raises(Exception, match=r"safetensors|weights") as error:
        run(
            "fit",
            hollow,
            tmp_path,
            rows,
            method=lambda: GKD(on_policy_fraction=1.0),
            max_response_length=8,
        )
    assert not isinstance(error.value, DataError)
