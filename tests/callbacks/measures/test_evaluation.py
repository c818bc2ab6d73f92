"""Validation, test and predict.

Frozen here: measures are the float64 means over all loss tokens of the whole set, whatever the
batch size; on-policy measures read the student's responses to a fixed set of prompts, the same at
every pass; measuring does not change the training; validate, fit and validate work in one process.
"""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import reference_loss as reference
import tiny
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning import durable_files
from okd_lightning.callbacks import GKD, KD, PredictionLog
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import OutputError

MEASURES = {
    "forward_kl": lambda p, q, y, s: reference.kl(q, p),
    "reverse_kl": lambda p, q, y, s: reference.kl(p, q),
    "jsd": lambda p, q, y, s: reference.jsd(p, q, 0.5),
    "agreement": lambda p, q, y, s: (p.argmax(-1) == q.argmax(-1)).double(),
    "cross_entropy": lambda p, q, y, s: -y,
    "entropy": lambda p, q, y, s: -(p.exp() * p).sum(-1),
}


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


class Batches(Callback):
    """Every batch of a validation."""

    def __init__(self):
        self.seen = {0: [], 1: []}

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen[dataloader_idx].append(batch)

    def rows(self, loader: int):
        found = tiny.Recorder()
        found.steps = [self.seen[loader]]
        return found.rows(0)


def data_of(rows, **settings):
    defaults = {"batch_size": 3, "max_response_length": 8, "seed": 7, "val_rollouts": 5}
    return RolloutDataModule(val=rows, **{**defaults, **settings})


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_measures_are_those_of_the_whole_set(batch_size, stage, tmp_path, make_module):
    module, batches, rows = make_module(), Batches(), tiny.make_rows(11)
    trainer = tiny.make_trainer(tmp_path, [batches])
    trainer.validate(module, data_of(rows, batch_size=batch_size), verbose=False)
    run = trainer.validate if stage == "val" else trainer.test
    found = run(module, data_of(rows, batch_size=batch_size), verbose=False)
    found = {name: value for metrics in found for name, value in metrics.items()}
    student, teacher = reference.double(module.student), reference.double(module.teacher)
    expected = {}
    for loader, prefix, left_out in ((0, "", "entropy"), (1, "on_policy_", "cross_entropy")):
        for name, values in MEASURES.items():
            if name != left_out:
                with torch.no_grad():
                    mean = reference.mean_loss(
                        student,
                        batches.rows(loader)[: 11 if loader == 0 else 5],
                        values,
                        19,
                        teacher,
                    )
                expected[f"{stage}/{prefix}{name}"] = float(mean)
    with torch.no_grad():
        given = batches.rows(0)[:11]
        of_teacher = reference.mean_loss(teacher, given, MEASURES["cross_entropy"], 19)
    expected[f"{stage}/teacher_cross_entropy"] = float(of_teacher)
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(batches.rows(1)) in (5, 10)


def test_on_policy_measures_are_reproducible_and_the_students_own(tmp_path, make_module):
    def validate(**settings):
        module, batches = make_module(), Batches()
        trainer = tiny.make_trainer(tmp_path, [batches])
        torch.manual_seed(settings.pop("global_seed", 0))
        trainer.validate(module, data_of(tiny.make_rows(11), **settings), verbose=False)
        return sorted(batches.rows(1))

    first = validate()
    assert validate(global_seed=5) == first
    assert validate(batch_size=1) == first
    assert validate(seed=8) != first
    assert all(source == 1 for _, _, source in first)


def test_validate_fit_validate_with_accumulation(tmp_path, make_module):
    """The default Trainer: inference mode is on in validation."""
    module, train, val = make_module(), tiny.make_rows(16), tiny.make_rows(6, seed=1)
    data = RolloutDataModule(train, val, batch_size=2, max_response_length=8, val_rollouts=3)
    trainer = tiny.make_trainer(
        tmp_path, [KD()], accumulate_grad_batches=2, max_epochs=15, val_check_interval=4
    )
    before = {
        k: v for part in trainer.validate(module, data, verbose=False) for k, v in part.items()
    }
    trainer.fit(module, data)
    after = {
        k: v for part in trainer.validate(module, data, verbose=False) for k, v in part.items()
    }
    assert after.keys() == before.keys()
    assert after["val/forward_kl"] < before["val/forward_kl"]
    assert after["val/on_policy_reverse_kl"] != before["val/on_policy_reverse_kl"]


def test_validation_does_not_change_the_training(tmp_path, make_module, dropout_folder):
    def run(**settings):
        torch.manual_seed(0)
        module = make_module(student=str(dropout_folder))
        recorder = tiny.fit(tmp_path, module, [GKD()], tiny.make_rows(12), **settings)
        return recorder.losses, tiny.weights(module)

    losses, weights = run()
    validated = run(val=tiny.make_rows(5), data={"val_rollouts": 3}, val_check_interval=1)
    train_only = [
        {n: v for n, v in step.items() if n.startswith("train/")} for step in validated[0]
    ]
    assert train_only == losses
    assert tiny.distance(validated[1], weights) == 0


def test_a_set_of_prompts_alone_is_measured_on_the_students_words(tmp_path, make_module):
    rows = [{"prompt": row["prompt"]} for row in tiny.make_rows(4)]
    trainer = tiny.make_trainer(tmp_path)
    (found,) = trainer.validate(make_module(), data_of(rows), verbose=False)
    assert found
    assert all(name.startswith("val/on_policy_") for name in found)


def test_predictions_of_before_stay_where_new_ones_cannot_be_written(
    tmp_path, make_module, monkeypatch
):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable_files.os, "replace", fail)
    (tmp_path / "predictions.jsonl").write_text("before")
    data = RolloutDataModule(predict=tiny.make_rows(2), max_response_length=2)
    trainer = tiny.make_trainer(tmp_path, [PredictionLog()])
    with pytest.raises(OutputError, match=r"predictions\.jsonl cannot be written \(No space"):
        trainer.predict(make_module(), data)
    assert [p.name for p in tmp_path.iterdir()] == ["predictions.jsonl"]
    assert (tmp_path / "predictions.jsonl").read_text() == "before"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_predictions(batch_size, tmp_path, make_module):
    rows = tiny.make_rows(7)
    data = RolloutDataModule(predict=rows, batch_size=batch_size, max_response_length=5, seed=7)
    trainer = tiny.make_trainer(tmp_path / "new", [PredictionLog()])
    trainer.predict(make_module(), data)
    lines = (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == list(range(7))
    assert [record["prompt"] for record in records] == [row["prompt"] for row in rows]
    for record in records:
        ended = record["stop_reason"] == "eos"
        assert record["num_tokens"] <= 5
        assert ended or record["num_tokens"] == 5
        assert len(record["response"]) <= record["num_tokens"] - ended
        plain = re.sub("<(bos|eos|pad)>", "", record["text"])
        assert plain == record["prompt"] + record["response"]
        assert record["text"].endswith("<eos>") == ended
    assert {record["stop_reason"] for record in records} == {"eos", "length"}
