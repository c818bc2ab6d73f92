"""Rollout engine against transformers' ``generate``, and an on-policy epoch against TRL's.

Pairs: ``random`` (Llamas of 16M and 41M parameters, V = 32000, with a bias on the stop token so
that lengths vary), ``tied4`` and ``tied8`` (as large, with deeper bodies, tied heads and responses
that all reach the limit) and ``tinystories`` (75K and 260K parameters, trained on stories). Both
sides have the same prompts, limits, batch of 8 and float32; a turn is all prompts once.

    python benchmarks/rollouts.py [--what write epoch] [--pair random] [--shared FOLDER] [--turns 3]
    python benchmarks/rollouts.py --what epoch --pair tied4 tied8 --prompts 8 --limit 192
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import random_pair
import torch
from lightning.pytorch.callbacks import Callback
from side_by_side import RESULTS, Turns, take_turns, write_results
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from okd_lightning.callbacks import GKD
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import JensenShannon
from okd_lightning.engines import NoiseStream, Sampling, TransformersEngine
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import PromptBatch
from okd_lightning.training.module import DistillationModule

BATCH, EOS, MANY = 8, 1, 1_000_000
MEAN_SHARE = 0.6  # of the limit, for a response that is not cut
PAIRS = {"random": 0, "tied4": 4, "tied8": 8, "tinystories": None}  # layers of a tied random pair


class Pair:
    """Models, tokenizer and prompts of a benchmark.

    Args:
        name: Key of PAIRS.
        shared: Folder with the small trained models and their data.
        num_prompts: Prompts per turn.
        limit: Longest response, in tokens.
    """

    def __init__(self, name: str, shared: str, num_prompts: int, limit: int) -> None:
        self.num_prompts, self.limit = num_prompts, limit
        self._is_random, self._tied = name != "tinystories", PAIRS[name] or 0
        if self._is_random:
            self.tokenizer: Any = random_pair.make_tokenizer()
            generator = torch.Generator().manual_seed(3)
            lengths = torch.randint(10, 60, (num_prompts,), generator=generator).tolist()
            words = [torch.randint(3, 31000, (n,), generator=generator).tolist() for n in lengths]
            self.prompts = [" ".join(f"t{i}" for i in row) for row in words]
        else:
            self._models = Path(shared) / "models"
            self.tokenizer = AutoTokenizer.from_pretrained(self._models / "stories260K")
            rows = Path(shared, "datasets/tinystories/train.jsonl").read_text(encoding="utf-8")
            lines = rows.splitlines()[:num_prompts]
            self.prompts = [json.loads(line)["prompt"] for line in lines]

    @property
    def prompt_ids(self) -> list[list[int]]:
        """The prompts as ids."""
        return [self.tokenizer(text, add_special_tokens=False).input_ids for text in self.prompts]

    @property
    def eos_id(self) -> int:
        """Id that ends a response."""
        return EOS if self._is_random else int(self.tokenizer.eos_token_id)

    def model(self, role: str) -> PreTrainedModel:
        """Return student or teacher. Random ones stop equally often everywhere, tied ones never."""
        if not self._is_random:
            folder = self._models / ("student75K" if role == "student" else "stories260K")
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = random_pair.make_model(role, tied=self._tied)
        head = model.lm_head
        biased = nn.Linear(head.in_features, head.out_features)
        biased.weight = head.weight
        with torch.no_grad():
            biased.weight[EOS] = 0
            probe = torch.randint(3, 1000, (4, 32))
            others = model(probe).logits.logsumexp(-1).mean()
            hazard = 1e-9 if self._tied else 1 / (MEAN_SHARE * self.limit)
            biased.bias.zero_()
            biased.bias[EOS] = others + math.log(hazard / (1 - hazard))
        model.lm_head = biased
        return model


def write_with_engine(pair: Pair, turns: Turns) -> None:
    """Generate for all prompts in one call of the built-in engine."""
    model = pair.model("student").eval()
    engine = TransformersEngine(model, Vocabulary.of(pair.tokenizer), (pair.eos_id,))
    number = range(pair.num_prompts)
    prompts = PromptBatch(tuple(map(tuple, pair.prompt_ids)), tuple(number), (0,) * len(number))
    for epoch in range(MANY):
        turns.next()
        rollout = engine.generate(prompts, Sampling(), NoiseStream(0, epoch), pair.limit)
        print(f"engine: {rollout.num_tokens} tokens of {rollout.num_row_steps} row-steps")


def write_with_generate(pair: Pair, turns: Turns, size: int) -> None:
    """Generate with ``generate`` on batches of a size, in the order of the prompts."""
    model, ids = pair.model("student").eval(), pair.prompt_ids
    torch.manual_seed(0)
    while True:
        turns.next()
        num_tokens = 0
        for first in range(0, len(ids), size):
            batch = ids[first : first + size]
            width = max(map(len, batch))
            found = model.generate(
                torch.tensor([[0] * (width - len(row)) + row for row in batch]),
                attention_mask=torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in batch]),
                do_sample=True,
                top_k=0,
                max_new_tokens=pair.limit,
                eos_token_id=pair.eos_id,
                pad_token_id=0,
            )[:, width:]
            ends = (found == pair.eos_id).cumsum(-1)
            num_tokens += int((ends - (found == pair.eos_id).long() == 0).sum())
        print(f"generate, {size} rows: {num_tokens} tokens")


def train_with_ours(pair: Pair, turns: Turns, prompts_per_rollout: int) -> None:
    """Train GKD on on-policy samples with Lightning; a turn is an epoch."""

    class InTurns(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            turns.next()

    module = DistillationModule(
        pair.model("student"),
        pair.model("teacher"),
        tokenizer=pair.tokenizer,
        learning_rate=random_pair.LEARNING_RATE,
    )
    data = RolloutDataModule(
        [{"prompt": text} for text in pair.prompts],
        batch_size=BATCH,
        prompts_per_rollout=prompts_per_rollout,
        max_prompt_length=256,
        max_response_length=pair.limit,
    )
    method = GKD(divergence=JensenShannon(0.5), on_policy_fraction=1.0)
    with tempfile.TemporaryDirectory() as root:
        lightning.Trainer(
            accelerator="cpu",
            callbacks=[method, InTurns()],
            max_epochs=MANY,
            gradient_clip_val=random_pair.CLIP_NORM,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=root,
        ).fit(module, data)


def train_with_trl(pair: Pair, turns: Turns) -> None:
    """Train with TRL's DistillationTrainer, which generates for one optimizer step at a time."""
    from datasets import Dataset  # noqa: PLC0415
    from transformers import TrainerCallback  # noqa: PLC0415
    from trl import DistillationConfig, DistillationTrainer  # noqa: PLC0415

    class InTurns(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.next()

    with tempfile.TemporaryDirectory() as root:
        DistillationTrainer(
            model=pair.model("student"),
            teacher_model=pair.model("teacher"),
            args=DistillationConfig(
                output_dir=root,
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=1,
                num_train_epochs=1000,
                learning_rate=random_pair.LEARNING_RATE,
                max_grad_norm=random_pair.CLIP_NORM,
                lr_scheduler_type="constant",
                max_completion_length=pair.limit,
                temperature=1.0,
                top_k=0,
                beta=0.5,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to="none",
                logging_steps=MANY,
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": text} for text in pair.prompts]),
            processing_class=pair.tokenizer,
            callbacks=[InTurns()],
        ).train()


CONTENDERS: dict[str, dict[str, Callable[[Pair, Turns], None]]] = {
    "write": {
        "ours": write_with_engine,
        "generate, batches of 8": lambda pair, turns: write_with_generate(pair, turns, BATCH),
        "generate, one batch": lambda pair, turns: write_with_generate(
            pair, turns, pair.num_prompts
        ),
    },
    "epoch": {
        "ours, written for one step": lambda pair, turns: train_with_ours(pair, turns, BATCH),
        "ours, written for the epoch": lambda pair, turns: train_with_ours(
            pair, turns, pair.num_prompts
        ),
        "trl": train_with_trl,
    },
}


def main() -> None:
    """Measure all contenders, or run as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--pair", nargs="*", choices=PAIRS, default=["random"])
    parser.add_argument("--shared", default="", help="folder with models/ and datasets/")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.shared, options.prompts, options.limit)
    if options.contender:
        turns = Turns()
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        pair = Pair(options.pair[0], *sizes)
        CONTENDERS[options.what[0]][options.contender](pair, turns)
        return
    path = RESULTS / "rollouts.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known.pop("machine", None)
    for name in options.pair:
        for what in options.what:
            settings = ["--shared", options.shared, "--prompts", str(options.prompts)]
            settings += ["--limit", str(options.limit), "--what", what, "--pair", name]
            arguments = {contender: [contender, *settings] for contender in CONTENDERS[what]}
            found = take_turns(__file__, arguments, options.turns)
            known[f"{what}, {name}"] = {
                "prompts": options.prompts,
                "limit": options.limit,
                "contenders": found,
                "seconds_over_ours": _ratios(found, "median_seconds"),
                "cpu_seconds_over_ours": _ratios(found, "median_cpu_seconds"),
            }
            write_results("rollouts", known)


def _ratios(found: dict[str, dict[str, Any]], measure: str) -> dict[str, dict[str, float]]:
    """Return every other contender's time over each of ours."""
    ours = [name for name in found if name.startswith("ours")]
    return {
        name: {own: round(numbers[measure] / found[own][measure], 2) for own in ours}
        for name, numbers in found.items()
        if name not in ours
    }


if __name__ == "__main__":
    main()
