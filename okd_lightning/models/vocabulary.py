"""Vocabulary agreement: two models can be compared token by token only if their ids mean the same.

Owns the comparison by content and the set of valid ids. Embedding tables are often padded beyond
the tokenizer (Qwen2.5: 151,665 tokens in tables of 151,936 and 152,064 rows); the padding is masked
on both sides, never compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from okd_lightning.errors import DataError, VocabularyError
from okd_lightning.models.text_ids import TextEncoder

_PROBE = "The 3 quick foxes' naïve café — 12,345.60€!\n\tdef f(x): return x**2  # 中文 ✓"


@dataclass(frozen=True)
class Vocabulary:
    """The ids that a tokenizer knows and the models have rows for.

    Attributes:
        size: One more than the largest such id; logits are cut to this width.
        invalid_ids: Ids below ``size`` that no token has (nearly always none).
    """

    size: int
    invalid_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """The valid ids of a tokenizer."""
        ids = set(tokenizer.get_vocab().values())
        size = max(ids) + 1
        return cls(size, tuple(sorted(set(range(size)) - ids)))

    def cut(self, logits: Tensor) -> Tensor:
        """Logits over valid ids only: [..., any] → [..., size], minus infinity where invalid."""
        valid = logits[..., : self.size]
        if not self.invalid_ids:
            return valid
        index = torch.tensor(self.invalid_ids, device=logits.device)
        return valid.index_fill(-1, index, float("-inf"))

    def within(self, rows: int) -> Vocabulary:
        """The ids that a table of ``rows`` rows has as well.

        A tokenizer may know more (Gemma 3 1B: 262,145 ids, 262,144 rows): those beyond are never
        sampled, have no probability, and no row of the data may use one.
        """
        if rows >= self.size:
            return self
        return Vocabulary(rows, tuple(i for i in self.invalid_ids if i < rows))

    def check_ids(self, ids: Iterable[int], what: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse ids that a model's table has no row for.

        Args:
            ids: Which.
            what: Where they come from, such as "the student's end-of-sequence ids".
            tokenizer: Names the token in the message.

        Raises:
            VocabularyError: Naming the first of them.
        """
        beyond = [i for i in ids if i >= self.size]
        if beyond:
            token = tokenizer.convert_ids_to_tokens(beyond[0])
            raise VocabularyError(
                f"{what} hold {beyond[0]} ({token!r}), but the models' embedding tables have rows "
                f"up to {self.size - 1}; use the tokenizer that belongs to these models, or resize "
                "their embeddings"
            )


def _probes(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> tuple[str, str]:
    """A text of many kinds of characters, and one of the tokenizer's own tokens."""
    size = min(len(tokenizer), rows or len(tokenizer))
    ids = range(0, size, 1 + size // 64)
    return _PROBE, str(tokenizer.decode(list(ids)))


def probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Texts in which tokenizers differ if they differ, with the ids that this one cuts them into.

    A text for which it has no tokens is left out.
    """
    found = [(text, _cut(tokenizer, text)) for text in _probes(tokenizer)]
    return [(text, ids) for text, ids in found if ids is not None]


def check_vocabulary_agreement(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, rows: int | None = None
) -> None:
    """Refuse two tokenizers that give the same id to different tokens, or cut text differently.

    Args:
        student: One of them.
        teacher: The other.
        rows: Rows of the model's table: ids beyond are not compared. None compares all.

    Raises:
        VocabularyError: Naming what differs and what can be used instead.
    """
    student_ids, teacher_ids = _ids(student, rows), _ids(teacher, rows)
    if student_ids != teacher_ids:
        raise VocabularyError(_difference(student_ids, teacher_ids))
    if any(_cut(student, text) != _cut(teacher, text) for text in _probes(student, rows)):
        raise VocabularyError(
            "student and teacher tokenizers have the same tokens but cut text differently (merges "
            "or normalisation differ); use models that share one tokenizer"
        )


def _ids(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> dict[str, int]:
    """Token → id, without ids beyond ``rows`` and without the names that GGUF gives to padding."""
    vocabulary = tokenizer.get_vocab()
    if rows is None:
        return vocabulary
    return {t: i for t, i in vocabulary.items() if i < rows and t != f"[PAD{i}]"}


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Ids of a text; None where the tokenizer has no token for some of its characters."""
    try:
        return TextEncoder(tokenizer).plain([text])[0]
    except DataError:
        return None


def _difference(student: dict[str, int], teacher: dict[str, int]) -> str:
    differing = sorted(
        (
            token
            for token in student.keys() | teacher.keys()
            if student.get(token) != teacher.get(token)
        ),
        key=lambda token: min(student.get(token, 1 << 60), teacher.get(token, 1 << 60)),
    )
    shown = ", ".join(
        f"{token!r} (student {student.get(token, 'none')}, teacher {teacher.get(token, 'none')})"
        for token in differing[:3]
    )
    return (
        f"student and teacher tokenizers differ: {len(differing)} tokens disagree "
        f"(sizes {len(student)} and {len(teacher)}), first {shown}; distillation compares ids, so "
        "use two models of one family, or train on the teacher's generations as text (SFT)"
    )
