"""Response length of a student and a teacher that stop with different ids, merged and not.

The models of ``--shared`` (75K student, 260K teacher) are trained on single sentences of
TinyStories, the student to stop with id 1 and the teacher with id 2. Reverse KL (GKD), OPD and OPD+
then train the student on on-policy responses, which stop at either id in both arms; "one outcome"
is the default, "by id" is ``end_tokens`` of the student's id alone. Finished runs are kept in the
JSON file and not repeated; seeds are outermost.

    python benchmarks/end_tokens.py --shared FOLDER --seeds 0 1 2 --picture docs/end_tokens.png
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from okd_lightning import DistillationModule
from okd_lightning.callbacks import GKD, OPD, SFT, DistillationCallback, OPDPlus
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ReverseKL

RESULTS = Path(__file__).parent / "results" / "end_tokens.json"
STUDENTS_END, TEACHERS_END = 1, 2
LONGEST, ROWS, SFT_STEPS, STEPS, EDGE = 40, 16, 200, 100, 10
METHODS = {
    "reverse KL (GKD)": lambda: GKD(divergence=ReverseKL(), on_policy_fraction=1.0),
    "OPD": OPD,
    "OPD+": OPDPlus,
}
ARMS = {"one outcome": None, "by id": [STUDENTS_END]}
COLOURS = {"one outcome": "tab:blue", "by id": "tab:red"}


class Lengths(Callback):
    """Mean length in tokens, and share that ended, of each optimizer step's responses."""

    def __init__(self) -> None:
        self.lengths: list[float] = []
        self.ended: list[float] = []

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the batch, which is one optimizer step."""
        lengths = (batch.lengths - batch.prompt_lengths).double()
        self.lengths.append(round(float(lengths.mean()), 3))
        ended = [reason == "eos" for reason in batch.stop_reasons]
        self.ended.append(sum(ended) / max(1, len(ended)))


class Pair:
    """The trained pair, and runs of it.

    Args:
        shared: Folder with models/ and datasets/.
        root: Folder of the Trainer.
    """

    def __init__(self, shared: Path, root: Path) -> None:
        self.root = root
        path = shared / "models" / "stories260K"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        lines = (shared / "datasets" / "tinystories" / "train.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        firsts = [(row["prompt"], row["response"].strip().partition(". ")[0]) for row in rows]
        self.rows = [{"prompt": p, "response": f"{r}."} for p, r in firsts if 10 < len(r) < 70]
        self.student = self._stopping(shared / "models" / "student75K", STUDENTS_END)
        self.teacher = self._stopping(path, TEACHERS_END)

    def _stopping(self, path: Path, end: int) -> PreTrainedModel:
        """Return a model after SFT on the sentences, each closed by ``end``."""
        model = AutoModelForCausalLM.from_pretrained(path)
        model.generation_config.eos_token_id = end
        module = self._module(model, None, None, learning_rate=1e-3)
        self._fit(module, SFT(), SFT_STEPS, seed=0)
        assert module.student is not None
        trained = module.student.eval()
        trained.generation_config.eos_token_id = end
        return trained

    def _module(
        self, student: Any, teacher: Any, end_tokens: list[int] | None, learning_rate: float
    ) -> DistillationModule:
        return DistillationModule(
            student,
            teacher,
            tokenizer=self.tokenizer,
            learning_rate=learning_rate,
            end_tokens=end_tokens,
        )

    def _fit(
        self, module: DistillationModule, method: DistillationCallback, steps: int, seed: int
    ) -> Lengths:
        lengths = Lengths()
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            callbacks=[method, lengths],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.root,
        )
        data = RolloutDataModule(
            self.rows,
            None,
            batch_size=ROWS,
            max_prompt_length=64,
            max_response_length=LONGEST,
            seed=seed,
        )
        lightning.seed_everything(seed, verbose=False)
        trainer.fit(module, data)
        return lengths

    def run(self, method: str, arm: str, seed: int) -> dict[str, Any]:
        """Return lengths and shares that ended, by optimizer step."""
        student = copy.deepcopy(self.student)
        student.generation_config.eos_token_id = [STUDENTS_END, TEACHERS_END]  # stops at either
        begin = time.process_time()
        module = self._module(student, self.teacher, ARMS[arm], learning_rate=1e-3)
        found = self._fit(module, METHODS[method](), STEPS, seed)
        seconds = round(time.process_time() - begin, 1)
        return {"lengths": found.lengths, "ended": found.ended, "cpu_seconds": seconds}


def key_of(method: str, arm: str, seed: int) -> str:
    """Return a run's key in the JSON file."""
    return f"{method}, {arm}, seed {seed}"


