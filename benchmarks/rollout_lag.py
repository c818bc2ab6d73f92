"""Rollouts ahead of training (``--data.rollout_lag``): the time that they save, and their price.

``speed``: seconds of an on-policy run with lags 0 and 1, generation and training on one thread
each, so that two cores are used; sizes are such that both take about as long. ``tolerance``: exact
match and divergences after GKD with forward and reverse KL on the quickstart's arithmetic, with
lags of several optimizer steps. There the responses are generated in this process at the request:
the weights of every response are those of a run with a worker, and no time is measured.

    python benchmarks/rollout_lag.py [--what speed tolerance] [--steps 100] [--lags 0 1 8 32]
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import PreTrainedModel

from okd_lightning.callbacks import GKD, SFT, ExactMatch, Throughput
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines.ahead import AheadEngine, Answer, Generated
from okd_lightning.training.lightning_messages import quiet
from okd_lightning.training.module import DistillationModule

MEASURES = ("val/forward_kl", "val/reverse_kl", "val/on_policy_reverse_kl", "val/exact_match")
AGES = ("rollout/effective_sample_size", "rollout/abs_log_ratio")
DIVERGENCES = {"forward KL": 0.0, "reverse KL": 1.0}


class AtTheRequest(AheadEngine):
    """Generates in this process when a request is begun, which only changes the clock."""

    def __init__(self, module: DistillationModule) -> None:
        self._module = module

    def begin(self, request: Any) -> Answer:
        """See ``AheadEngine``."""
        answer = Answer()
        answer.finish(Generated(self._module.respond(request), 0.0))
        return answer

    def close(self) -> None:
        """Do nothing."""


class InProcess(DistillationModule):
    """A DistillationModule whose rollouts ahead of training start no process."""

    def ahead_engine(self, lag: int) -> Any:
        """Return the function that makes the engine."""
        del lag
        return lambda: AtTheRequest(self)


def trainer_of(steps: int, callbacks: list[Any], folder: str, **settings: Any) -> lightning.Trainer:
    """Return a quiet Trainer on the CPU."""
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        **settings,
    )


def data_of(lag: int, batch_size: int = 64, **settings: Any) -> RolloutDataModule:
    """Return the arithmetic problems of the quickstart."""
    defaults = {"max_prompt_length": 10, "max_response_length": 16, "val_rollouts": 128, "seed": 0}
    return RolloutDataModule(
        TRAIN_FILE, VAL_FILE, batch_size=batch_size, rollout_lag=lag, **{**defaults, **settings}
    )


def speed(steps: int, folder: str) -> list[dict[str, float]]:
    """Return seconds of both runs; those before the second step (imports) are left out."""
    rows = []
    for lag in (0, 1):
        lightning.seed_everything(0, verbose=False)
        student = Recipe(hidden_size=256, num_layers=4).student_config
        module = DistillationModule(student, str(TEACHER_DIR), tokenizer=str(TEACHER_DIR))
        clock = Clock()
        throughput = Throughput()
        trainer = trainer_of(steps, [GKD(0.0, 1.0), throughput, clock], folder)
        trainer.fit(module, data_of(lag, val_rollouts=0, samples_per_prompt=2), None)
        rows.append({"lag": lag, "steps": steps - 2, **clock.found})
    return rows


class Clock(lightning.Callback):
    """Seconds from the third step on, when the process has started: all, waiting, generation."""

    def __init__(self) -> None:
        self.found = {"seconds": 0.0, "waited": 0.0, "generation": 0.0}
        self._start = 0.0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the seconds of generation and of waiting for it."""
        if trainer.global_step > 2:
            own = batch.metrics.get("rollout/seconds", 0.0)
            self.found["generation"] += own
            self.found["waited"] += batch.metrics.get("rollout/wait_seconds", own)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Start the clock after the second step, and read it after later ones."""
        if trainer.global_step == 2:
            self._start = time.perf_counter()
        elif trainer.global_step > 2:
            self.found["seconds"] = time.perf_counter() - self._start


def warm_student(steps: int, folder: str) -> PreTrainedModel:
    """Return a student after SFT from random weights."""
    lightning.seed_everything(0, verbose=False)
    module = DistillationModule(
        Recipe().student_config, tokenizer=str(TEACHER_DIR), learning_rate=1e-2, warmup_steps=20
    )
    trainer_of(steps, [SFT()], folder, limit_val_batches=0).fit(module, data_of(0))
    assert module.student is not None
    return module.student


def tolerance(steps: int, lags: list[int], folder: str) -> list[dict[str, Any]]:
    """Return the measures after training, by divergence and lag."""
    warm, rows = warm_student(3 * steps, folder), []
    for name, beta in DIVERGENCES.items():
        for lag in lags:
            lightning.seed_everything(0, verbose=False)
            pair = copy.deepcopy(warm), str(TEACHER_DIR)
            module = InProcess(
                *pair, tokenizer=str(TEACHER_DIR), learning_rate=1e-2, warmup_steps=20
            )
            trainer = trainer_of(steps, [GKD(beta, 1.0), ExactMatch()], folder, limit_val_batches=0)
            trainer.fit(module, data_of(lag))
            ages = {n: float(trainer.callback_metrics[n]) for n in AGES if lag}
            judge = trainer_of(1, [ExactMatch()], folder)
            found = judge.validate(module, data_of(0), verbose=False)
            measured = {n: v for part in found for n, v in part.items()}
            row = {"divergence": name, "lag": lag, **ages}
            row |= {n: v for n in MEASURES for k, v in measured.items() if k.startswith(n)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", default=["speed", "tolerance"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lags", nargs="+", type=int, default=[0, 1, 8, 32])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if "speed" in options.what:
            found["speed"] = speed(options.steps, folder)
            print(json.dumps(found["speed"]), flush=True)
        if "tolerance" in options.what:
            found["tolerance"] = tolerance(options.steps, options.lags, folder)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
