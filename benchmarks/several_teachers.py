"""One student of two teachers: an ensemble, each teacher alone, and a teacher for each row.

The teachers are babyllama-tok105 and babyllama-tok361-as-tok105 of ``--shared``, over one
vocabulary of 105 characters. The student has 3 of the 5 layers of the first one, and learns by KD
on dataset responses of TinyStories. Routed rows go to the two teachers in turn. Finished runs are
kept in the JSON file and not repeated; seeds are outermost. ``--cost`` measures the CPU time of a
step with each kind of teacher instead: also one from a cache, one whose weights are copied from
host memory for each pass (here within the host), and one with another tokenizer, which has the same
characters at other ids.

    python benchmarks/several_teachers.py --shared FOLDER --seeds 0 1
    python benchmarks/several_teachers.py --shared FOLDER --cost
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from okd_lightning import DistillationModule
from okd_lightning.callbacks import KD
from okd_lightning.data import RolloutDataModule
from okd_lightning.teachers import (
    CachedTeacher,
    ForeignTeacher,
    LoadedTeacher,
    RoutedTeachers,
    Teacher,
    TeacherEnsemble,
)
from okd_lightning.teachers.host_weights import HostWeights

RESULTS = Path(__file__).parent / "results" / "several_teachers.json"
FIRST, SECOND = "babyllama-tok105", "babyllama-tok361-as-tok105"
KEPT_LAYERS = (0, 2, 4)
ROWS, STEPS, LONGEST, VAL_ROWS = 8, 60, 64, 50
COST_STEPS, COST_ROUNDS = 8, 3

Make = Callable[[Path], Teacher | str]
"""From the folder of models to a teacher."""

KINDS: dict[str, Make] = {
    "tok105": lambda at: str(at / FIRST),
    "tok361": lambda at: str(at / SECOND),
    "mixture": lambda at: TeacherEnsemble([str(at / FIRST), str(at / SECOND)]),
    "product": lambda at: TeacherEnsemble([str(at / FIRST), str(at / SECOND)], None, "product"),
    "routed": lambda at: RoutedTeachers({"a": str(at / FIRST), "b": str(at / SECOND)}),
    "routed, one checkpoint": lambda at: RoutedTeachers(
        {"a": str(at / FIRST), "b": str(at / FIRST)}
    ),
}
FOREIGN = "babyllama-tok105-reversed"
OF_COST: dict[str, Make] = {
    **KINDS,
    "in host memory": lambda at: LoadedTeacher(str(at / FIRST), residence="host"),
    "cached": lambda at: CachedTeacher(str(at / FIRST), tempfile.mkdtemp()),
    "foreign, chunk": lambda at: ForeignTeacher(str(at / FIRST), str(at / FOREIGN), loss="chunk"),
    "foreign, text": lambda at: ForeignTeacher(str(at / FIRST), str(at / FOREIGN), loss="text"),
}
"""Kinds of which the cost is measured."""

ARMS = ("tok105", "tok361", "mixture", "product", "routed")
MEASURED = ("tok105", "tok361", "mixture")


class Clock(Callback):
    """CPU seconds of each training step, the teacher's included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start."""
        self._start = time.process_time()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop."""
        self.seconds.append(time.process_time() - self._start)


def save_reversed(tokenizer: Path, folder: Path) -> None:
    """Save a tokenizer of the same characters with the ids in reverse, but for the special ones."""
    shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((folder / "tokenizer.json").read_text())
    known = content["model"]["vocab"]
    special = {one["id"] for one in content["added_tokens"]}
    ids = [i for i in known.values() if i not in special]
    other = dict(zip(ids, reversed(ids), strict=True))
    content["model"]["vocab"] = {token: other.get(i, i) for token, i in known.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))


class Study:
    """Runs of one student.

    Args:
        shared: Folder with models/ and datasets/.
        root: Folder of the Trainer.
    """

    def __init__(self, shared: Path, root: Path) -> None:
        self.root, self.models = root, root / "models"
        self.models.mkdir()
        for name in (FIRST, SECOND):
            (self.models / name).symlink_to((shared / "models" / name).resolve())
        save_reversed(self.models / FIRST, self.models / FOREIGN)
        self.train, self.val = (
            self._rows(shared / "datasets" / "tinystories" / f"{name}.jsonl")
            for name in ("train", "val")
        )

    def _rows(self, path: Path) -> list[dict[str, str]]:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        short = [row for row in rows if len(row["prompt"]) < LONGEST]
        return [{**row, "of": "ab"[i % 2]} for i, row in enumerate(short)]

    def module(self, student: Any, kind: str) -> DistillationModule:
        """Return a student with a kind of teacher."""
        teacher, tokenizer = OF_COST[kind](self.models), str(self.models / FIRST)
        return DistillationModule(student, teacher, tokenizer=tokenizer, learning_rate=1e-3)

    def trainer(self, callbacks: list[Callback], steps: int = 0) -> lightning.Trainer:
        """Return a quiet Trainer."""
        return lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps or -1,
            max_epochs=-1,
            gradient_clip_val=1.0,
            limit_val_batches=0 if steps else 1.0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.root,
        )

    def data(self, kind: str, seed: int) -> RolloutDataModule:
        """Return the rows, with each one's teacher where it has one."""
        is_routed = kind.startswith("routed")
        return RolloutDataModule(
            self.train,
            self.val[:VAL_ROWS],
            batch_size=ROWS,
            max_prompt_length=LONGEST,
            max_response_length=LONGEST,
            val_rollouts=0,
            seed=seed,
            teacher_column="of" if is_routed else None,
        )

    def student(self) -> PreTrainedModel:
        """Return some layers of the first teacher."""
        whole = AutoModelForCausalLM.from_pretrained(self.models / FIRST)
        whole.config.num_hidden_layers = len(KEPT_LAYERS)
        model = type(whole)(whole.config)
        kept = {f"model.layers.{old}.": f"model.layers.{i}." for i, old in enumerate(KEPT_LAYERS)}
        weights = {
            name.replace(old, new): weight
            for name, weight in whole.state_dict().items()
            for old, new in (*kept.items(), ("", ""))
            if name.startswith(old) and (old or "layers" not in name)
        }
        model.load_state_dict(weights)
        return model

    def fit(self, kind: str, seed: int, steps: int) -> tuple[DistillationModule, Clock]:
        """Train a new student."""
        lightning.seed_everything(seed, verbose=False)
        module, clock = self.module(self.student(), kind), Clock()
        self.trainer([KD(), clock], steps).fit(module, self.data(kind, seed))
        return module, clock

    def run(self, arm: str, seed: int) -> dict[str, float]:
        """Return the trained student's measures on validation rows, in nats per character."""
        module, clock = self.fit(arm, seed, STEPS)
        found = {"cpu_seconds": round(sum(clock.seconds), 1)}
        for other in MEASURED:
            against = self.module(module.student, other)
            trainer = self.trainer([])
            (measures, *_) = trainer.validate(against, self.data(other, seed), verbose=False)
            found["cross_entropy"] = measures["val/cross_entropy"]
            found[f"teacher_cross_entropy, {other}"] = measures["val/teacher_cross_entropy"]
            found[f"forward_kl, {other}"] = measures["val/forward_kl"]
        return found

    def cost(self) -> dict[str, list[float]]:
        """Return CPU seconds of a step with each kind of teacher, the median of each round."""
        self.train = self.train[: COST_STEPS * ROWS]  # the rest is only tokenized
        HostWeights._is_host = staticmethod(lambda device: False)  # type: ignore[method-assign]
        found: dict[str, list[float]] = {kind: [] for kind in OF_COST}
        for seed in range(COST_ROUNDS):
            for kind, rounds in found.items():
                _, clock = self.fit(kind, seed, COST_STEPS)
                rounds.append(statistics.median(clock.seconds[1:]))
        return found


