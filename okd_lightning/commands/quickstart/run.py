"""Warm start, then a method and SFT continued for comparison, through the public API."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel

from okd_lightning.callbacks import SFT, ExactMatch, Throughput
from okd_lightning.callbacks.measures.answer_scores import greedy_answers
from okd_lightning.callbacks.methods.base import Method
from okd_lightning.callbacks.methods.policy_gradient import PolicyGradientCallback
from okd_lightning.callbacks.monitors.progress_bar import RunProgressBar
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe
from okd_lightning.commands.reports import (
    Answer,
    CurveLog,
    RunResult,
    answers_table,
    plot_curves,
    results_table,
    write_metrics_csv,
    write_results,
)
from okd_lightning.data import RolloutDataModule, load_rows
from okd_lightning.training.lightning_messages import PrintableConsole, only_warnings
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.safeguards.step_intervals import StepIntervals
from okd_lightning.training.step import FiniteGuard

_MEASURES = (
    "val/exact_match",
    "val/forward_kl",
    "val/reverse_kl",
    "val/jsd",
    "val/agreement",
    "val/cross_entropy",
    "val/on_policy_forward_kl",
    "val/on_policy_reverse_kl",
    "val/on_policy_agreement",
)


class Quickstart:
    """One run of the quickstart.

    Args:
        method: Compared with SFT continued.
        out: Folder of results.json, metrics.csv and learning_curve.png.
        seed: Determines everything but the timings.
        recipe: Sizes and budgets.
        console: For output.
    """

    def __init__(
        self,
        method: Method,
        out: Path,
        seed: int = 0,
        recipe: Recipe | None = None,
        console: Console | None = None,
    ) -> None:
        self.method = method
        self.out = out
        self.seed = seed
        self.recipe = recipe or Recipe()
        self.console = console or PrintableConsole()

    def run(self) -> list[RunResult]:
        """Train, write the files, print the tables.

        Returns:
            SFT continued and the method, in this order (SFT alone where it is the method).
        """
        with only_warnings():
            return self._run()

    def _run(self) -> list[RunResult]:
        name = type(self.method).__name__
        methods = [SFT()] if isinstance(self.method, SFT) else [SFT(), self.method]
        self._say(
            f"1/{len(methods) + 1}  warm start: a student learns from {len(load_rows(TRAIN_FILE))} "
            "worked problems"
        )
        warm = self._warm_start()
        results, answers = [], []
        for number, method in enumerate(methods, 2):
            label = "SFT" if isinstance(method, SFT) else name
            what = "SFT continued" if label == "SFT" else f"{name}: training with the teacher"
            rate = self._learning_rate(method)
            at = "" if rate == self.recipe.learning_rate else f" at a learning rate of {rate:g}"
            self._say(f"{number}/{len(methods) + 1}  {what}, {self.recipe.method_steps} steps{at}")
            result, before, after, teacher = self._distil(copy.deepcopy(warm), method, label)
            results.append(result)
            answers.append((label, before, after, teacher))
        self._write(results)
        self.console.print(results_table(results))
        self.console.print(answers_table(self._answers(answers)))
        self._say(f"results.json, metrics.csv and learning_curve.png are in {self.out}")
        return results

    def _warm_start(self) -> PreTrainedModel:
        recipe = self.recipe
        lightning.seed_everything(self.seed, verbose=False)
        module = DistillationModule(
            recipe.student_config,
            tokenizer=str(TEACHER_DIR),
            **self._optimization(recipe.warm_learning_rate),
        )
        trainer = self._trainer(recipe.warm_steps, [SFT()], limit_val_batches=0)
        trainer.fit(module, self._data(recipe.warm_steps))
        assert module.student is not None
        return module.student

    def _distil(
        self, student: PreTrainedModel, method: Method, label: str
    ) -> tuple[RunResult, list[str], list[str], list[str]]:
        """Train one run; also return the shown answers before, after, and the teacher's."""
        recipe = self.recipe
        lightning.seed_everything(self.seed, verbose=False)
        module = DistillationModule(
            student,
            str(TEACHER_DIR),
            tokenizer=str(TEACHER_DIR),
            **self._optimization(self._learning_rate(method)),
        )
        data, curve = self._data(recipe.method_steps), CurveLog(_MEASURES.__contains__)
        trainer = self._trainer(recipe.method_steps, [method, Throughput(), curve, ExactMatch()])
        trainer.validate(module, data, verbose=False)
        shown = list(data.examples("val").examples[: recipe.num_answers])
        answers_before = greedy_answers(module, data, shown)
        trainer.fit(module, data)
        if curve.last_step != trainer.global_step:
            trainer.validate(module, data, verbose=False)
        result = curve.result(trainer, label)
        answers_after = greedy_answers(module, data, shown)
        return result, answers_before, answers_after, greedy_answers(module, data, shown, "teacher")

    def _learning_rate(self, method: Method) -> float:
        is_sampled = isinstance(method, PolicyGradientCallback)
        return self.recipe.sampled_learning_rate if is_sampled else self.recipe.learning_rate

    def _trainer(self, steps: int, callbacks: list[Callback], **settings: Any) -> lightning.Trainer:
        return lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=1,
            callbacks=[*callbacks, FiniteGuard(), StepIntervals(), RunProgressBar()],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            inference_mode=False,
            gradient_clip_val=1.0,
            val_check_interval=min(self.recipe.val_every, steps),
            default_root_dir=self.out,
            **settings,
        )

    def _data(self, steps: int) -> RolloutDataModule:
        """Return one epoch of so many steps, so that the progress bar shows the whole stage."""
        return RolloutDataModule(
            TRAIN_FILE,
            VAL_FILE,
            batch_size=self.recipe.batch_size,
            max_prompt_length=10,
            max_response_length=16,
            prompts_per_epoch=steps * self.recipe.batch_size,
            val_rollouts=self.recipe.val_rollouts,
            seed=self.seed,
        )

    def _optimization(self, learning_rate: float) -> dict[str, Any]:
        return {
            "learning_rate": learning_rate,
            "weight_decay": self.recipe.weight_decay,
            "warmup_steps": self.recipe.warmup_steps,
            "schedule": "cosine",
        }

    def _write(self, results: list[RunResult]) -> None:
        write_results(self.out / "results.json", results)
        write_metrics_csv(self.out / "metrics.csv", results)
        plot_curves(
            self.out / "learning_curve.png", results, title="Quickstart: running totals, val set"
        )

    def _answers(self, runs: list[tuple[str, list[str], list[str], list[str]]]) -> list[Answer]:
        """Return each problem's answers: the teacher's, and the student's before and after."""
        _, before, _, teacher = runs[0]
        return [
            Answer(
                prompt=example["prompt"],
                reference=example["response"],
                given=(
                    ("teacher", teacher[i]),
                    ("student before", before[i]),
                    *((f"after {label}", after[i]) for label, _, after, _ in runs),
                ),
            )
            for i, example in enumerate(load_rows(VAL_FILE)[: self.recipe.num_answers])
        ]

    def _say(self, text: str) -> None:
        self.console.print(Text(text, style="bold"))
