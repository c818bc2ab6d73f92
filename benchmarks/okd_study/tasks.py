"""Models and data of the three tasks; training and measuring of an arm."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM, PreTrainedModel

from okd_lightning.callbacks import SFT, ExactMatch, PaperMeasures
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe
from okd_lightning.commands.quickstart.task import TRAIN_SEED, draw_problems, val_problems
from okd_lightning.data import RolloutDataModule, load_rows
from okd_lightning.training.module import DistillationModule
from okd_study.arms import Arm

Rows = Sequence[Mapping[str, Any]]

RECIPE = Recipe(warm_steps=500, method_steps=700, warm_learning_rate=1e-2, learning_rate=1e-2)
"""The quickstart's recipe when the study was run; the quickstart itself has shorter stages now."""


@dataclass(frozen=True)
class Prepared:
    """Models, data and monitors of an arm.

    Attributes:
        module: Student and teacher.
        data: Rows in the arm's order.
        monitors: Callbacks of its validation, besides divergences.
    """

    module: DistillationModule
    data: RolloutDataModule
    monitors: list[Callback]


class Tasks:
    """Preparation, training and measuring of arms.

    Args:
        shared: Folder with models/student75K, models/stories260K and datasets/.
        root: Folder in which Trainers may write.
    """

    def __init__(self, shared: Path, root: Path) -> None:
        self.models, self.datasets, self.root = shared / "models", shared / "datasets", root
        self._warm: dict[tuple[int, int], PreTrainedModel] = {}
        self._tuned: dict[Arm, PreTrainedModel] = {}

    def run(self, arm: Arm) -> dict[str, float]:
        """Return all measures of the last validation, and the training's seconds.

        Seconds are those of training alone; CPU seconds do not depend on other processes.
        """
        prepared = self.prepare(arm)
        method = arm.method(prepared.module.learning_rate)
        start, cpu_start = time.perf_counter(), time.process_time()
        trainer = self.trainer(arm.steps, [method], limit_val_batches=0)
        trainer.fit(prepared.module, prepared.data)
        spent = {
            "seconds": round(time.perf_counter() - start, 2),
            "cpu_seconds": round(time.process_time() - cpu_start, 2),
        }
        trainer = self.trainer(arm.steps, [method, *prepared.monitors])
        trainer.validate(prepared.module, prepared.data, verbose=False)
        return spent | {n: round(float(v), 5) for n, v in trainer.callback_metrics.items()}

    def prepare(self, arm: Arm) -> Prepared:
        """Return models in their initial state, seeded by the arm."""
        if arm.task == "arithmetic":
            student: str | PreTrainedModel = copy.deepcopy(self._warm_start(arm))
            source, settings = TEACHER_DIR, _optimization(RECIPE.learning_rate)
        else:
            student, source = str(self.models / "student75K"), self.models / "stories260K"
            settings = {"learning_rate": 1e-3}
        teacher = self._teacher(arm, source)
        lightning.seed_everything(arm.seed, verbose=False)
        module = DistillationModule(student, teacher, tokenizer=str(source), **settings)
        num_prompts = {"tinystories": 50, "gsm8k": 20, "arithmetic": 128}[arm.task]
        monitors: list[Callback] = [PaperMeasures(num_prompts=num_prompts)]
        if arm.task == "arithmetic":
            monitors.insert(0, ExactMatch())
        return Prepared(module, self._data(arm), monitors)

    def trainer(self, steps: int, callbacks: list[Callback], **settings: Any) -> lightning.Trainer:
        """Return a Trainer on the CPU without output."""
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
            default_root_dir=self.root,
            **settings,
        )

    # ---------------------------------------------------------------- models

    def _teacher(self, arm: Arm, source: Path) -> PreTrainedModel:
        """Return a new teacher every time: an online module changes it in place."""
        if arm.conditions.teacher_steps:
            teacher = copy.deepcopy(self._fine_tuned(arm, source))
        else:
            teacher = AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():  # scaling the final norm scales the logits
            teacher.model.norm.weight.mul_(arm.conditions.sharpness)
        return teacher

    def _fine_tuned(self, arm: Arm, source: Path) -> PreTrainedModel:
        steps = arm.conditions.teacher_steps
        own = Arm(arm.task, "SFT", arm.method, steps, arm.seed, arm.conditions)
        if own not in self._tuned:
            lightning.seed_everything(arm.seed, verbose=False)
            module = DistillationModule(str(source), learning_rate=1e-3)
            self.trainer(steps, [SFT()], limit_val_batches=0).fit(module, self._data(own))
            assert module.student is not None
            self._tuned[own] = module.student
        return self._tuned[own]

    def _warm_start(self, arm: Arm) -> PreTrainedModel:
        """Return the quickstart's student after its warm start; kept in memory."""
        recipe = replace(RECIPE, hidden_size=arm.conditions.hidden_size or RECIPE.hidden_size)
        known = (arm.seed, recipe.hidden_size)
        if known not in self._warm:
            lightning.seed_everything(arm.seed, verbose=False)
            module = DistillationModule(
                recipe.student_config,
                tokenizer=str(TEACHER_DIR),
                **_optimization(recipe.warm_learning_rate),
            )
            own = Arm(arm.task, "SFT", arm.method, recipe.warm_steps, arm.seed)
            trainer = self.trainer(own.steps, [SFT()], limit_val_batches=0)
            trainer.fit(module, self._data(own))
            assert module.student is not None
            self._warm[known] = module.student
        return self._warm[known]

    # ---------------------------------------------------------------- data

    def _data(self, arm: Arm) -> RolloutDataModule:
        train, val = getattr(self, f"_{arm.task}_rows")(arm.conditions.num_rows)
        settings: dict[str, dict[str, int]] = {
            "tinystories": {
                "batch_size": 16,
                "max_prompt_length": 48,
                "max_response_length": 112,
                "val_rollouts": 50,
            },
            "gsm8k": {
                "batch_size": 16,
                "max_prompt_length": 120,
                "max_response_length": 128,
                "val_rollouts": 20,
            },
            "arithmetic": {
                "batch_size": Recipe.batch_size,
                "max_prompt_length": 10,
                "max_response_length": 16,
                "prompts_per_epoch": arm.steps * Recipe.batch_size,
                "val_rollouts": Recipe.val_rollouts,
            },
        }
        return RolloutDataModule(train, val, seed=arm.seed, **settings[arm.task])

    def _tinystories_rows(self, num: int | None) -> tuple[Rows, Rows]:
        folder = self.datasets / "tinystories"
        train, val = (load_rows(str(folder / f"{part}.jsonl")) for part in ("train", "val"))
        return list(train)[:num], list(val)

    def _gsm8k_rows(self, num: int | None) -> tuple[Rows, Rows]:
        """Return short problems, so that a row fits with a BPE of 512 tokens."""
        train, val = (
            [
                {"prompt": row["question"], "response": row["answer"]}
                for row in load_rows(str(self.datasets / "gsm8k" / f"{part}.jsonl"))
                if len(row["question"]) <= 150 and len(row["answer"]) <= 160
            ]
            for part in ("train", "test")
        )
        return train[:num], val

    def _arithmetic_rows(self, num: int | None) -> tuple[Rows, Rows]:
        """Return the quickstart's problems, or the first ``num`` of the list they start."""
        val = list(load_rows(str(VAL_FILE)))
        if num is None:
            return list(load_rows(str(TRAIN_FILE))), val
        problems = draw_problems(num, TRAIN_SEED, exclude=val_problems())
        return [asdict(problem) for problem in problems], val


def _optimization(learning_rate: float) -> dict[str, Any]:
    return {
        "learning_rate": learning_rate,
        "weight_decay": Recipe.weight_decay,
        "warmup_steps": Recipe.warmup_steps,
        "schedule": "cosine",
    }
