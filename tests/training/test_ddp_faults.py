"""Two gloo processes of which one has a fault, and checkpoints of another number of ranks.

Frozen here, in one spawn: a loss or a gradient that is not finite on one rank stops both before the
optimizer's step, with one message; an engine that times out on one rank stops both with what it was
writing; a signal to one rank stops both after a checkpoint, also within a rollout and within a
validation, and the resumed run is the one that was left alone; what two ranks have saved one
resumes, and the other way round, in the middle of a rollout batch, with the losses, rollouts and
advantages of the run that was left alone.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from parallel_runs import spawn

from okd_lightning.callbacks import GKD, KD, LastCheckpoint, OPDPlus, Preemption, Reward, RolloutLog
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import TransformersEngine
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.step import FiniteGuard

STEPS = 8


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


METHODS = {
    "GKD": lambda: [GKD(0.5, on_policy_fraction=0.5)],
    "KD, reward": lambda: [KD(), OPDPlus(), Reward(length_of, "leave_one_out", weight=0.05)],
}


class Broken(Callback):
    """A number that is not finite, on one rank alone, in the third step."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            if self.what == "loss":
                pl_module.student.lm_head.weight.data[0, 0] = float("nan")
            else:
                hook = pl_module.student.lm_head.weight.register_hook
                self.handle = hook(lambda gradient: gradient * float("inf"))


class Signal(Callback):
    """SIGTERM to rank 1 alone, where a run comes to a place for the n-th time."""

    def __init__(self, place: str, number: int) -> None:
        self.place, self.number = place, number

    def setup(self, trainer, pl_module, stage):
        calls = []
        original = pl_module.respond

        def write(*args, **kwargs):
            calls.append(1)
            if self.place == "write" and len(calls) == self.number and trainer.global_rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        pl_module.respond = write

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        is_now = (self.place, self.number) == ("step", trainer.global_step)
        if is_now and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        is_now = self.place == "validation" and trainer.global_step == self.number
        if is_now and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class LateEngine(TransformersEngine):
    """Times out when it is asked for the third time, on rank 1."""

    calls = 0

    def respond(self, request):
        LateEngine.calls += 1
        if LateEngine.calls == 3 and int(os.environ.get("LOCAL_RANK", 0)) == 1:
            raise TimeoutError("no answer in 600 s")
        return super().respond(request)


class LateModule(DistillationModule):
    def build_engine(self, model):
        return LateEngine(model, self.vocabulary, self.eos_ids)


