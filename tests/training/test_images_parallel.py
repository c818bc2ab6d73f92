"""Rows with images on two gloo processes: frozen semantics.

* KD and GKD have the weights of the single process at the same global batch, also where a rank's
  rows have no image and its projector therefore no gradient of its own.
* OKD trains its online module on the teacher's language model.
* FSDP2, in shards: the same, where every rank has images; else one line that names the remedy.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
import vision
from parallel_runs import spawn

from okd_lightning.callbacks import GKD, KD, OKD
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.sharding import FSDP2Strategy, whole
from okd_lightning.training.module import DistillationModule

METHODS = {
    "KD": lambda: [KD()],
    "GKD": lambda: [GKD(0.5, on_policy_fraction=0.5)],
    "OKD": lambda: [OKD(on_policy_fraction=0.5)],
}

SHARDED = ("GKD", "OKD")


def run(
    root: Path, devices: int, name: str, strategy: str = "ddp", rows: str = "rows.jsonl"
) -> dict:
    torch.manual_seed(3)
    module = DistillationModule(
        str(root / "student"),
        str(root / "teacher"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
        dtype="float64",
    )
    recorder = tiny.Recorder()
    trainer = tiny.make_trainer(
        root / f"{name}{devices}{strategy}",
        [*METHODS[name](), recorder],
        devices=devices,
        strategy="auto" if devices == 1 else FSDP2Strategy() if strategy == "fsdp2" else strategy,
        max_steps=3,
    )
    limits = {"max_prompt_length": 250, "max_response_length": 5, "val_rollouts": 2}
    data = str(root / rows)
    loaders = RolloutDataModule(data, data, batch_size=4 // devices, seed=7, **limits)
    trainer.fit(module, loaders)
    return {
        "weights": {name: whole(own) for name, own in module.student.named_parameters()},
        "losses": recorder.losses,
        "measures": {k: float(v) for k, v in trainer.callback_metrics.items() if k[:4] == "val/"},
        "online": [n for n, _ in module.named_parameters() if "lora_" in n],
    }


def of_one_rank(rank: int, root: Path) -> None:
    found = {name: run(root, 2, name) for name in METHODS}
    seen = "seen.jsonl"
    found |= {f"{name}, shards": run(root, 2, name, "fsdp2", seen) for name in SHARDED}
    try:
        run(root, 2, "KD", "fsdp2")
    except ConfigError as error:
        found["refusal"] = str(error)
    torch.save(found, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    vision.save("qwen2_vl", root / "student", 1)
    vision.save("qwen2_vl", root / "teacher", 2)
    rows = vision.image_rows(root, 12)
    rows.sort(key=lambda row: len(row["messages"][0]["content"]))
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    seen = [row for row in rows if len(row["messages"][0]["content"]) > 1]
    (root / "seen.jsonl").write_text("\n".join(map(json.dumps, seen)))
    spawn(of_one_rank, root)
    ranks = [torch.load(root / f"rank{rank}.pt") for rank in (0, 1)]
    alone = {name: run(root, 1, name) for name in METHODS}
    alone |= {f"{n}, shards": run(root, 1, n, "fsdp2", "seen.jsonl") for n in SHARDED}
    return ranks, alone


@pytest.mark.parametrize("name", [*METHODS, *(f"{name}, shards" for name in SHARDED)])
def test_two_ranks_have_the_weights_of_one(name, runs):
    (first, second), alone = runs
    for key, expected in alone[name]["weights"].items():
        found = first[name]["weights"][key]
        assert torch.equal(found, second[name]["weights"][key]), key
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)
    for key, value in alone[name]["measures"].items():
        assert first[name]["measures"][key] == pytest.approx(value, abs=1e-6), key
    assert alone[name]["measures"]


def test_online_module_is_on_the_language_model(runs):
    names = runs[1]["OKD"]["online"]
    assert names
    assert all("language_model" in name for name in names)


def test_shards_refuse_a_rank_without_images(runs):
    for rank in runs[0]:
        assert "every micro-batch of every rank needs an image, or none" in rank["refusal"]
        assert "use --trainer.strategy ddp" in rank["refusal"]
