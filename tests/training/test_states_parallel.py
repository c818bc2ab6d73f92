"""Hidden states and experts' balance on two ranks, by DDP and in shards.

Frozen here: with projectors, accumulation, an idle stage and a short last step, both ranks' weights
(projectors included) are those of one process; a killed sharded run resumes with the weights of a
whole one, its projectors from a folder of shards; the balancing loss is the single process's. A run
within its first epoch that is killed in the validation after its last step resumes with it alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from parallel_runs import Killed, Killer, run, spawn
from transformers import MixtralConfig, MixtralForCausalLM

from okd_lightning.callbacks import (
    GKD,
    KD,
    SFT,
    ExpertBalance,
    HiddenStates,
    LastCheckpoint,
    Stage,
)

RUNS = {
    "states": {
        "methods": lambda: [
            GKD(on_policy_fraction=0.5),
            Stage(HiddenStates({1: 2, -1: -1}, weight=0.5), start=1, end=4),
            HiddenStates({0: 0}, "cosine", name="embeddings"),
        ],
        "accumulate": 2,
        "num": 22,
        "settings": {"max_steps": 6},
    },
    "states alone": {
        "methods": lambda: [Stage(HiddenStates({1: 1}), end=2), Stage(KD(), start=2)],
        "settings": {"max_steps": 4},
    },
}
BALANCED = {
    "methods": lambda: [SFT(), ExpertBalance(0.5)],
    "settings": {"max_steps": 3},
}


def settings_of(root: Path, name: str) -> dict:
    if name != "balance":
        return {**RUNS[name], "model": {"teacher": str(root / "wide")}}
    return {**BALANCED, "model": {"student": str(root / "experts"), "dtype": "float32"}}


def killed_and_whole(root: Path) -> list[dict]:
    """Run in shards, resumed from a folder."""
    found = []
    settings = settings_of(root, "states")
    for name, kill in (("whole", False), ("cut", True)):
        own = {**settings, "settings": {"max_steps": 6, "default_root_dir": root / name}}
        saver = LastCheckpoint(every_n_steps=2)
        found.append(run(root, "fsdp2", **own, callbacks=[saver, *([Killer()] if kill else [])]))
    last = str(root / "cut" / "checkpoints" / "last.ckpt")
    own["callbacks"] = [LastCheckpoint(every_n_steps=2)]
    found.append(run(root, "fsdp2", **own, ckpt_path=last))
    return found


class KilledInValidation(Callback):
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, loader=0):
        if trainer.state.fn == "fit":
            raise Killed


def short_runs(root: Path, strategy: str) -> list[dict]:
    """Two steps of an epoch of three: whole; and killed in the validation, then resumed."""
    found = []
    for name, more in (("all", ()), ("part", (KilledInValidation(),)), ("part", ())):
        folder = root / f"{name} {strategy}"
        last = folder / "checkpoints" / "last.ckpt"
        own = {**settings_of(root, "states"), "settings": {"max_steps": 2}}
        own["settings"]["default_root_dir"] = folder
        own |= {"callbacks": [LastCheckpoint(), *more], "accumulate": 2}
        found.append(run(root, strategy, **own, ckpt_path=str(last) if last.exists() else None))
    return found


def both_ranks(rank: int, root: Path) -> None:
    results = {
        (name, strategy): run(root, strategy, **settings_of(root, name))
        for name in (*RUNS, "balance")
        for strategy in ("ddp", "fsdp2")
    }
    results["resume"] = killed_and_whole(root)
    results["short"] = {strategy: short_runs(root, strategy) for strategy in ("ddp", "fsdp2")}
    torch.save(results, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("states")
    fields = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        experts = MixtralForCausalLM(
            MixtralConfig(vocab_size=tiny.STUDENT_ROWS, initializer_range=0.3, **fields)
        )
    wide = {"hidden_size": 48, "num_hidden_layers": 3, "head_dim": 8}
    models = {
        "student": tiny.make_llama(1, tie_word_embeddings=True),
        "teacher": tiny.make_llama(2, tiny.TEACHER_ROWS),
        "wide": tiny.make_llama(4, tiny.TEACHER_ROWS, **wide),
        "experts": experts,
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def ranks(folder):
    spawn(both_ranks, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", [*RUNS, "balance"])
def test_two_ranks_do_what_one_does(name, strategy, folder, ranks):
    alone = run(folder, None, **settings_of(folder, name))
    tolerance = 1e-4 if name == "balance" else 1e-9
    has_projectors = any("projectors." in weight for weight in alone["weights"])
    assert has_projectors == (name != "balance")
    for rank in ranks:
        found = rank[name, strategy]
        assert found["steps"] == alone["steps"]
        assert found["difference"] == 0
        assert tiny.distance(found["weights"], alone["weights"]) < tolerance
        for own, expected in zip(found["losses"], alone["losses"], strict=True):
            own = {key: value for key, value in own.items() if key in expected}
            assert own == pytest.approx(expected, rel=1e-3 if name == "balance" else 1e-5)


def test_a_killed_sharded_run_resumes(ranks):
    for rank in ranks:
        whole, _, resumed = rank["resume"]
        assert tiny.distance(resumed["weights"], whole["weights"]) == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_short_run_killed_in_its_validation_resumes_with_it(strategy, ranks):
    for rank in ranks:
        whole, killed, resumed = rank["short"][strategy]
        assert [found["steps"] for found in rank["short"][strategy]] == [2, 2, 2]
        assert whole["measures"]
        assert not killed["measures"]
        assert resumed["measures"] == whole["measures"]
        assert not resumed["losses"]
        assert tiny.distance(resumed["weights"], whole["weights"]) == 0
