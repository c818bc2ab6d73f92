"""Two gloo processes on one cache, in one spawn.

Frozen here: each rank writes its share of the files, neither reads before all are there, and both
train as one process does that reads what they wrote; a second run loads no teacher on either; a
folder that the ranks do not share is refused on all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from parallel_runs import spawn

from okd_lightning.callbacks import KD
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import CacheError
from okd_lightning.teachers import CachedTeacher
from okd_lightning.teachers import loaded as loaded_module
from okd_lightning.teachers.store import Entry
from okd_lightning.training import pair as pair_module
from okd_lightning.training.module import DistillationModule


def run(root: Path, devices: int, cache: Path) -> dict:
    """Train two epochs of 4 rows per step; return written and loaded files, losses and weights."""
    torch.manual_seed(3)
    module = DistillationModule(
        str(root / "student"),
        CachedTeacher(str(root / "teacher"), str(cache), 5),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        dtype="float64",
    )
    written: list[str] = []
    loaded: list[str] = []
    put, load = Entry.write_part, loaded_module.load_checked

    def write_part(self: Entry, number: int, records) -> None:
        written.append(f"{self.folder.name}/{number}")
        put(self, number, records)

    def load_checked(source, option, *args, **kwargs):
        loaded.append(option)
        return load(source, option, *args, **kwargs)

    recorder = tiny.Recorder()
    trainer = tiny.make_trainer(
        root / f"run{devices}",
        [KD(), recorder],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
    )
    data = RolloutDataModule(
        tiny.make_rows(22),
        tiny.make_rows(9, seed=2),
        batch_size=4 // devices,
        max_response_length=6,
        seed=7,
        val_rollouts=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedTeacher, "part_positions", 12)
        patch.setattr(Entry, "write_part", write_part)
        for place in (pair_module, loaded_module):
            patch.setattr(place, "load_checked", load_checked)
        trainer.fit(module, data)
    logged = trainer.callback_metrics
    return {
        "written": written,
        "loaded": loaded,
        "weights": tiny.weights(module),
        "losses": recorder.losses,
        "measures": {n: float(v) for n, v in logged.items() if n.startswith("val/")},
    }


def of_one_rank(rank: int, root: Path) -> None:
    """Body of a spawned process."""
    results: dict[str, dict | str] = {
        name: run(root, 2, root / "cache") for name in ("first", "second")
    }
    try:
        run(root, 2, root / f"cache-of-{rank}")
    except CacheError as error:
        results["apart"] = str(error)
    torch.save(results, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("cached")
    for name, model in (
        ("student", tiny.make_llama(1)),
        ("teacher", tiny.make_llama(2, tiny.TEACHER_ROWS)),
    ):
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    spawn(of_one_rank, root)
    found = [torch.load(root / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    return root, found


def test_each_writes_its_share_once(ranks):
    root, found = ranks
    shares = [set(rank["first"]["written"]) for rank in found]
    assert all(len(share) >= 4 for share in shares)
    assert not shares[0] & shares[1]
    on_disk = {
        f"{path.parent.name}/{int(path.stem[-5:])}" for path in (root / "cache").glob("*/part*")
    }
    assert shares[0] | shares[1] == on_disk
    for rank in found:
        assert rank["first"]["loaded"] == ["--model.student", "--model.teacher"]
        assert rank["second"]["loaded"] == ["--model.student"]
        assert rank["second"]["written"] == []


def test_both_train_as_one_does(ranks):
    root, found = ranks
    alone = run(root, 1, root / "cache")
    assert alone["loaded"] == ["--model.student"]
    assert len(alone["losses"]) == 12
    for rank in found:
        for name in ("first", "second"):
            assert tiny.distance(rank[name]["weights"], alone["weights"]) < 1e-9
            assert rank[name]["measures"] == pytest.approx(alone["measures"], rel=1e-5)
            for losses, expected in zip(rank[name]["losses"], alone["losses"], strict=True):
                assert losses == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_folder_that_is_not_shared_is_refused(ranks):
    _, found = ranks
    for rank in found:
        assert "is not one folder for all processes of this run" in rank["apart"]
