"""Tiny models and data on disk, and readers of a command's output files."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TIMINGS = {"train/seconds", "train/tokens_per_second", "rollout/seconds"}
TIMINGS |= {"rollout/tokens_per_second"}

NOISE = ("Warning", "warning", "deprecated", "weights_only", "site-packages", "litlogger")
"""Parts of the messages of other libraries."""

LIGHTNING_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")

STUDENT_FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "bos_token_id": 0,
}


@dataclass(frozen=True)
class Result:
    """Result of a command: exit status, stdout, stderr, and Lightning's log.

    A terminal shows the log on stderr as well; in a test its handlers write elsewhere.
    """

    status: int
    out: str
    err: str
    log: str = ""


@dataclass(frozen=True)
class Assets:
    """Files that commands are pointed at; tests must not write into them."""

    folder: Path

    @property
    def student(self) -> str:
        return str(self.folder / "student")

    @property
    def teacher(self) -> str:
        return str(self.folder / "teacher")

    @property
    def tokenizer(self) -> str:
        return str(self.folder / "tokenizer")

    @property
    def train(self) -> str:
        return str(self.folder / "train.jsonl")

    @property
    def val(self) -> str:
        return str(self.folder / "val.jsonl")

    @property
    def data(self) -> list[str]:
        """Training and validation data, and lengths that fit."""
        return ["--data.train", self.train, "--data.val", self.val, *LENGTHS]

    @property
    def models(self) -> list[str]:
        """Student and teacher."""
        return ["--model.student", self.student, "--model.teacher", self.teacher]


LENGTHS = [
    *("--data.max_prompt_length", "16", "--data.max_response_length", "8"),
    *("--data.batch_size", "2", "--data.val_rollouts", "2"),
]
QUIET = [
    *("--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"),
]


def make_tokenizer(swapped: bool = False) -> PreTrainedTokenizerFast:
    """One id per byte after <s> and </s>; ``swapped`` exchanges the ids of two letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swapped:
        a, b = alphabet.index("a"), alphabet.index("b")
        alphabet[a], alphabet[b] = alphabet[b], alphabet[a]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def save_model(
    folder: Path,
    seed: int,
    scale: float = 1.0,
    swapped: bool = False,
    fields: Mapping[str, int] = STUDENT_FIELDS,
) -> None:
    """A random Llama with its tokenizer; ``scale`` sharpens its distributions."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=258, **fields))
    model.lm_head.weight.data.mul_(scale)
    model.save_pretrained(folder)
    make_tokenizer(swapped).save_pretrained(folder)


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """One row per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return rows of random letters with responses of random letters."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices("abcdef", k=draw.randint(2, 6))) for _ in range(2 * count)]
    return [
        {"prompt": p + "=", "response": r} for p, r in zip(texts[::2], texts[1::2], strict=True)
    ]


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what depends on the clock, empty cells left out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and k not in TIMINGS} for row in rows]


def metric_names(path: Path) -> set[str]:
    """Return the columns with at least one number."""
    with path.open(newline="") as file:
        return {k for row in csv.DictReader(file) for k, v in row.items() if v}


def read_checkpoint_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint holds, without the measures' running sums."""
    state = torch.load(path, weights_only=True)["state_dict"]
    return {k: v for k, v in state.items() if not k.startswith("evaluation.")}


def assert_same_weights(one: Path, other: Path) -> None:
    """Bit for bit."""
    first, second = read_checkpoint_weights(one), read_checkpoint_weights(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different[:3]
