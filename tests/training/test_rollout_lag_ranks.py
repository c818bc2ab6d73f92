"""``data.rollout_lag`` on two gloo processes, each with a process of its own that generates.

Frozen here: two ranks train on the rows of one rank, to float tolerance, and keep equal weights; a
run of two ranks that is stopped and resumed ends with the same weights bit for bit; the ranks that
share a server give it new weights when the requests of both are answered, also for validation; a
process that dies ends both ranks with one error that names its rank.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tiny
import torch
from fake_vllm_server import FakeVLLM, serving
from forked_worker import launch_forked
from lightning.pytorch.callbacks import Callback
from parallel_runs import Killer, run, spawn

from okd_lightning.callbacks import GKD, LastCheckpoint
from okd_lightning.engines import VLLMServer, worker_process
from okd_lightning.errors import WorkerError

LAG = {"rollout_lag": 1, "val_rollouts": 0, "token_cache": None}


def methods() -> list[GKD]:
    return [GKD(0.5, on_policy_fraction=1.0)]


class Kill(Callback):
    """Ends the process that generates for rank 1."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 1:
            os.kill(trainer.train_dataloader.ahead._engine._process.pid, signal.SIGKILL)


def resumed(root: Path) -> list[dict]:
    found = []
    for name, kill in (("whole", False), ("parts", True)):
        folder = {"default_root_dir": root / name, "max_steps": 5, "limit_val_batches": 0}
        saver = LastCheckpoint(every_n_steps=3)
        callbacks = [saver, *([Killer(4)] if kill else [])]
        own = {"data": LAG, "settings": folder}
        found.append(run(root, "ddp", methods, callbacks=callbacks, **own))
        if kill:
            last = str(root / name / "checkpoints" / "last.ckpt")
            again = [LastCheckpoint(every_n_steps=3)]
            found.append(run(root, "ddp", methods, callbacks=again, ckpt_path=last, **own))
    return found


def of_one_rank(rank: int, root: Path) -> None:
    worker_process.launch = launch_forked
    results = {"parts": resumed(root)}
    server = VLLMServer((root / "url").read_text(), str(root / "weights"))
    results["server"] = run(
        root,
        "ddp",
        methods,
        data={**LAG, "val_rollouts": 3},
        model={"engine": server, "dtype": "float32"},
        settings={"max_steps": 4, "val_check_interval": 2},
    )
    try:
        own = {"max_steps": 4, "limit_val_batches": 0}
        run(root, "ddp", methods, data=LAG, callbacks=[Kill()], settings=own)
    except WorkerError as error:
        results["error"] = str(error)
    torch.save(results, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    root = tmp_path_factory.mktemp("lag")
    for name, model in (("student", tiny.make_llama(0)), ("teacher", tiny.make_llama(1))):
        model.save_pretrained(root / name)
        tiny.make_tokenizer().save_pretrained(root / name)
    with serving(FakeVLLM(tiny.make_llama(9))) as engine:
        (root / "url").write_text(engine.url)
        spawn(of_one_rank, root)
    found = [torch.load(root / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    return root, found


def test_two_ranks_train_on_the_rows_of_one(ranks, monkeypatch):
    root, (first, second) = ranks
    monkeypatch.setattr(worker_process, "launch", launch_forked)
    settings = {"max_steps": 5, "limit_val_batches": 0}
    alone = run(root, None, methods, data=LAG, settings=settings)
    two = first["parts"][0]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight)
        assert torch.equal(two["weights"][name], second["parts"][0]["weights"][name])
    assert two["difference"] == 0.0


def test_a_resumed_run_of_two_ranks_ends_with_the_same_weights(ranks):
    whole, killed, continued = ranks[1][0]["parts"]
    assert killed["steps"] < continued["steps"] == whole["steps"]
    for name, weight in whole["weights"].items():
        assert torch.equal(continued["weights"][name], weight), name


def test_two_ranks_share_a_server(ranks):
    first, second = (own["server"] for own in ranks[1])
    assert first["steps"] == 4
    assert "val/on_policy_reverse_kl" in first["measures"]
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name


def test_a_dead_process_ends_both_ranks(ranks):
    assert all(own["error"].startswith("rank 1: ") for own in ranks[1])
    assert "was ended by SIGKILL" in ranks[1][0]["error"]
