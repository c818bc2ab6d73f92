"""OKD step relative to a KD step on the pair of ``kd_step``, and memory of each option.

python benchmarks/okd_step.py [--steps 5]
"""

from __future__ import annotations

import argparse
from typing import Any

import random_pair as pair
from peft import LoraConfig
from side_by_side import take_turns, write_results

from okd_lightning.callbacks import KD, OKD


def lora() -> LoraConfig:
    """Return an adapter for the student, whose other weights (the head too) are frozen."""
    return LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])


RUNS: dict[str, dict[str, Any]] = {
    "KD": {"method": KD},
    "OKD": {"method": OKD},
    "KD, gradient checkpointing": {"method": KD, "gradient_checkpointing": True},
    "KD, LoRA student": {"method": KD, "student_adapter": lora},
    "OKD, LoRA student": {"method": OKD, "student_adapter": lora},
}


def run(method: Any, student_adapter: Any = None, **settings: Any) -> None:
    """Run one step per turn."""
    adapter = student_adapter() if student_adapter is not None else None
    pair.train_in_turns(method(), student_adapter=adapter, **settings)


def main() -> None:
    """Measure all runs, or run as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if options.contender:
        run(**RUNS[options.contender])
        return
    found = take_turns(__file__, {name: [name] for name in RUNS}, options.steps)
    ratio = found["OKD"]["median_seconds"] / found["KD"]["median_seconds"]
    write_results("okd_step", {"okd_over_kd": round(ratio, 3), "contenders": found})


if __name__ == "__main__":
    main()
