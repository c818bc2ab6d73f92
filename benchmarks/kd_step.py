"""KD step with JSD(1/2) against TRL's GKD trainer: 16M <- 41M, V = 32000, 8 x 256 tokens.

Both train the same random Llamas on the same rows, off-policy, with AdamW and gradient clipping at
1, without gradient checkpointing. With ``--tied 4`` or 8 the bodies have as many layers, and head
and embedding are one matrix. With ``--shared FOLDER`` the rows have the lengths of GSM8K's
questions and answers, loss on the answers, and ours runs packed and padded. With ``--student`` and
``--teacher``, folders of a real pair, every step has the same 4 chats of GSM8K.

    python benchmarks/kd_step.py [--steps 5] [--dtype float32|bfloat16] [--shared FOLDER]
    OMP_NUM_THREADS=1 python benchmarks/kd_step.py --shared FOLDER --student S --teacher T
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import random_pair as pair
import real_pair
import torch
from real_pair import RealPair
from side_by_side import Turns, take_turns, write_results
from torch.nn.utils.rnn import pad_sequence

from okd_lightning.callbacks import KD
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import JensenShannon
from okd_lightning.training.module import DistillationModule

NUM_ROWS = 512


def lengths_of(shared: str | None) -> list[tuple[int, int]]:
    """Return the tokens of every row's prompt and response; by default 1 and 254."""
    if shared is None:
        return [(1, pair.LENGTH - 2)] * 64
    return pair.gsm8k_lengths(shared, NUM_ROWS)


def token_rows(shared: str | None) -> list[dict[str, Any]]:
    """Return the rows as ids, each with an eos."""
    lengths = lengths_of(shared)
    ids = pair.make_ids(len(lengths)).tolist()
    return [
        {"input_ids": [*row[: prompt + response], 1], "prompt_length": prompt}
        for row, (prompt, response) in zip(ids, lengths, strict=True)
    ]


def run_ours(options: argparse.Namespace, packing: bool = True) -> None:
    """Train with DistillationModule and Trainer."""
    method = KD(divergence=JensenShannon(0.5))
    real = real_pair_of(options)
    if real is not None:
        data = RolloutDataModule(
            real.rows(),
            batch_size=real_pair.BATCH,
            max_prompt_length=512,
            max_response_length=512,
            val_rollouts=0,
            as_chat=True,
            prompt_column="question",
            response_column="answer",
        )
        module = DistillationModule(
            real.student, real.teacher, learning_rate=pair.LEARNING_RATE, packing=packing
        )
        pair.fit_in_turns(module, data, [method])
    else:
        lengths, tied = lengths_of(options.shared), options.tied
        pair.train_in_turns(method, options.dtype, lengths, packing=packing, tied=tied)


def run_ours_padded(options: argparse.Namespace) -> None:
    """Train with ours without packing."""
    run_ours(options, packing=False)


def trl_batch(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate rows of ids for TRL's trainer: padded on the right, with loss on the responses."""
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])[:, None]
    prompt_lengths = torch.tensor([row["prompt_length"] for row in rows])[:, None]
    places = torch.arange(ids.shape[1])
    seen = places < lengths
    labels = ids.masked_fill(~seen | (places < prompt_lengths), -100)
    return {
        "input_ids": ids,
        "attention_mask": seen.long(),
        "labels": labels,
        "prompts": ids[:, :1],
        "prompt_attention_mask": seen[:, :1].long(),
    }


def run_trl(options: argparse.Namespace) -> None:
    """Train with TRL's GKDTrainer on dataset responses (lmbda 0)."""
    from datasets import Dataset  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl.experimental.gkd import GKDConfig, GKDTrainer  # noqa: PLC0415

    turns = Turns()

    class InTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.next()

    number_format, real = getattr(torch, options.dtype), real_pair_of(options)
    models = [
        pair.make_model(role, number_format, options.tied) if real is None else real.model(role)
        for role in ("student", "teacher")
    ]
    with tempfile.TemporaryDirectory() as root:
        GKDTrainer(
            model=models[0],
            teacher_model=models[1],
            args=GKDConfig(
                output_dir=root,
                per_device_train_batch_size=pair.BATCH if real is None else real_pair.BATCH,
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
                max_length=pair.LENGTH if real is None else 1024,
            ),
            data_collator=trl_batch,
            train_dataset=Dataset.from_list(
                token_rows(options.shared) if real is None else real.token_rows()
            ),
            processing_class=pair.make_tokenizer() if real is None else real.tokenizer,
            callbacks=[InTurns()],
        ).train()


def real_pair_of(options: argparse.Namespace) -> RealPair | None:
    """Return the real pair of the options, or None for the random one."""
    if options.student is None:
        return None
    return RealPair(options.student, options.teacher, options.shared)


CONTENDERS = {"ours": run_ours, "ours, padded": run_ours_padded, "trl": run_trl}


def main() -> None:
    """Measure all contenders, or run as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tied", type=int, choices=[0, 4, 8], default=0, help="layers, tied heads")
    parser.add_argument("--shared", help="folder that holds data/; for rows of GSM8K's lengths")
    parser.add_argument("--student", help="folder of a real student; float32")
    parser.add_argument("--teacher", help="folder of its teacher")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    options = parser.parse_args()
    if options.contender:
        CONTENDERS[options.contender](options)
        return
    given = {name: getattr(options, name) for name in ("dtype", "shared", "student", "teacher")}
    given["tied"] = str(options.tied)
    more = [word for name, value in given.items() if value for word in (f"--{name}", value)]
    names = [n for n in options.only if options.shared or n != "ours, padded"]
    found = take_turns(__file__, {name: [name, *more] for name in names}, options.steps)
    ratios = {
        f"{measure}_of_{name}_over_ours": round(
            found[name][f"median_{measure}"] / found["ours"][f"median_{measure}"], 2
        )
        for name in names[1:]
        for measure in ("seconds", "cpu_seconds")
    }
    tied = f"_tied{options.tied}" if options.tied else ""
    kind = "_real" if options.student else "_gsm8k" if options.shared else ""
    write_results(f"kd_step_{options.dtype}{kind}{tied}", {**ratios, "contenders": found})


if __name__ == "__main__":
    main()
