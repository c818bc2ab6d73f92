"""Tiny models that a real vLLM serves, and the servers of them.

vLLM's attention on CPUs takes heads of 32 numbers and more; apart from that these are the models of
``tiny``. Every server starts with other weights than the student's, so that nothing agrees before
weights have been pushed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from transformers import PreTrainedModel
from vllm_servers import Server

LENGTH = 64
STUDENT_FLAGS = ("--logprobs-mode", "processed_logprobs", "--max-model-len", str(LENGTH))
TEACHER_FLAGS = ("--max-logprobs", "40", "--max-model-len", str(LENGTH))


def make_student(seed: int = 1, **overrides: Any) -> PreTrainedModel:
    """The student's architecture."""
    return tiny.make_llama(seed, head_dim=32, **overrides)


def make_teacher() -> PreTrainedModel:
    """Return a teacher whose table has no rows beyond the tokenizer."""
    return tiny.make_llama(2, tiny.NUM_IDS, head_dim=32)


def make_tied(seed: int = 1) -> PreTrainedModel:
    """A student that shares one table between embedding and head."""
    return make_student(seed, tie_word_embeddings=True)


def _saved(make: Callable[[], PreTrainedModel]) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        make().save_pretrained(folder)
        tiny.make_tokenizer().save_pretrained(folder)

    return save


STUDENT = Server("student", _saved(lambda: make_student(9)), STUDENT_FLAGS)
TEACHER = Server("teacher", _saved(make_teacher), TEACHER_FLAGS)
TIED = Server("tied", _saved(lambda: make_tied(9)), STUDENT_FLAGS)
