"""Frozen here: one file uses Lightning's private attributes.

* No other file reads or sets a private attribute of a Trainer, of its loops and connectors or of a
  module, or imports a private name; the strategy, which subclasses Lightning's, has two.
* What that file uses is there in this release: its functions give the values of a real run.
"""

from __future__ import annotations

import ast
from pathlib import Path

import lightning
import pytest
import tiny
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import nn

import okd_lightning
from okd_lightning.callbacks import SFT
from okd_lightning.errors import ConfigError
from okd_lightning.training import lightning_privates

PACKAGE = Path(okd_lightning.__file__).parent
OWNER = "training/lightning_privates.py"
OF_THE_STRATEGY = {
    ("sharding/strategy.py", "_StrategyRegistry"),  # the type of a hook's argument
    ("sharding/strategy.py", "_device"),  # as LightningModule.to sets it
}


def private_names() -> set[str]:
    """Private attributes of what a Trainer consists of, but for those of torch itself."""
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    loop = trainer.fit_loop
    parts = [trainer, loop, loop.epoch_loop, loop.epoch_loop.val_loop, trainer.strategy]
    parts += [value for name, value in vars(trainer).items() if name.endswith("_connector")]
    parts += [lightning.LightningModule(), lightning.LightningDataModule()]
    names = {name for part in parts for name in dir(part) if name.startswith("_")}
    names -= set(dir(nn.Module()))
    return {name for name in names if not name.startswith("__")}


def uses(tree: ast.AST, names: set[str]) -> set[str]:
    """Private attributes of others that a file names, and private imports from Lightning."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in names:
            owner = ast.unparse(node.value)
            if owner not in ("self", "cls") and not owner.startswith("super("):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            found |= {alias.name for alias in node.names if alias.name.startswith("_")}
    return found


def test_one_file_uses_private_attributes():
    names = private_names()
    assert {"_results", "_logger_connector", "_data_fetcher"} <= names
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in uses(ast.parse(path.read_text(encoding="utf-8")), names)
    }
    assert {use for use in found if use[0] != OWNER} == OF_THE_STRATEGY
    assert len([use for use in found if use[0] == OWNER]) >= 9


@pytest.mark.parametrize(
    "line",
    [
        "trainer._results.clear()",
        "self.trainer.fit_loop._data_fetcher = None",
        "from lightning.pytorch.loops import _FitLoop",
    ],
)
def test_a_use_elsewhere_is_found(line):
    assert uses(ast.parse(line), private_names())


class Seen(Callback):
    """Return values of the functions within a run."""

    def __init__(self) -> None:
        self.due, self.rows = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.due.append(lightning_privates.will_validate(trainer))
        self.rows.append(lightning_privates.unlogged_row(trainer))


def test_values_are_those_of_the_run(make_module, tmp_path):
    seen = Seen()
    settings = {"val_check_interval": 2, "log_every_n_steps": 2}
    val = tiny.make_rows(3, seed=1)
    tiny.fit(
        tmp_path, make_module(), [SFT()], tiny.make_rows(16), val=val, callbacks=[seen], **settings
    )
    assert seen.due == [False, True, False, True]
    assert [row is None for row in seen.rows] == [True, False, True, False]
    assert "train/loss" in seen.rows[1]
    assert [row["step"] for row in seen.rows if row is not None] == [1, 3]


def test_settings_of_a_trainer(tmp_path):
    trainer = tiny.make_trainer(
        tmp_path,
        use_distributed_sampler=False,
        val_check_interval="0:1:0:0",
        accumulate_grad_batches=2,
    )
    assert lightning_privates.uses_distributed_sampler(trainer) is False
    with pytest.raises(ConfigError, match="val_check_interval of 3600 seconds"):
        lightning_privates.begin_step(trainer)
    assert isinstance(lightning_privates.cluster_environment(trainer), LightningEnvironment)
    assert lightning_privates.started_ranks(trainer) is None
    lightning_privates.set_root_dir(trainer, tmp_path / "other")
    assert Path(trainer.default_root_dir) == tmp_path / "other"
