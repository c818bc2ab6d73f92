"""Comparison of two run folders: weights bit for bit, tables, files; without wall-clock numbers."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import torch

from okd_lightning.training.loop_state import STOPPED

TIMINGS = {"train/seconds", "train/tokens_per_second", "rollout/seconds"}
TIMINGS |= {"rollout/tokens_per_second"}
CLOCKS = {"seconds", "cpu_seconds", "rollout_seconds"}


def differences(one: Path, other: Path) -> list[str]:
    """Return the differences of two run folders, except wall-clock numbers."""
    found = []
    for name, read in (
        ("metrics.csv", read_metrics),
        ("rollouts.jsonl", Path.read_text),
        ("checkpoints/last.ckpt", read_checkpoint),
    ):
        is_there = [(folder / name).exists() for folder in (one, other)]
        if not all(is_there):
            found += [f"{other / name}: exists {is_there}"] if any(is_there) else []
            continue
        first, second = read(one / name), read(other / name)
        found += [f"{other / name}: {what}" for what in unequal(first, second)][:3]
    files = [kept_files(folder) for folder in (one, other)]
    more = [name for name in files[1] if name not in files[0]]
    is_same = not set(files[0]) - set(files[1]) and all(map(_MORE.match, more))
    return found + ([] if is_same else [f"{other}: files {files}"])


_MORE = re.compile(r"last-step$|best-step=")
"""A run that was stopped keeps a checkpoint of there, and the one from which it was resumed."""


def kept_files(folder: Path) -> list[str]:
    """Names of the checkpoints; one that was written where a run was stopped has another step."""
    return sorted(
        re.sub(r"last-step=\d+", "last-step", path.name).removesuffix(".ckpt")
        for path in folder.glob("checkpoints/*")
    )


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and k not in TIMINGS} for row in rows]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Without the clock, and without the folder, which is another one's."""
    state = torch.load(path, weights_only=True)
    for own in state["callbacks"].values():
        if "best_k_models" in own:
            best = own.pop("best_k_models")
            own["best"] = {Path(name).name: float(value) for name, value in best.items()}
            for name in (
                "current_score",
                "best_model_path",
                "kth_best_model_path",
                "dirpath",
                "last_model_path",
            ):
                own.pop(name)
    state["callbacks"].pop("Timer", None)
    stopped = state.pop(STOPPED, {})  # a run that was stopped at its last step has ended
    state["due"] = bool(stopped.get("validation_is_due"))
    counters = state["callbacks"]["Throughput"]
    state["callbacks"]["Throughput"] = {k: v for k, v in counters.items() if k not in CLOCKS}
    row = state["okd_lightning"]["row"] or {}
    state["okd_lightning"]["row"] = {k: v for k, v in row.items() if k not in TIMINGS}
    del state["okd_lightning"]["started_in"], state["okd_lightning"]["signature"]
    del state["loops"]  # counters of validation batches and the like, which Lightning resets
    return state


def unequal(one: Any, other: Any, at: str = "") -> list[str]:
    """Return the places where two nested values differ; tensors are compared bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{at} differs"]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{at} has {sorted(map(str, one.keys() ^ other.keys()))} on one side alone"]
        return [what for key in one for what in unequal(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{at} has {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [what for i, (a, b) in pairs for what in unequal(a, b, f"{at}[{i}]")]
    is_nan = one != one and other != other
    return [] if one == other or is_nan else [f"{at} is {one!r} and {other!r}"]
