"""The pair of the step benchmarks: random Llamas of 16M and 41M parameters, V = 32000.

Head and embedding are two matrices each, three layers lie between them.
Rows are random ids, 8 × 256 a batch, every position but the first carries loss.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from side_by_side import Turns
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from okd_lightning.callbacks import DistillationCallback
from okd_lightning.data import RolloutDataModule
from okd_lightning.module import DistillationModule

NUM_IDS, BATCH, LENGTH, STEPS = 32000, 8, 256, 1000
LEARNING_RATE, CLIP_NORM = 5e-5, 1.0


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id a word: t3, t4, ... behind pad, end and begin."""
    special = ["<pad>", "<end>", "<begin>"]
    words = {word: i for i, word in enumerate([*special, *(f"t{i}" for i in range(3, NUM_IDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<begin>"
    )


def make_model(role: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The student (16M) or the teacher (41M)."""
    width, inner, heads, seed = (224, 640, 4, 0) if role == "student" else (512, 1088, 8, 1)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=NUM_IDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_ids(num: int) -> torch.Tensor:
    """[num, 255] random ids; the end of sequence is the last one of every row."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, NUM_IDS, (num, LENGTH - 1), generator=generator)


def make_rows(num: int) -> list[dict[str, str]]:
    """The same as text: a prompt of one word."""
    return [
        {"prompt": f"t{ids[0]}", "response": " ".join(f"t{i}" for i in ids[1:])}
        for ids in make_ids(num).tolist()
    ]


class InTurns(Callback):
    """Lightning's end of ``Turns``: a step lasts from one batch's start to the next one's."""

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
    teacher: str | None = None,
    **settings: Any,
) -> None:
    """Distil by Lightning, one optimizer step a turn.

    Args:
        method: The method.
        dtype: Of both models' weights.
        teacher: A folder to load it from; None makes it in memory.
        **settings: Of the DistillationModule.
    """
    turns = Turns()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    number_format = getattr(torch, dtype)
    module = DistillationModule(
        make_model("student", number_format),
        teacher or make_model("teacher", number_format),
        tokenizer=make_tokenizer(),
        learning_rate=LEARNING_RATE,
        dtype=dtype,
        **settings,
    )
    data = RolloutDataModule(
        make_rows(64), batch_size=BATCH, max_prompt_length=1, max_response_length=LENGTH - 1
    )
    with tempfile.TemporaryDirectory() as root:
        trainer = lightning.Trainer(
            accelerator="cpu",
            callbacks=[method, InTurns(turns)],
            max_steps=STEPS,
            gradient_clip_val=CLIP_NORM,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=root,
        )
        trainer.fit(module, data)
