"""``DistillationModule.load_from_checkpoint(path)`` without further arguments.

* Models that were named by a folder are built again, from any working directory: plain students,
  adapters, an online module on the teacher, a moving-average teacher; all weights are those of the
  run, and the module trains on.
* Of models in memory the student is built from its config; the teacher, which no checkpoint holds,
  is left out with a line that says so, and can be given.
* Where the frozen part of a student is in no file, the error names what to give, and that works.
* Arguments by name take the place of the stored ones.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig

from okd_lightning.callbacks import KD, OKD, SFT
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.teachers import AveragedSelf, FrozenSelf
from okd_lightning.training.module import DistillationModule


def saved(tmp_path: Path, module: DistillationModule, method, name: str = "some.ckpt") -> Path:
    """The checkpoint of a run of two steps."""
    trainer = tiny.make_trainer(tmp_path, [method], max_steps=2)
    data = tiny.RolloutDataModule(tiny.make_rows(8), batch_size=4, max_response_length=8)
    trainer.fit(module, data)
    path = tmp_path / name
    trainer.save_checkpoint(path)
    return path


def train_on(tmp_path: Path, module: DistillationModule, method) -> None:
    before = tiny.weights(module)
    saved(tmp_path, module, method, "later.ckpt")
    assert tiny.distance(tiny.weights(module), before) > 0


def check_same(found: torch.nn.Module | None, wanted: torch.nn.Module | None) -> None:
    assert found is not None
    assert wanted is not None
    found_weights, weights = found.state_dict(), wanted.state_dict()
    assert found_weights.keys() == weights.keys()
    assert all(torch.equal(found_weights[name], value) for name, value in weights.items())


def beside_references() -> KD:
    """A student that starts as its own teacher has nothing to learn from that one alone."""
    return KD(cross_entropy_weight=0.5)


FOLDERS = {
    "plain": ({}, KD),
    "adapter": ({"student_adapter": LoraConfig(r=2)}, KD),
    "online module": ({}, OKD),
    "online module beside an adapter": ({"student_adapter": LoraConfig(r=2)}, OKD),
    "moving average": ({"teacher": AveragedSelf()}, beside_references),
    "frozen start": ({"teacher": FrozenSelf()}, beside_references),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_found_again_from_anywhere(
    case, tmp_path, monkeypatch, student_folder, teacher_folder
):
    settings, method = FOLDERS[case]
    models = {
        "student": os.path.relpath(student_folder),
        "teacher": os.path.relpath(teacher_folder),
    }
    module = DistillationModule(learning_rate=1e-2, **{**models, **settings})
    path = saved(tmp_path, module, method())
    monkeypatch.chdir(tmp_path)
    found = DistillationModule.load_from_checkpoint(path.name)
    check_same(found.student, module.student)
    check_same(found.teacher, module.teacher)
    assert found.learning_rate == 1e-2
    assert found.eos_ids == module.eos_ids
    train_on(tmp_path, found, method())


def test_arguments_take_the_place_of_the_stored_ones(tmp_path, make_module, student_folder):
    path = saved(tmp_path, make_module(), KD())
    found = DistillationModule.load_from_checkpoint(
        path, learning_rate=0.5, teacher=str(student_folder)
    )
    assert found.learning_rate == 0.5
    check_same(found.teacher, tiny.make_llama(1))


@pytest.mark.parametrize("method", [KD, OKD])
def test_a_teacher_in_memory_is_left_out_or_given(method, tmp_path, caplog):
    def teacher():
        return tiny.make_llama(2, tiny.TEACHER_ROWS)

    module = DistillationModule(
        tiny.make_llama(1), teacher(), tokenizer=tiny.make_tokenizer(), learning_rate=1e-2
    )
    path = saved(tmp_path, module, method())
    with caplog.at_level(logging.INFO):
        found = DistillationModule.load_from_checkpoint(path)
    assert "teacher was a model in memory" in caplog.text
    check_same(found.student, module.student)
    assert found.teacher is None
    assert found.tokenizer.get_vocab() == module.tokenizer.get_vocab()
    train_on(tmp_path, found, SFT())
    whole = DistillationModule.load_from_checkpoint(path, teacher=teacher())
    check_same(whole.teacher, module.teacher)
    train_on(tmp_path, whole, method())


def test_an_adapter_on_a_student_in_memory_names_what_to_give(tmp_path, teacher_folder):
    module = DistillationModule(
        tiny.make_llama(1),
        str(teacher_folder),
        student_adapter=LoraConfig(r=2),
        learning_rate=1e-2,
    )
    path = saved(tmp_path, module, KD())
    with pytest.raises(CheckpointError, match=r"load_from_checkpoint\(path, student=MODEL"):
        DistillationModule.load_from_checkpoint(path)
    found = DistillationModule.load_from_checkpoint(path, student=tiny.make_llama(1))
    check_same(found.student, module.student)
    check_same(found.teacher, module.teacher)


def test_what_lightning_takes_next_to_is_refused(tmp_path):
    for settings in ({"hparams_file": "hparams.yaml"}, {"weights_only": False}):
        with pytest.raises(ConfigError, match="leave hparams_file and weights_only=False out"):
            DistillationModule.load_from_checkpoint(tmp_path / "x.ckpt", **settings)
