"""When does a teacher that learns help? OKD beside KD, reverse KD and GKD, through the public API.

Three tasks: ``tinystories`` (75K student, 260K teacher that was pretrained on it), ``arithmetic``
(the quickstart's student after its warm start, and its teacher, which is trained on the task) and
``gsm8k`` (the models of the first on short word problems, which neither has ever seen). All
divergences are to the *base* teacher, on held-out rows. Finished runs are kept in the JSON file and
not repeated.

    python benchmarks/okd.py --shared FOLDER [--stage main ablation controls shift] [--task ...]
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    SFT,
    DistillationCallback,
    ExactMatch,
    PaperMeasures,
)
from okd_lightning.data import RolloutDataModule, load_rows
from okd_lightning.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from okd_lightning.module import DistillationModule
from okd_lightning.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe

RESULTS = Path(__file__).parent / "results" / "okd.json"
ALPHAS = (0.0, 0.1, 0.3, 0.5)
RATES = (1.0, 0.1, 0.01)
DIVERGENCES: dict[str, Callable[[], Divergence]] = {
    "forward KL": ForwardKL,
    "reverse KL": ReverseKL,
    "JSD": lambda: JensenShannon(0.5),
}


@dataclass(frozen=True)
class Arm:
    """One run: a method on a task.

    Attributes:
        stage: The table it belongs to.
        task: "tinystories" or "arithmetic".
        name: Of the method with its settings.
        method: Builds it, given the student's learning rate.
        steps: Optimizer steps.
        seed: Of the data order and the online module.
        adapts_first: The teacher learns the data's responses alone in a first run of as many steps
            (OKD with α = 0), and teaches a fresh student in a second one.
    """

    stage: str
    task: str
    name: str
    method: Callable[[float], DistillationCallback] = field(compare=False)
    steps: int = 200
    seed: int = 0
    adapts_first: bool = False

    @property
    def key(self) -> str:
        """Under which the run is kept."""
        return f"{self.task} / {self.name} / {self.steps} steps / seed {self.seed}"


def okd(alpha: float, rate: float, **settings: Any) -> Callable[[float], DistillationCallback]:
    """OKD with a module learning rate relative to the student's."""
    return lambda student_rate: OKD(alpha=alpha, learning_rate=rate * student_rate, **settings)


def kd(divergence: Callable[[], Divergence]) -> Callable[[float], DistillationCallback]:
    """KD with a divergence."""
    return lambda _: KD(divergence=divergence())


def baselines(stage: str, task: str, steps: int, seed: int) -> Iterator[Arm]:
    """The methods without an online module."""
    arms: dict[str, Callable[[float], DistillationCallback]] = {
        "SFT": lambda _: SFT(),
        "KD": lambda _: KD(),
        "reverse KD": lambda _: KD(divergence=ReverseKL()),
        "GKD": lambda _: GKD(divergence=ReverseKL(), on_policy_fraction=1.0),
    }
    for name, method in arms.items():
        yield Arm(stage, task, name, method, steps, seed)


