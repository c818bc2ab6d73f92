"""Time and memory on an accelerator, and the results file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "results"
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bf16, from the makers' data sheets; MFU is relative to these."""


def the_device() -> torch.device:
    """Return the accelerator, else the CPU (to test a script, at small sizes)."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator or torch.device("cpu")


def measure(step: Callable[[], object], steps: int, warmup: int = 2) -> dict[str, float]:
    """Return median and fastest milliseconds of a step, and its peak memory above the start."""
    for _ in range(warmup):
        step()
    _finish()
    before = _allocated()
    if the_device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        _finish()
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() if the_device().type == "cuda" else 0
    return {
        "median_ms": round(statistics.median(times), 2),
        "fastest_ms": round(min(times), 2),
        "extra_mib": round(max(0, peak - before) / 2**20, 1),
        "peak_mib": round(peak / 2**20, 1),
    }


def mfu(flops: float, milliseconds: float) -> float | None:
    """Return a step's operations as a share of the device's peak; None where that is unknown."""
    name = torch.cuda.get_device_name() if the_device().type == "cuda" else ""
    peaks = [peak for key, peak in PEAK_TFLOPS.items() if key in name]
    return round(flops / (milliseconds * 1e-3) / (peaks[0] * 1e12), 3) if peaks else None


def write(name: str, content: dict[str, Any]) -> None:
    """Print the figures, and write them to a file if they come from an accelerator."""
    is_real = the_device().type != "cpu"
    machine = {
        "device": torch.cuda.get_device_name() if the_device().type == "cuda" else "cpu",
        **{package: version(package) for package in ("torch", "transformers")},
    }
    text = json.dumps({"machine": machine, **content}, indent=1)
    print(text)
    if is_real:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"gpu_{name}.json").write_text(text + "\n", encoding="utf-8")


def _finish() -> None:
    if the_device().type != "cpu":
        torch.accelerator.synchronize()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if the_device().type == "cuda" else 0