class Losses(Callback):
    """The loss of every optimizer step, over all ranks."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.seen[trainer.global_step] = float(trainer.callback_metrics["train/loss"])


def run(root, folder, devices, method="GKD", callbacks=(), ckpt_path=None, max_steps=STEPS, **more):
    """4 rows per optimizer step whatever the devices; chunks of 4 steps, epochs of 6."""
    torch.manual_seed(3)
    make = LateModule if more.pop("is_late", False) else DistillationModule
    models = (str(root / "student"), str(root / "teacher"))
    module = make(*models, learning_rate=3e-3, dtype="float64")
    losses, log = Losses(), RolloutLog(every_n_steps=1, num_rows=9)
    trainer = tiny.make_trainer(
        root / folder,
        [
            *METHODS[method](),
            losses,
            log,
            Preemption(),
            LastCheckpoint(every_n_steps=1),
            *callbacks,
        ],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    data = RolloutDataModule(
        tiny.make_rows(24 if method == "GKD" else 12),
        tiny.make_rows(5, seed=2),
        batch_size=1,
        global_batch_size=4,
        prompts_per_rollout=16 if method == "GKD" else 8,
        samples_per_prompt=1 if method == "GKD" else 2,
        max_response_length=6,
        seed=7,
        val_rollouts=3,
    )
    problem = ""
    try:
        trainer.fit(module, data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    except Exception as error:  # noqa: BLE001  (a rank hands what it has seen to the parent)
        problem = f"{type(error).__name__}: {error}"
    last = root / folder / "checkpoints" / "last.ckpt"
    return {
        "losses": losses.seen,
        "weights": tiny.weights(module),
        "problem": problem,
        "step": trainer.global_step,
        "saved": torch.load(last, weights_only=True)["global_step"] if last.exists() else None,
    }


PLACES = [("step", 1), ("step", 6), ("write", 1), ("write", 3), ("validation", 3)]


def of_one_rank(rank: int, root: Path) -> None:
    """Body of a spawned process."""
    found = {}
    for method in METHODS:
        found["whole", method] = run(root, f"whole {method}", 2, method)
        found["part", method] = run(root, f"part {method}", 2, method, max_steps=3)
        last = root / f"alone {method}" / "checkpoints" / "last.ckpt"
        found["resumed", method] = run(root, f"two {method}", 2, method, ckpt_path=last)
    for what in ("loss", "gradient"):
        callbacks = [Broken(what), FiniteGuard()]
        found["not finite", what] = run(root, f"not finite {what}", 2, callbacks=callbacks)
    found["late"] = run(root, "late", 2, is_late=True)
    for place, number in PLACES:
        name = f"stopped {place} {number}"
        found[name] = run(root, name, 2, callbacks=[Signal(place, number)])
        last = root / name / "checkpoints" / "last.ckpt"
        found[name, "resumed"] = run(root, name, 2, ckpt_path=last if last.exists() else None)
    torch.save(found, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("faults")
    for name, model in (
        ("student", tiny.make_llama(1)),
        ("teacher", tiny.make_llama(2, tiny.TEACHER_ROWS)),
    ):
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def alone(folder):
    """Body of one rank: whole runs, and a checkpoint in the middle of a rollout batch."""
    found = {}
    for method in METHODS:
        found["whole", method] = run(folder, f"alone whole {method}", 1, method)
        found["part", method] = run(folder, f"alone {method}", 1, method, max_steps=3)
    return found


@pytest.fixture(scope="module")
def ranks(folder, alone):
    spawn(of_one_rank, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def check_losses(found: dict, truth: dict, first: int) -> None:
    assert found["problem"] == ""
    assert sorted(found["losses"]) == list(range(first, STEPS + 1))
    expected = {step: truth["losses"][step] for step in found["losses"]}
    assert found["losses"] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert tiny.distance(found["weights"], truth["weights"]) < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_saved_and_one_resumes(method, folder, alone, ranks):
    last = folder / f"part {method}" / "checkpoints" / "last.ckpt"
    assert len(torch.load(last, weights_only=True)["okd_lightning"]["rng"]) == 2
    found = run(folder, f"one {method}", 1, method, ckpt_path=last)
    check_losses(found, alone["whole", method], 4)


@pytest.mark.parametrize("method", METHODS)
def test_one_rank_saved_and_two_resume(method, alone, ranks):
    for rank in ranks:
        check_losses(rank["resumed", method], rank["whole", method], 4)
        check_losses(rank["resumed", method], alone["whole", method], 4)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_on_one_rank_stops_both(what, ranks):
    for rank in ranks:
        found = rank["not finite", what]
        assert "NonFiniteError" in found["problem"]
        assert "at step 2 " in found["problem"]
        assert (found["step"], found["saved"]) == (2, 2)
    assert ranks[0]["not finite", what]["problem"] == ranks[1]["not finite", what]["problem"]


def test_an_engine_that_times_out_on_one_rank_stops_both(ranks):
    for rank in ranks:
        problem = rank["late"]["problem"]
        assert problem.startswith("RolloutTimeoutError: rank 1: the engine did not answer in time")
        assert "while the student generated responses to " in problem
        assert "no answer in 600 s" in problem
        assert "--data.prompts_per_rollout" in problem
    assert ranks[0]["late"]["saved"] == ranks[1]["late"]["saved"]


@pytest.mark.parametrize(("place", "number"), PLACES)
def test_a_signal_to_one_rank_stops_both(place, number, ranks):
    name = f"stopped {place} {number}"
    for rank in ranks:
        stopped, resumed, whole = rank[name], rank[name, "resumed"], rank["whole", "GKD"]
        assert stopped["problem"].startswith("PreemptedError: stopped by a signal at step ")
        assert stopped["step"] == (stopped["saved"] or 0) < STEPS
        assert resumed["problem"] == ""
        assert tiny.distance(resumed["weights"], whole["weights"]) == 0
        expected = {step: whole["losses"][step] for step in resumed["losses"]}
        assert resumed["losses"] == expected