def main_arms(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Baselines, and OKD over α and the module's learning rate."""
    yield from baselines("main", task, steps, seed)
    for rate in RATES:
        for alpha in ALPHAS:
            name = f"OKD α={alpha:g} rate×{rate:g}"
            yield Arm("main", task, name, okd(alpha, rate), steps, seed)


def ablation_arms(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """Table V in small: three divergences with and without the online module."""
    for name, divergence in DIVERGENCES.items():
        label = {"forward KL": "KD", "reverse KL": "reverse KD"}.get(name, f"{name} KD")
        yield Arm("ablation", task, label, kd(divergence), steps, seed)
        for alpha in (0.3, 0.5):
            label = f"OKD α={alpha:g} rate×1" + (f" {name}" if name != "forward KL" else "")
            adaptive = okd(alpha, 1.0, divergence=divergence())
            yield Arm("ablation", task, label, adaptive, steps, seed)


class Tasks:
    """Models and data of the three tasks.

    Args:
        shared: Folder with models/student75K, models/stories260K and datasets/.
        root: Where Trainers may write.
    """

    def __init__(self, shared: Path, root: Path) -> None:
        self.models, self.datasets, self.root = shared / "models", shared / "datasets", root
        self.recipe = Recipe()
        self._warm: dict[int, PreTrainedModel] = {}

    def run(self, arm: Arm) -> dict[str, float]:
        """Train and measure; every measure of the last validation, and the training's seconds."""
        lightning.seed_everything(arm.seed, verbose=False)
        module, data, monitors = getattr(self, f"_{arm.task}")(arm)
        start = time.perf_counter()
        if arm.adapts_first:
            adapting = OKD(alpha=0.0)
            self._trainer(arm.steps, [adapting], limit_val_batches=0).fit(module, data)
            module = DistillationModule(
                module.student_source, module.teacher, learning_rate=module.learning_rate
            )
        method = arm.method(module.learning_rate)
        self._trainer(arm.steps, [method], limit_val_batches=0).fit(module, data)
        seconds = time.perf_counter() - start
        trainer = self._trainer(arm.steps, [method, *monitors])
        trainer.validate(module, data, verbose=False)
        measured = {n: round(float(v), 5) for n, v in trainer.callback_metrics.items()}
        return {"seconds": round(seconds, 2), **measured}

    def _tinystories(
        self, arm: Arm
    ) -> tuple[DistillationModule, RolloutDataModule, list[Callback]]:
        module = DistillationModule(
            str(self.models / "student75K"), str(self.models / "stories260K"), learning_rate=1e-3
        )
        data = RolloutDataModule(
            str(self.datasets / "tinystories" / "train.jsonl"),
            str(self.datasets / "tinystories" / "val.jsonl"),
            batch_size=16,
            max_prompt_length=48,
            max_response_length=112,
            val_rollouts=50,
            seed=arm.seed,
        )
        return module, data, [PaperMeasures(num_prompts=50)]

    def _gsm8k(self, arm: Arm) -> tuple[DistillationModule, RolloutDataModule, list[Callback]]:
        """Short problems, so that a row of 512-token BPE fits."""
        module = DistillationModule(
            str(self.models / "student75K"), str(self.models / "stories260K"), learning_rate=1e-3
        )
        parts = [
            [
                {"prompt": row["question"], "response": row["answer"]}
                for row in load_rows(str(self.datasets / "gsm8k" / f"{part}.jsonl"))
                if len(row["question"]) <= 150 and len(row["answer"]) <= 160
            ]
            for part in ("train", "test")
        ]
        data = RolloutDataModule(
            *parts,
            batch_size=16,
            max_prompt_length=120,
            max_response_length=128,
            val_rollouts=20,
            seed=arm.seed,
        )
        return module, data, [PaperMeasures(num_prompts=20)]

    def _arithmetic(self, arm: Arm) -> tuple[DistillationModule, RolloutDataModule, list[Callback]]:
        recipe = self.recipe
        if arm.seed not in self._warm:
            self._warm[arm.seed] = self._warm_start(arm.seed)
        lightning.seed_everything(arm.seed, verbose=False)
        module = DistillationModule(
            copy.deepcopy(self._warm[arm.seed]),
            str(TEACHER_DIR),
            tokenizer=str(TEACHER_DIR),
            **self._optimization(recipe.learning_rate),
        )
        return module, self._problems(arm), [ExactMatch(), PaperMeasures(num_prompts=128)]

    def _warm_start(self, seed: int) -> PreTrainedModel:
        """The quickstart's student; kept beside the runs."""
        recipe = self.recipe
        lightning.seed_everything(seed, verbose=False)
        module = DistillationModule(
            recipe.student_config,
            tokenizer=str(TEACHER_DIR),
            **self._optimization(recipe.warm_learning_rate),
        )
        arm = Arm("warm", "arithmetic", "SFT", lambda _: SFT(), recipe.warm_steps, seed)
        trainer = self._trainer(arm.steps, [SFT()], limit_val_batches=0)
        trainer.fit(module, self._problems(arm))
        assert module.student is not None
        return module.student

    def _problems(self, arm: Arm) -> RolloutDataModule:
        return RolloutDataModule(
            TRAIN_FILE,
            VAL_FILE,
            batch_size=self.recipe.batch_size,
            max_prompt_length=10,
            max_response_length=16,
            prompts_per_epoch=arm.steps * self.recipe.batch_size,
            val_rollouts=self.recipe.val_rollouts,
            seed=arm.seed,
        )

    def _optimization(self, learning_rate: float) -> dict[str, Any]:
        return {
            "learning_rate": learning_rate,
            "weight_decay": self.recipe.weight_decay,
            "warmup_steps": self.recipe.warmup_steps,
            "schedule": "cosine",
        }

    def _trainer(self, steps: int, callbacks: list[Callback], **settings: Any) -> lightning.Trainer:
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


COLUMNS = {
    "fwd KL": "val/forward_kl",
    "rev KL": "val/reverse_kl",
    "on-policy rev KL": "val/on_policy_reverse_kl",
    "CE": "val/cross_entropy",
    "agree": "val/agreement",
    "ExAccErr %": "val/excess_accumulated_error",
    "ROUGE-L": "val/rouge_l",
    "exact": "val/exact_match",
    "base CE": "val/teacher_cross_entropy",
    "teacher CE": "val/adapted_teacher_cross_entropy",
    "s": "seconds",
}


def controls_arms(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """What softens a certain teacher without learning (τ), and α beyond one half."""
    yield Arm("controls", task, "KD", lambda _: KD(), steps, seed)
    for alpha in (0.5, 0.7, 0.9):
        yield Arm("controls", task, f"OKD α={alpha:g} rate×1", okd(alpha, 1.0), steps, seed)
    yield Arm("controls", task, "KD τ=2", lambda _: KD(temperature=2.0), steps, seed)
    yield Arm("controls", task, "KD τ=4", lambda _: KD(temperature=4.0), steps, seed)


def shift_arms(task: str, steps: int, seed: int) -> Iterator[Arm]:
    """For a teacher that does not know the task: what holds it to the data, and what else would."""
    yield Arm("shift", task, "SFT", lambda _: SFT(), steps, seed)
    yield Arm("shift", task, "KD", lambda _: KD(), steps, seed)
    mixed = "KD + CE (w=0.5)"
    yield Arm("shift", task, mixed, lambda _: KD(cross_entropy_weight=0.5), steps, seed)
    for alpha, rate in ((0.0, 1.0), (0.1, 1.0), (0.5, 1.0), (0.1, 0.1)):
        name = f"OKD α={alpha:g} rate×{rate:g}"
        yield Arm("shift", task, name, okd(alpha, rate), steps, seed)
    first = "KD, teacher adapted first"
    yield Arm("shift", task, first, lambda _: KD(), steps, seed, adapts_first=True)


TASKS = ("tinystories", "arithmetic", "gsm8k")
STAGES = {
    "main": main_arms,
    "ablation": ablation_arms,
    "controls": controls_arms,
    "shift": shift_arms,
}


def table(results: dict[str, dict[str, float]], arms: list[Arm]) -> Table:
    """Means over seeds, one row a method."""
    first = arms[0]
    shown = Table(title=f"{first.stage}: {first.task}, {first.steps} steps", expand=False)
    for name in ("method", "seeds", *COLUMNS):
        shown.add_column(name, no_wrap=True)
    for name in dict.fromkeys(arm.name for arm in arms):
        runs = [results[arm.key] for arm in arms if arm.name == name and arm.key in results]
        if runs:
            cells = [_mean(runs, key) for key in COLUMNS.values()]
            shown.add_row(name, str(len(runs)), *cells)
    return shown


def _mean(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    return f"{statistics.mean(values):.3f}" if values else ""


def main() -> None:
    """Run what has not been run, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shared", type=Path, required=True, help="folder with models/ and datasets/"
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--task", nargs="+", default=["tinystories"], choices=TASKS)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=(), help="names of runs; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = (
        json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.out.exists() else {}
    )
    tables = []
    with tempfile.TemporaryDirectory() as root:
        tasks = Tasks(options.shared, Path(root))
        for stage in options.stage:
            for task in options.task:
                arms = [
                    arm
                    for seed in range(options.seeds)
                    for arm in STAGES[stage](task, options.steps, seed)
                    if not options.only or arm.name in options.only
                ]
                for arm in arms:
                    if arm.key not in results:
                        results[arm.key] = tasks.run(arm)
                        _write(options.out, results)
                        _say(arm, results[arm.key])
                tables.append(table(results, arms))
    for shown in tables:
        Console(width=200).print(shown)


def _say(arm: Arm, measured: dict[str, float]) -> None:
    values = {label: measured.get(key) for label, key in COLUMNS.items()}
    print(arm.key, {label: v for label, v in values.items() if v is not None}, flush=True)


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "lightning", "transformers", "peft", "torchmetrics")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    content = {"versions": versions, "runs": results}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
