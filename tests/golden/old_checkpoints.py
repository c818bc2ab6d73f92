"""Checkpoints that were written once and stay: runs of a later version go on from them.

Each was written in the middle of an epoch, with rollouts that had been generated and not yet
trained on. ``write`` makes those that are not there; what is there is never written again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiny
import torch
from golden.runs import Golden, digest_of
from parallel_runs import Killed, Killer, spawn
from peft import LoraConfig

from okd_lightning.callbacks import GKD, OKD, DistillationCallback, LastCheckpoint
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.training.module import DistillationModule

CHECKPOINTS = Path(__file__).parent / "checkpoints"
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
WRITTEN_BEHIND, STEPS = 3, 7


def _gkd() -> list[DistillationCallback]:
    return [GKD(0.5, on_policy_fraction=0.5)]


def _okd() -> list[DistillationCallback]:
    module = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return [OKD(online_module=module, learning_rate=1e-2, on_policy_fraction=0.5)]


METHODS: dict[str, Callable[[], Sequence[DistillationCallback]]] = {
    "gkd.ckpt": _gkd,
    "okd.ckpt": _okd,
    "okd_fsdp2.ckpt": _okd,
}
"""By the name of the file or folder."""


def train(root: Path, name: str, ckpt_path: Path | None = None, **settings: Any) -> Golden:
    """The run of a checkpoint, from its beginning or from ``ckpt_path`` on.

    Returns:
        The losses of the steps that were trained, and the weights after the last one.
    """
    torch.manual_seed(3)
    teacher = tiny.make_llama(2, tiny.TEACHER_ROWS, **SMALL)
    module = DistillationModule(
        tiny.make_llama(1, **SMALL),
        teacher,
        tokenizer=tiny.make_tokenizer(),
        learning_rate=1e-2,
        schedule="cosine",
    )
    data = {"prompts_per_rollout": 8, **settings.pop("data", {})}
    options = {"max_epochs": -1, "max_steps": STEPS, "gradient_clip_val": 1.0, **settings}
    record = tiny.fit(
        root,
        module,
        METHODS[name](),
        tiny.make_rows(26),
        data=data,
        ckpt_path=ckpt_path,
        **options,
    )
    return Golden(tuple(step["train/loss"] for step in record.losses), digest_of(module))


def _killed(root: Path, name: str, **settings: Any) -> None:
    callbacks = [LastCheckpoint(every_n_steps=WRITTEN_BEHIND), Killer(WRITTEN_BEHIND)]
    try:
        train(root, name, callbacks=callbacks, **settings)
    except Killed:
        return
    raise AssertionError("the run was not killed")


def _of_one_rank(rank: int, root: Path) -> None:
    strategy = FSDP2Strategy(checkpoint_form="sharded")
    _killed(root, "okd_fsdp2.ckpt", devices=2, strategy=strategy, data={"batch_size": 2})


def write(root: Path) -> None:
    """Write those that are not there."""
    CHECKPOINTS.mkdir(exist_ok=True)
    for name in METHODS:
        if (CHECKPOINTS / name).exists():
            continue
        run = root / name
        if "fsdp2" in name:
            spawn(_of_one_rank, run)
        else:
            _killed(run, name)
        last = run / "checkpoints" / "last.ckpt"
        (shutil.copytree if last.is_dir() else shutil.copy)(last, CHECKPOINTS / name)
