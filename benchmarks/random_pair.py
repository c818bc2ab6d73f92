"""Pairs of the step benchmarks: random Llamas of about 16M and 41M parameters, V = 32000.

The pair with a large head has three narrow layers, and head and embedding are separate matrices.
The tied pairs have four or eight wider layers, and one matrix is head and embedding. Rows are
random ids, 8 × 256 per batch; every position but the first has loss.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from side_by_side import Turns
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from okd_lightning.callbacks import DistillationCallback
from okd_lightning.data import RolloutDataModule
from okd_lightning.teachers import Teacher
from okd_lightning.training.module import DistillationModule

NUM_IDS, BATCH, LENGTH, STEPS = 32000, 8, 256, 1000
LEARNING_RATE, CLIP_NORM = 5e-5, 1.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one id per word: t3, t4, ... after pad, end and begin."""
    special = ["<pad>", "<end>", "<begin>"]
    words = {word: i for i, word in enumerate([*special, *(f"t{i}" for i in range(3, NUM_IDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<begin>"
    )


SHAPES = {
    (0, "student"): (224, 640, 4, 3),
    (0, "teacher"): (512, 1088, 8, 3),
    (4, "student"): (320, 960, 5, 4),
    (4, "teacher"): (704, 1408, 11, 4),
    (8, "student"): (256, 768, 4, 8),
    (8, "teacher"): (576, 1152, 9, 8),
}
"""(Layers of a tied pair or 0 for the pair with a large head, role) → width, inner width, heads,
layers."""


def make_model(role: str, dtype: torch.dtype = torch.float32, tied: int = 0) -> PreTrainedModel:
    """Make the student or the teacher; ``tied`` is the pair, see SHAPES."""
    width, inner, heads, layers = SHAPES[tied, role]
    torch.manual_seed(0 if role == "student" else 1)
    config = LlamaConfig(
        vocab_size=NUM_IDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=bool(tied),
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_ids(num: int) -> torch.Tensor:
    """Return [num, 255] random ids; the 256th id of every row is eos."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, NUM_IDS, (num, LENGTH - 1), generator=generator)


def gsm8k_lengths(shared: str | Path, num: int) -> list[tuple[int, int]]:
    """Return tokens of question and answer (Llama 2's tokenizer, with as many ids), cut at 255."""
    tokenizer = AutoTokenizer.from_pretrained(Path(shared) / "data/tokenizers/llama2")
    lines = (Path(shared) / "data/datasets/gsm8k/train.jsonl").read_text("utf-8").splitlines()
    texts = [(row["question"], row["answer"]) for row in map(json.loads, lines[:num])]
    tokens = [
        [len(tokenizer(text, add_special_tokens=False).input_ids) for text in row] for row in texts
    ]
    return [(min(prompt, 127), min(response, 128)) for prompt, response in tokens]


def make_rows(num: int, lengths: Sequence[tuple[int, int]] = ()) -> list[dict[str, str]]:
    """Return the rows as text: a prompt of one word, or prompts and responses of some lengths."""
    words = [[f"t{i}" for i in ids] for ids in make_ids(num).tolist()]
    return [
        {
            "prompt": " ".join(row[:prompt]),
            "response": " ".join(row[prompt : prompt + response]),
        }
        for row, (prompt, response) in zip(words, lengths or [(1, LENGTH - 2)] * num, strict=True)
    ]


class InTurns(Callback):
    """Lightning's side of ``Turns``: a step lasts from one batch's start to the next one's."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the turn."""
        self.turns.next()


def train_in_turns(
    method: DistillationCallback,
    dtype: str = "float32",
    lengths: Sequence[tuple[int, int]] = (),
    teacher: str | Teacher | None = None,
    student: PreTrainedModel | None = None,
    further: Sequence[Callback] = (),
    max_response_length: int = LENGTH,
    tied: int = 0,
    **settings: Any,
) -> None:
    """Distil by Lightning, one optimizer step per turn.

    Args:
        method: The method.
        dtype: Number format of both models' weights.
        lengths: Tokens of each row's prompt and response; by default 1 and 254, and an eos.
        teacher: Folder of the teacher, or a Teacher; None makes it in memory.
        student: A student instead of the random Llama.
        further: Further methods.
        max_response_length: Longest response, in tokens.
        tied: The pair, see SHAPES.
        **settings: Settings of the DistillationModule.
    """
    number_format = getattr(torch, dtype)
    module = DistillationModule(
        student or make_model("student", number_format, tied),
        teacher or make_model("teacher", number_format, tied),
        tokenizer=make_tokenizer(),
        learning_rate=LEARNING_RATE,
        dtype=dtype,
        **settings,
    )
    rows = make_rows(len(lengths) or 64, lengths)
    data = RolloutDataModule(
        rows,
        batch_size=BATCH,
        max_prompt_length=LENGTH,
        max_response_length=max_response_length,
        val_rollouts=0,
    )
    fit_in_turns(module, data, [method, *further])


def fit_in_turns(
    module: DistillationModule, data: RolloutDataModule, callbacks: Sequence[Callback]
) -> None:
    """Train a module, one optimizer step per turn."""
    turns = Turns()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as root:
        lightning.Trainer(
            accelerator="cpu",
            callbacks=[*callbacks, InTurns(turns)],
            max_steps=STEPS,
            gradient_clip_val=CLIP_NORM,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=root,
        ).fit(module, data)
