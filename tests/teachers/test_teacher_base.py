"""A third, frozen model with which the teacher is compared.

Frozen here: it is checked where it is named (tokenizer, rows, length, one a run, no online module,
a teacher in memory), it moves no weight of its own, averaged copies of the module share it, the run
forgets it when it ends; two ranks, replicated or in shards that are read from disk, train as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from parallel_runs import run, spawn
from torch import Tensor

from okd_lightning.callbacks import OKD, DistillationCallback
from okd_lightning.errors import ConfigError, VocabularyError
from okd_lightning.losses import Measured, Quantity, Tile
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.teachers import CachedTeacher
from okd_lightning.training.config_paths import relocate


@dataclass(frozen=True)
class ShiftOfBase(Quantity):
    """-Σ p log(q/q₀): the student is drawn to where the teacher has risen above its base."""

    needs_teacher = True
    needs_base_teacher = True

    def measure(self, tile: Tile) -> Tensor:
        shift = (tile.teacher_logprobs - tile.base_logprobs).nan_to_num(nan=0.0)
        return -(tile.student_logprobs.exp() * shift).sum(-1)


class Shifted(DistillationCallback):
    sources = ("dataset",)
    on_policy_fraction = 0.0
    quantities = (ShiftOfBase(),)

    def __init__(self, base: str, name: str | None = None) -> None:
        super().__init__(name=name)
        self.base = base

    def prepare(self, trainer, module, stage):
        module.add_teacher_base(self.base, "--method.base")

    def loss(self, measured: Measured) -> LossOutput:
        return loss_output(measured[self.quantities[0]], measured.mask(self.sources))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> Path:
    root = tmp_path_factory.mktemp("base")
    models = {
        "student": tiny.make_llama(1),
        "teacher": tiny.make_llama(2),
        "base": tiny.make_llama(7),
        "few rows": tiny.make_llama(3, rows=tiny.NUM_IDS - 1),
        "short": tiny.make_llama(4, max_position_embeddings=4),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    tiny.make_llama(5).save_pretrained(root / "foreign")
    tiny.make_tokenizer("zyxwvutsrq").save_pretrained(root / "foreign")
    return root


REFUSED = {
    "foreign": (VocabularyError, "tokenizer"),
    "few rows": (VocabularyError, "--method.base has rows for ids up to"),
    "short": (
        ConfigError,
        "the context of the teacher's base is 4; lower --data.max_response_length",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_that_does_not_fit_is_refused(name, tmp_path, make_module, folders):
    kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        tiny.fit(tmp_path, make_module(), [Shifted(str(folders / name))], tiny.make_rows(8))


def test_one_base_a_run(tmp_path, make_module, folders):
    two = [Shifted(str(folders / "base")), Shifted(str(folders / "short"), "other")]
    with pytest.raises(ConfigError, match="compare the teacher with one model"):
        tiny.fit(tmp_path / "a", make_module(), two, tiny.make_rows(8))
    for both in ([Shifted(str(folders / "base")), OKD()], [OKD(), Shifted(str(folders / "base"))]):
        with pytest.raises(ConfigError, match="puts an online module on the teacher"):
            tiny.fit(tmp_path / "b", make_module(), both, tiny.make_rows(8))


def test_a_teacher_that_is_not_in_memory_is_refused(tmp_path, make_module, folders):
    module = make_module(kind=lambda teacher: CachedTeacher(teacher, str(tmp_path / "cache")))
    message = (
        r"no teacher in memory; give --model\.teacher a folder or hub id in place of CachedTeacher"
    )
    with pytest.raises(ConfigError, match=message):
        tiny.fit(tmp_path, module, [Shifted(str(folders / "base"))], tiny.make_rows(8))


class Seen(Callback):
    def on_train_start(self, trainer, pl_module):
        self.base = pl_module.pair.teacher_base.model
        self.before = {n: w.clone() for n, w in self.base.state_dict().items()}
        self.listed = [n for n, _ in pl_module.named_parameters()]


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback:UserWarning")
def test_it_is_frozen_and_forgotten(tmp_path, make_module, folders):
    """This holds also where a callback averages copies of the module."""
    module, seen = make_module(), Seen()
    averaging = EMAWeightAveraging(decay=0.5)
    methods = [Shifted(str(folders / "base"))]
    tiny.fit(tmp_path, module, methods, tiny.make_rows(8), callbacks=[seen, averaging])
    assert module.pair.teacher_base is None
    assert not any(weight.requires_grad for weight in seen.base.parameters())
    after = seen.base.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in seen.before.items())
    assert all(name.startswith(("student.", "teacher.")) for name in seen.listed)


def test_its_path_is_one_from_where_the_run_was_started(tmp_path, monkeypatch):
    class Named:
        def __init__(self, teacher_base: str) -> None: ...

    there, here = tmp_path / "there", tmp_path / "here"
    (there / "base").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    config = {
        name: {"class_path": "Named", "init_args": {"teacher_base": given}}
        for name, given in (("method", "base"), ("other", "org/base"))
    }
    relocate(config, str(there), "last.ckpt", lambda path: Named)
    assert config["method"]["init_args"]["teacher_base"] == str(there / "base")
    assert config["other"]["init_args"]["teacher_base"] == "org/base"


STRATEGIES = {"ddp": lambda: "ddp", "by shard": lambda: FSDP2Strategy(loading="by_shard")}
FEW = {"settings": {"max_steps": 3}, "num": 12}


def of_one_rank(rank: int, root: Path) -> None:
    """Body of a spawned process."""
    for name, strategy in STRATEGIES.items():
        found = run(root, strategy(), lambda: [Shifted(str(root / "base"))], **FEW)
        torch.save(found, root / f"{name}{rank}.pt")


def test_two_ranks_train_as_one(folders):
    alone = run(folders, None, lambda: [Shifted(str(folders / "base"))], **FEW)
    spawn(of_one_rank, folders)
    for name in STRATEGIES:
        for rank in range(2):
            found = torch.load(folders / f"{name}{rank}.pt", weights_only=False)
            assert found["losses"] == [pytest.approx(step, rel=1e-6) for step in alone["losses"]]
            for weight, truth in alone["weights"].items():
                torch.testing.assert_close(found["weights"][weight], truth, rtol=1e-9, atol=1e-12)
