"""Strategies that train in processes of their own: ddp_fork, ddp_notebook and ddp_spawn.

* The student that was given is trained after the run, in the process that asked for it, as its
  last checkpoint has it; an online module's weights are kept, and used where a method asks for it.
* Such a module validates in this process, and saves no checkpoint of a run that ended elsewhere.
* Weights that processes share are taken into memory of their own before they are trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch
from forked import type_command

from okd_lightning.callbacks import KD, OKD, LastCheckpoint
from okd_lightning.errors import CheckpointError
from okd_lightning.training.module import DistillationModule


def data() -> tiny.RolloutDataModule:
    rows, val = tiny.make_rows(16), tiny.make_rows(4, seed=5)
    return tiny.RolloutDataModule(
        rows, val, batch_size=4, max_response_length=8, val_rollouts=0, token_cache=None
    )


@pytest.mark.skipif(sys.platform != "linux", reason="fork beside threads is safe on Linux alone")
@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA cannot be used in forked processes")
def test_what_was_given_is_trained_in_forked_processes(tmp_path):
    """Run in a process without a process group: a fork of one with gloo's thread would hang."""
    done = type_command([], tmp_path, program=train_in_forked_processes)
    assert done.returncode == 0, done.stderr[-2000:]


def train_in_forked_processes() -> None:
    root = Path.cwd()
    student, teacher = tiny.make_llama(1), tiny.make_llama(2, tiny.TEACHER_ROWS)
    start = {name: value.clone() for name, value in student.state_dict().items()}
    module = DistillationModule(
        student, teacher, tokenizer=tiny.make_tokenizer(), learning_rate=1e-2
    )
    trainer = tiny.make_trainer(
        root,
        [OKD(), LastCheckpoint(every_n_steps=1)],
        devices=2,
        strategy="ddp_fork",
        max_steps=2,
    )
    trainer.fit(module, data())
    last = root / "checkpoints" / "last.ckpt"
    saved = torch.load(last, weights_only=True)["state_dict"]
    assert module.student is student
    assert all(torch.equal(v, saved[f"student.{n}"]) for n, v in student.named_parameters())
    assert all(not torch.equal(v, start[n]) for n, v in student.named_parameters())
    with pytest.raises(CheckpointError, match="LastCheckpoint or ModelCheckpoint"):
        trainer.save_checkpoint(root / "after.ckpt")

    (found,) = tiny.make_trainer(root, [OKD()]).validate(module, data(), verbose=False)
    assert found["val/adapted_teacher_shift"] > 1e-3
    online = {n: p for n, p in module.teacher.named_parameters() if "lora_" in n}
    assert len(online) == sum(name.startswith("teacher.") for name in saved) > 0
    assert all(torch.equal(value, saved[f"teacher.{name}"]) for name, value in online.items())


def test_shared_weights_are_trained_in_memory_of_their_own(tmp_path):
    """ddp_spawn passes a model in shared memory to its processes."""
    student = tiny.make_llama(1).share_memory()
    before = [p.detach().clone() for p in student.parameters()]
    others = [p.detach() for p in student.parameters()]  # the memory as another process sees it
    module = DistillationModule(
        student, tiny.make_llama(2), tokenizer=tiny.make_tokenizer(), learning_rate=1e-2
    )
    tiny.make_trainer(tmp_path, [KD()], max_steps=1).fit(module, data())
    assert not any(p.is_shared() for p in student.parameters())
    assert all(not torch.equal(p, b) for p, b in zip(student.parameters(), before, strict=True))
    assert all(torch.equal(o, b) for o, b in zip(others, before, strict=True))
