"""Monitors of two ranks, with whole models or in shards, show the same as on one process."""

from __future__ import annotations

import json
from pathlib import Path

import tiny
import torch
from parallel_runs import run, spawn

from okd_lightning.callbacks import GKD, SampleTable
from okd_lightning.training.safeguards.health_warnings import HealthWarnings

STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp2"}


def methods() -> list:
    return [GKD(on_policy_fraction=1.0)]


def watched(root: Path, strategy: str | None) -> dict:
    health = HealthWarnings(every_n_steps=2, truncated_share=None)
    callbacks = [SampleTable(every_n_steps=3, num_prompts=3), health]
    found = run(root, strategy, methods, accumulate=2, callbacks=callbacks)
    return {"course": health.state_dict(), "measures": found["measures"]}


def read(root: Path, devices: int) -> list[dict]:
    path = root / f"run{devices}" / "rollouts.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return records


def one_rank(rank: int, root: Path) -> None:
    import okd_lightning.sharding  # noqa: F401  (registers the strategy)

    for name, strategy in STRATEGIES.items():
        found = watched(root, strategy)
        torch.save(found, root / f"{name}{rank}.pt")
        torch.distributed.barrier()
        if rank == 0:
            (root / f"{name}.json").write_text(json.dumps(read(root, 2)))
        torch.distributed.barrier()


def close(one: dict, other: dict) -> bool:
    return all(abs(one[name] - other[name]) < 1e-3 * (1 + abs(one[name])) for name in one)


def test_two_ranks_show_and_judge_what_one_does(tmp_path, tiny_tokenizer):
    for name, model in (
        ("student", tiny.make_llama(1)),
        ("teacher", tiny.make_llama(2, tiny.TEACHER_ROWS)),
    ):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    alone = watched(tmp_path, None)
    expected = read(tmp_path, 1)
    assert len(expected) == 3 * 4
    assert alone["course"]["course"]["num_looks"] == 5
    spawn(one_rank, tmp_path)
    for name in STRATEGIES:
        assert json.loads((tmp_path / f"{name}.json").read_text()) == expected
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt") for rank in (0, 1))
        assert first["course"] == second["course"]
        for part in ("first", "now"):
            assert close(alone["course"]["course"][part], first["course"]["course"][part])
