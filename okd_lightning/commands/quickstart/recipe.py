"""Settings of the quickstart: size of the student and length of its training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent

TEACHER_DIR = _FOLDER / "teacher"
TRAIN_FILE = _FOLDER / "data" / "train.jsonl"
VAL_FILE = _FOLDER / "data" / "val.jsonl"

GKD_DEFAULTS = ("--method", "GKD", "--method.beta", "0.0", "--method.on_policy_fraction", "1.0")
"""Defaults of GKD in the quickstart: exact forward KL on on-policy samples alone."""


@dataclass(frozen=True)
class Recipe:
    """Sizes of the models and lengths of the stages.

    Attributes:
        hidden_size: The student's width; the teacher's is 64.
        num_layers: The student's number of layers.
        warm_steps: Optimizer steps of SFT from random weights.
        method_steps: Optimizer steps of the method, and of SFT continued.
        batch_size: Rows per optimizer step.
        warm_learning_rate: Peak of the warm start.
        learning_rate: Peak of both runs.
        sampled_learning_rate: Peak of a method that learns from sampled tokens (OPD, OPDPlus,
            Reward): its gradient has more variance. At ``learning_rate`` OPDPlus ended with at most
            one right answer of 512, on two seeds.
        weight_decay: AdamW's weight decay.
        warmup_steps: Warm-up steps of every stage.
        val_every: Optimizer steps between two points of the learning curve.
        val_rollouts: Problems whose on-policy samples are measured.
        num_answers: Problems that are shown with all answers.
    """

    hidden_size: int = 32
    num_layers: int = 3
    warm_steps: int = 300
    method_steps: int = 600
    batch_size: int = 64
    warm_learning_rate: float = 5e-3
    learning_rate: float = 5e-3
    sampled_learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 50
    val_every: int = 100
    val_rollouts: int = 128
    num_answers: int = 5

    @property
    def student_config(self) -> dict[str, Any]:
        """Config of a small Llama with random weights."""
        return {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": 3 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.05,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
