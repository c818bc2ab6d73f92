"""Frozen here: a run that is stopped in the middle says why in one line, and keeps what it has.

A loss that is not finite stops before the step; an interrupt, memory or a disk that is full leave a
checkpoint to resume.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_workbench import QUIET, Assets, Result, read_metrics

Type = Callable[..., Result]
RUN = Path("run")
KD = ["--method", "KD"]


def test_a_loss_that_is_not_finite_stops_before_the_step(
    fit: Type, okd: Type, assets: Assets
) -> None:
    """Files written so far are kept, because the run failed after it began."""
    base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
    result = okd("fit", base, KD, "--model.learning_rate", "1e30")
    assert result.status == 1
    assert "gradient norm is nan at step" in result.err
    assert "weights are untouched" in result.err
    assert read_metrics(RUN / "metrics.csv")


BREAKER = """
from lightning.pytorch.callbacks import Callback
import torch


class Breaker(Callback):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 4:
            if self.kind == "interrupt":
                raise KeyboardInterrupt
            if self.kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\\nmore")
            raise OSError(28, "No space left on device", "run/checkpoints/last.ckpt")
"""


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("interrupt", 130, ["interrupted", "--ckpt_path run/checkpoints/last.ckpt"]),
        ("memory", 1, ["out of memory", "--data.batch_size", "--model.gradient_checkpointing"]),
        ("disk", 1, ["No space left on device", "run/checkpoints/last.ckpt"]),
    ],
)
def test_what_stops_a_run_from_outside(
    okd: Type, assets: Assets, here: Path, kind: str, status: int, words: list[str]
) -> None:
    """The run ends with one line, and can be resumed from there."""
    (here / "cli_breaker.py").write_text(BREAKER)
    base = [*assets.models, *assets.data, *QUIET, "--trainer.default_root_dir", "run"]
    result = okd(
        *("fit", base, KD, "--trainer.val_check_interval", "2"),
        *("--trainer.callbacks+=cli_breaker.Breaker", "--trainer.callbacks.kind", kind),
    )
    assert result.status == status
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err + result.log
    assert torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
