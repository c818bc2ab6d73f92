"""Training from a teacher's cache against training with the teacher: step, memory, quality.

Step and memory are measured on ``kd_step``'s pair, 16M <- 41M, V = 32000, 8 x 256 tokens. With
``--models`` quality is measured on a trained pair: the same steps with the teacher and from its
cache, both followed by a validation with the teacher.

    python benchmarks/teacher_cache.py [--steps 5] [--dtype float32|bfloat16]
    python benchmarks/teacher_cache.py --models STUDENT TEACHER --data TRAIN.jsonl VAL.jsonl
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

import lightning
import random_pair as pair
import torch
from side_by_side import NUM_THREADS, take_turns, write_results

from okd_lightning.callbacks import KD
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, TopK
from okd_lightning.teachers import CachedTeacher, Teacher
from okd_lightning.training.module import DistillationModule

DIVERGENCES: dict[str, Divergence] = {
    "forward KL": ForwardKL(),
    "JSD": JensenShannon(0.5),
    "reverse KL": ReverseKL(),
}
QUALITY_STEPS = 200


def contend(name: str, dtype: str, folder: str) -> None:
    """Run one step per turn: with the teacher, with the teacher through TopK, or from the cache."""
    divergence: Divergence = ForwardKL()
    if name == "top-k":
        divergence = TopK(divergence, 48)
    teacher: str | Teacher = f"{folder}/teacher"
    if name == "cached":
        teacher = CachedTeacher(f"{folder}/teacher", f"{folder}/cache", k=48)
    pair.train_in_turns(KD(divergence=divergence), dtype, teacher)


def measure_steps(steps: int, dtype: str) -> dict[str, Any]:
    """Return medians and peaks of all contenders, in turns; the cache is written before."""
    with tempfile.TemporaryDirectory() as folder:
        pair.make_model("teacher", getattr(torch, dtype)).save_pretrained(f"{folder}/teacher")
        pair.make_tokenizer().save_pretrained(f"{folder}/teacher")
        about = ["--dtype", dtype, "--folder", folder]
        written = take_turns(__file__, {"writing": ["cached", *about]}, steps=1)["writing"]
        names = ("live", "top-k", "cached")
        found = take_turns(__file__, {name: [name, *about] for name in names}, steps)
    live, cached = found["live"], found["cached"]
    return {
        "steps_per_second_over_live": round(live["median_seconds"] / cached["median_seconds"], 2),
        "cpu_time_of_live": round(cached["median_cpu_seconds"] / live["median_cpu_seconds"], 2),
        "peak_mb_less": round(live["peak_mb"] - cached["peak_mb"], 1),
        "peak_mb_writing": written["peak_mb"],
        "contenders": found,
    }


def train(
    models: tuple[str, str],
    data: tuple[str, str],
    divergence: Divergence,
    cache: Mapping[str, Any] | None,
) -> dict[str, float]:
    """Train some steps of KD; return a validation with the teacher, and the training's seconds."""
    lightning.seed_everything(0, verbose=False)
    student, teacher = models
    given = teacher if cache is None else CachedTeacher(teacher, **cache)
    module = DistillationModule(student, given, learning_rate=1e-3)
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    settings |= {"accelerator": "cpu", "gradient_clip_val": 1.0}

    def loaders() -> RolloutDataModule:
        lengths = {"max_prompt_length": 48, "max_response_length": 112}
        return RolloutDataModule(*data, batch_size=16, val_rollouts=0, seed=0, **lengths)

    trainer = lightning.Trainer(
        callbacks=[KD(divergence=divergence)],
        max_steps=QUALITY_STEPS,
        limit_val_batches=0,
        max_epochs=-1,
        **settings,
    )
    start, cpu_start = time.perf_counter(), time.process_time()
    trainer.fit(module, loaders())
    seconds = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu_start}
    measured = lightning.Trainer(**settings).validate(module, loaders(), verbose=False)[0]
    return {name: round(value, 4) for name, value in {**measured, **seconds}.items()}


def measure_quality(models: tuple[str, str], data: tuple[str, str]) -> dict[str, Any]:
    """Compare the same steps with the teacher and from its cache, for several divergences."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(NUM_THREADS)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        caches: dict[str, dict[str, Any] | None] = {"live": None}
        caches |= {name: {"folder": folder} for name in ("cached", "cached again")}
        caches["cached, float32"] = {"folder": f"{folder}/32", "dtype": "float32"}
        caches["cached, k = 128"] = {"folder": f"{folder}/128", "k": 128}
        for name, divergence in DIVERGENCES.items():
            found[name] = {}
            for kind, cache in caches.items():
                found[name][kind] = train(models, data, divergence, cache)
                print(name, kind, found[name][kind], flush=True)
    return found


def main() -> None:
    """Measure, or run as a contender."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--models", nargs=2, metavar=("STUDENT", "TEACHER"))
    parser.add_argument("--data", nargs=2, metavar=("TRAIN", "VAL"))
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, options.dtype, options.folder)
    elif options.models:
        found = measure_quality(tuple(options.models), tuple(options.data))
        write_results("teacher_cache_quality", {"steps": QUALITY_STEPS, "runs": found})
    else:
        name = "teacher_cache" + ("" if options.dtype == "float32" else f"_{options.dtype}")
        write_results(name, measure_steps(options.steps, options.dtype))


if __name__ == "__main__":
    main()