def run_all(shared: Path, seeds: list[int], runs: dict[str, Any], out: Path) -> None:
    """Run what has not been run, and write each run at once."""
    wanted = [(m, arm, seed) for seed in seeds for m in METHODS for arm in ARMS]
    missing = [one for one in wanted if key_of(*one) not in runs]
    if not missing:
        return
    packages = ("torch", "lightning", "transformers")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    with tempfile.TemporaryDirectory() as root:
        pair = Pair(shared, Path(root))
        for one in missing:
            runs[key_of(*one)] = found = pair.run(*one)
            out.write_text(json.dumps({"versions": versions, "runs": runs}) + "\n")
            print(key_of(*one), found["cpu_seconds"], _edges(found["lengths"]), flush=True)


def _edges(values: list[float]) -> tuple[float, float]:
    """Return the means of the first and the last steps."""
    return (
        round(sum(values[:EDGE]) / EDGE, 1),
        round(sum(values[-EDGE:]) / EDGE, 1),
    )


def table(runs: dict[str, Any], seeds: list[int]) -> Table:
    """Return lengths and shares that ended: the first and the last ten steps, each seed."""
    first, last = f"steps 1-{EDGE}", f"steps {STEPS - EDGE + 1}-{STEPS}"
    shown = Table("method", "ends", f"length, {first}", last, f"ended, {first}", last)
    for method in METHODS:
        for arm in ARMS:
            found = [runs[k] for s in seeds if (k := key_of(method, arm, s)) in runs]
            lengths = [_edges(one["lengths"]) for one in found]
            shares = [
                (sum(one["ended"][:EDGE]) / EDGE, sum(one["ended"][-EDGE:]) / EDGE) for one in found
            ]
            columns = [
                ", ".join(f"{pair[place]:{form}}" for pair in pairs)
                for pairs, form in ((lengths, ".1f"), (shares, ".2f"))
                for place in (0, 1)
            ]
            shown.add_row(method, arm, *columns)
    return shown


def draw(path: Path, runs: dict[str, Any], seeds: list[int]) -> None:
    """Draw the length over steps, one panel per method, one line per seed."""
    figure = Figure(figsize=(9.5, 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(METHODS), sharey=True)
    for axis, method in zip(axes, METHODS, strict=True):
        for arm in ARMS:
            found = [runs[k] for s in seeds if (k := key_of(method, arm, s)) in runs]
            for number, one in enumerate(found):
                values = torch.tensor(one["lengths"])
                smooth = values.unfold(0, 3, 1).mean(-1)
                steps = torch.arange(2, 2 + len(smooth))
                label = arm if number == 0 else None
                axis.plot(steps, smooth, color=COLOURS[arm], alpha=0.8, linewidth=1.2, label=label)
        axis.axhline(LONGEST, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=method, xlabel="optimizer step", ylim=(0, LONGEST + 3))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean response length, tokens")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what has not been run, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, help="folder with models/ and datasets/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--picture", type=Path, help="draw the lengths here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    known = json.loads(options.out.read_text()) if options.out.exists() else {}
    runs = known.get("runs", {})
    if options.shared:
        run_all(options.shared, options.seeds, runs, options.out)
    Console(width=150).print(table(runs, options.seeds))
    if options.picture:
        draw(options.picture, runs, options.seeds)


if __name__ == "__main__":
    main()
