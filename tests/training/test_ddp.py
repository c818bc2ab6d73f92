"""Two gloo processes against one (METHODS.md, section 5, test 7).

Frozen here, in one spawn: after several steps of KD and GKD the weights are the single process's at
the same global batch, on both ranks, with a short last step and a rank that has no rows; the
gradients of both ranks are equal after every backward pass; losses and validation measures are
those of all ranks, also task measures and the measures of the OKD paper; a killed run resumes
exactly, dropout included; rewards with baselines, methods that begin later, LoRA, tied heads, OKD's
online module with an anchor and students that teach themselves work.
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from parallel_runs import Killed, Killer, spawn
from peft import LoraConfig

from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    SFT,
    AvgAtK,
    ExactMatch,
    LastCheckpoint,
    OPDPlus,
    PaperMeasures,
    Reward,
    Stage,
    TaskScore,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import JensenShannon
from okd_lightning.teachers import AveragedSelf, FrozenSelf, LiveSelf
from okd_lightning.training.module import DistillationModule


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


def a_count(prompt: str, response: str, reference: str) -> float:
    """Reward: length of the answer, each a counted twice; NaN for prompts of even length."""
    return float(response.count("a") + len(response)) if len(prompt) % 2 else math.nan


def task_measures() -> list[Callback]:
    """The pattern is one letter of few, so that some answers are right."""
    return [ExactMatch(), AvgAtK(6, "([a-c])", temperature=2.0, pass_at=[3]), TaskScore(a_count)]


RUNS = {
    "KD": {"methods": lambda: [KD(temperature=2.0, cross_entropy_weight=0.2)]},
    "GKD": {"methods": lambda: [GKD(0.5, on_policy_fraction=0.5)], "accumulate": 2},
    "on-policy, chunks": {
        "methods": lambda: [GKD(1.0, on_policy_fraction=1.0)],
        "data": {"prompts_per_rollout": 8},
    },
    "mixed": {
        "methods": lambda: [KD(weight=0.5), GKD(1.0, on_policy_fraction=1.0)],
        "accumulate": 2,
    },
    "samples": {
        "methods": lambda: [GKD(1.0, on_policy_fraction=1.0)],
        "data": {"samples_per_prompt": 4},
    },
    "one prompt left": {"methods": lambda: [SFT()], "num": 9},
    "KD and a reward": {
        "methods": lambda: [KD(), Reward(length_of, "leave_one_out", weight=0.05)],
        "accumulate": 2,
        "data": {"samples_per_prompt": 2},
    },
    "OKD in a later stage": {
        "methods": lambda: [
            Stage(SFT(), end=2),
            Stage(OKD(learning_rate=2.0, online_module=LoraConfig(r=2)), start=2),
            Stage(OPDPlus(JensenShannon(0.5), discount=0.5), start=2),
        ],
    },
    "LoRA": {"methods": lambda: [KD()], "adapter": True},
    "OKD": {
        "methods": lambda: [
            OKD(
                anchor_weight=0.5,
                learning_rate=2.0,
                on_policy_fraction=0.5,
                online_module=LoraConfig(r=2),
            )
        ],
        "accumulate": 2,
    },
    **{
        f"{kind.__name__}{', LoRA' if adapter else ''}": {
            "methods": lambda: [GKD(1.0, on_policy_fraction=0.5)],
            "accumulate": 2,
            "data": {"teacher_prompt_template": "{reference}p{prompt}"},
            "adapter": adapter,
            "teacher": kind,
        }
        for kind, adapter in ((FrozenSelf, True), (AveragedSelf, False), (LiveSelf, True))
    },
}


class Gradients(Callback):
    """The largest difference between this rank's gradients and rank 0's."""

    def __init__(self):
        self.largest = 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            if parameter.grad is not None and torch.distributed.is_initialized():
                other = parameter.grad.clone()
                torch.distributed.broadcast(other, 0)
                self.largest = max(self.largest, float((other - parameter.grad).abs().max()))


def run(root: Path, devices: int, methods, num=22, accumulate=1, adapter=None, data=None, **more):
    """4 rows per optimizer step and micro-batch over all ranks; weights, losses and measures."""
    torch.manual_seed(3)
    module = DistillationModule(
        more.pop("student", None) or str(root / "student"),
        more["teacher"]() if "teacher" in more else str(root / "teacher"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        student_adapter=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if adapter else None,
        dtype="float64",
    )
    recorder, gradients = tiny.Recorder(), Gradients()
    trainer = tiny.make_trainer(
        root / f"run{devices}",
        [*methods(), recorder, gradients, *more.pop("callbacks", [])],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        val_check_interval=2 * accumulate,
        **{"max_steps": 4, "max_epochs": 2, **more.pop("settings", {})},
    )
    options = {"batch_size": 4 // devices, "max_response_length": 6, "seed": 7, "val_rollouts": 3}
    loaders = RolloutDataModule(
        tiny.make_rows(num), tiny.make_rows(5, seed=2), **{**options, **(data or {})}
    )
    with contextlib.suppress(Killed):
        trainer.fit(module, loaders, ckpt_path=more.get("ckpt_path"))
    measures = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    return {
        "weights": {
            **tiny.weights(module),
            **{n: p.detach().clone() for n, p in module.named_parameters() if _is_online(n)},
        },
        "losses": recorder.losses,
        "measures": measures,
        "difference": gradients.largest,
        "steps": trainer.global_step,
    }


def _is_online(name: str) -> bool:
    return name.startswith("teacher.") and "lora_" in name


def resume(root: Path) -> list[dict]:
    """A run of two ranks with dropout, whole and killed."""
    found = []
    for name, kill in (("whole", False), ("killed", True)):
        settings = {
            "student": str(root / "dropout"),
            "methods": lambda: [GKD(0.5, on_policy_fraction=0.5)],
            "accumulate": 2,
            "data": {"prompts_per_rollout": 16},
        }
        folder = {"settings": {"default_root_dir": root / name, "max_steps": 6}}
        saver = LastCheckpoint(every_n_steps=2)
        callbacks = [saver, *([Killer()] if kill else [])]
        found.append(run(root, 2, **settings, callbacks=callbacks, **folder))
        if kill:
            last = str(root / name / "checkpoints" / "last.ckpt")
            callbacks = [LastCheckpoint(every_n_steps=2)]
            found.append(run(root, 2, **settings, callbacks=callbacks, ckpt_path=last, **folder))
    return found


def of_one_rank(rank: int, root: Path) -> None:
    """Body of a spawned process."""
    results = {name: run(root, 2, **settings) for name, settings in RUNS.items()}
    results["task measures"] = run(root, 2, RUNS["KD"]["methods"], callbacks=task_measures())
    results["paper measures"] = run(root, 2, RUNS["OKD"]["methods"], callbacks=[PaperMeasures()])
    results["resume"] = resume(root)
    torch.save(results, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("ddp")
    models = {
        "student": tiny.make_llama(1, tie_word_embeddings=True),
        "teacher": tiny.make_llama(2, tiny.TEACHER_ROWS),
        "dropout": tiny.make_gpt2(3),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def ranks(folder):
    spawn(of_one_rank, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_do_what_one_does(name, folder, ranks):
    alone = run(folder, 1, **RUNS[name])
    for rank in ranks:
        found = rank[name]
        assert found["steps"] == alone["steps"]
        assert found["difference"] == 0
        assert tiny.distance(found["weights"], alone["weights"]) < 1e-9
        for losses, expected in zip(found["losses"], alone["losses"], strict=True):
            assert losses == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert found["measures"].keys() == alone["measures"].keys()
        assert found["measures"] == pytest.approx(alone["measures"], rel=1e-5)
    moved = torch.load(folder / "rank0.pt", weights_only=False)[name]["losses"]
    assert len(moved) == alone["steps"]


def test_both_ranks_solve_their_share(folder, ranks):
    alone = run(folder, 1, RUNS["KD"]["methods"], callbacks=task_measures())["measures"]
    assert alone["val/a_count"] > 0
    assert 0 < alone["val/pass_at_3"] < 1
    for rank in ranks:
        found = rank["task measures"]["measures"]
        for name in ("exact_match", "avg_at_6", "pass_at_3", "a_count"):
            assert found[f"val/{name}"] == pytest.approx(alone[f"val/{name}"], rel=1e-6)


def test_both_ranks_measure_what_one_does(folder, ranks):
    alone = run(folder, 1, RUNS["OKD"]["methods"], callbacks=[PaperMeasures()])["measures"]
    assert {"val/uncertainty_hard", "val/excess_accumulated_error", "val/rouge_l"} <= alone.keys()
    for rank in ranks:
        assert rank["paper measures"]["measures"] == pytest.approx(alone, rel=1e-5)


def test_two_ranks_resume_exactly_with_dropout(ranks):
    for rank in ranks:
        whole, killed, resumed = rank["resume"]
        assert (whole["steps"], killed["steps"], resumed["steps"]) == (6, 3, 6)
        assert tiny.distance(killed["weights"], whole["weights"]) > 0
        assert tiny.distance(resumed["weights"], whole["weights"]) == 0
