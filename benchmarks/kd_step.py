"""A KD step with JSD(1/2) against TRL's GKD trainer: 16M <- 41M, V = 32000, 8 x 256 tokens.

Both train the same random Llamas on the same rows, off-policy, with AdamW and gradient clipping at
1, without gradient checkpointing.

    python benchmarks/kd_step.py [--steps 5] [--dtype float32|bfloat16]
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import random_pair as pair
import torch
from side_by_side import Turns, take_turns, write_results

from okd_lightning.callbacks import KD
from okd_lightning.divergences import JensenShannon


def run_ours(dtype: str) -> None:
    """DistillationModule and Trainer."""
    pair.train_in_turns(KD(divergence=JensenShannon(0.5)), dtype)


def run_trl(dtype: str) -> None:
    """TRL's GKDTrainer on given rows (lmbda 0)."""
    from datasets import Dataset  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: PLC0415

    turns = Turns()

    class InTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.next()

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        labels = ids.clone()
        labels[:, 0] = -100
        seen = torch.ones_like(ids)
        return {
            "input_ids": ids,
            "attention_mask": seen,
            "labels": labels,
            "prompts": ids[:, :1],
            "prompt_attention_mask": seen[:, :1],
        }

    number_format = getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as root:
        GKDTrainer(
            model=pair.make_model("student", number_format),
            teacher_model=pair.make_model("teacher", number_format),
            args=GKDConfig(
                output_dir=root,
                per_device_train_batch_size=pair.BATCH,
                max_steps=pair.STEPS,
                learning_rate=pair.LEARNING_RATE,
                max_grad_norm=pair.CLIP_NORM,
                lr_scheduler_type="constant",
                lmbda=0.0,
                beta=0.5,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                logging_steps=pair.STEPS,
                save_strategy="no",
                disable_tqdm=True,
                max_length=pair.LENGTH,
            ),
            data_collator=collate,
            train_dataset=Dataset.from_list(
                [{"input_ids": [*ids, 1]} for ids in pair.make_ids(64).tolist()]
            ),
            processing_class=pair.make_tokenizer(),
            callbacks=[InTurns()],
        ).train()


CONTENDERS = {"ours": run_ours, "trl": run_trl}


def main() -> None:
    """Measure both, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if options.contender:
        CONTENDERS[options.contender](options.dtype)
        return
    arguments = {name: [name, "--dtype", options.dtype] for name in CONTENDERS}
    found = take_turns(__file__, arguments, options.steps)
    speedup = found["trl"]["median_seconds"] / found["ours"]["median_seconds"]
    name = f"kd_step_{options.dtype}"
    write_results(name, {"steps_per_second_over_trl": round(speedup, 2), "contenders": found})


if __name__ == "__main__":
    main()