def key_of(arm: str, seed: int) -> str:
    """Return a run's key in the JSON file."""
    return f"{arm}, seed {seed}"


def table(runs: dict[str, Any], seeds: list[int]) -> Table:
    """Return means over seeds, and standard errors."""
    columns = ("cross_entropy", *(f"forward_kl, {kind}" for kind in MEASURED))
    shown = Table("learns from", *columns)
    for arm in ARMS:
        found = [runs[key] for seed in seeds if (key := key_of(arm, seed)) in runs]
        cells = []
        for column in columns if found else ():
            values = [one[column] for one in found]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
            cells.append(f"{statistics.fmean(values):.4f} ± {error:.4f}")
        shown.add_row(arm, *cells)
    return shown


def cost_table(cost: dict[str, list[float]]) -> Table:
    """Return milliseconds of a step, and the ratio to one teacher in the same round."""
    shown = Table("teacher", "ms per step", "relative to tok105")
    for kind, rounds in cost.items():
        ratios = [one / base for one, base in zip(rounds, cost["tok105"], strict=True)]
        ms = 1e3 * statistics.median(rounds)
        shown.add_row(kind, f"{ms:.0f}", f"{statistics.median(ratios):.2f}")
    return shown


def main() -> None:
    """Run what has not been run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder with models/ and datasets/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cost", action="store_true", help="measure the CPU time of a step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    runs, cost = known.get("runs", {}), known.get("cost", {})
    packages = ("torch", "lightning", "transformers")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}

    def keep() -> None:
        content = {"versions": versions, "runs": runs, "cost": cost}
        options.out.write_text(json.dumps(content, indent=1) + "\n")

    if options.shared:
        with tempfile.TemporaryDirectory() as root:
            study = Study(options.shared, Path(root))
            if options.cost:
                cost = study.cost()
                keep()
            for seed in [] if options.cost else options.seeds:
                for arm in ARMS:
                    if (key := key_of(arm, seed)) not in runs:
                        runs[key] = study.run(arm, seed)
                        keep()
                        print(key, runs[key], flush=True)
    console = Console(width=150)
    console.print(table(runs, options.seeds))
    if cost:
        console.print(cost_table(cost))


if __name__ == "__main__":
    main()
