"""Check of vocabulary agreement: comparing distributions by token needs equal ids for equal tokens.

Owns the comparison of tokenizers by content and the set of valid ids. Embedding tables are often
padded beyond the tokenizer (Qwen2.5: 151,665 tokens in tables of 151,936 and 152,064 rows); the
padding is masked on both sides and never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from okd_lightning.errors import DataError, VocabularyError
from okd_lightning.models.text_ids import TextEncoder

_PROBE = "The 3 quick foxes' naïve café — 12,345.60€!\n\tdef f(x): return x**2  # 中文 ✓"


@dataclass(frozen=True)
class Vocabulary:
    """Ids that the tokenizer has and for which the models' tables have rows.

    Attributes:
        size: One more than the largest such id; logits are cut to this width.
        invalid_ids: Ids below ``size`` without a token (nearly always none).
        end_ids: Ids that mean "the response ends here". Several are one outcome of both models'
            distributions, whose probability is their sum (``losses.end_outcome``). The first is the
            student's own.
    """

    size: int
    invalid_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
        """Return the valid ids of a tokenizer."""
        ids = set(tokenizer.get_vocab().values())
        size = max(ids) + 1
        return cls(size, tuple(sorted(set(range(size)) - ids)))

    def cut(self, logits: Tensor) -> Tensor:
        """Cut logits to valid ids: [..., any] → [..., size], minus infinity where invalid."""
        valid = logits[..., : self.size]
        if not self.invalid_ids:
            return valid
        index = torch.tensor(self.invalid_ids, device=logits.device)
        return valid.index_fill(-1, index, float("-inf"))

    def without(self, ids: Collection[int]) -> Vocabulary:
        """Return the vocabulary without some ids, which then have no probability; ends stay."""
        invalid = {*self.invalid_ids, *(i for i in ids if i < self.size)} - {*self.end_ids}
        return Vocabulary(self.size, tuple(sorted(invalid)), self.end_ids)

    def within(self, rows: int) -> Vocabulary:
        """Return the ids that a table of ``rows`` rows also has.

        A tokenizer may have more ids (Gemma 3 1B: 262,145 ids, 262,144 rows). These have no
        probability, are never sampled, and must not occur in the data.
        """
        if rows >= self.size:
            return self
        invalid, ends = (
            tuple(i for i in ids if i < rows) for ids in (self.invalid_ids, self.end_ids)
        )
        return Vocabulary(rows, invalid, ends)

    def check_ids(self, ids: Iterable[int], what: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse ids that a model's table has no row for.

        Args:
            ids: The ids.
            what: Their origin, such as "the student's end-of-sequence ids".
            tokenizer: Names the token in the message.

        Raises:
            VocabularyError: An id has no row; the message names the first one.
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
    """Return a text of many kinds of characters, and a text of the tokenizer's tokens."""
    size = min(len(tokenizer), rows or len(tokenizer))
    ids = range(0, size, 1 + size // 64)
    return _PROBE, str(tokenizer.decode(list(ids)))


def probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[int]]]:
    """Return texts that reveal differences between tokenizers, with this tokenizer's ids.

    A text that it cannot encode is left out.
    """
    found = [(text, _cut(tokenizer, text)) for text in _probes(tokenizer)]
    return [(text, ids) for text, ids in found if ids is not None]


def check_vocabulary_agreement(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, rows: int | None = None
) -> None:
    """Refuse two tokenizers that give an id to different tokens, or split text differently.

    Args:
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
        rows: Rows of the model's table: ids beyond it are not compared. None compares all.

    Raises:
        VocabularyError: They differ; the message names the difference and the alternatives.
    """
    student_ids, teacher_ids = _ids(student, rows), _ids(teacher, rows)
    if student_ids != teacher_ids:
        raise VocabularyError(_difference(student_ids, teacher_ids))
    if any(_cut(student, text) != _cut(teacher, text) for text in _probes(student, rows)):
        raise VocabularyError(
            "student and teacher tokenizers have the same tokens but split text differently "
            "(merges "
            "or normalisation differ); use models that share one tokenizer"
        )


def _ids(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> dict[str, int]:
    """Return token → id, without ids beyond ``rows`` and without GGUF's names for padding."""
    vocabulary = tokenizer.get_vocab()
    if rows is None:
        return vocabulary
    return {t: i for t, i in vocabulary.items() if i < rows and t != f"[PAD{i}]"}


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """Return the ids of a text; None if the tokenizer has no token for a character."""
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
