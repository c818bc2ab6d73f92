"""Losses of TRL for a pair with two tokenizers, on the rows and optimizer of this package.

ULD compares sorted probabilities position by position, GOLD compares merged distributions of spans
of equal text. Both are TRL's own code, called on both models' logits. Where TRL's data path cannot
read a tokenizer, it gets what it needs from here: byte offsets from the vocabulary's bytes, and ids
with equal bytes as matching ones (TRL compares the vocabularies' own spellings, by which `▁the` and
`Ġthe` differ).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from trl.experimental.gold import GOLDConfig
from trl.experimental.gold.gold_trainer import ULDLoss

from okd_lightning import DistillationModule
from okd_lightning.models.token_bytes import TokenBytes

SETTINGS: dict[str, dict[str, Any]] = {
    "ULD": {"use_extended_uld": False},
    "GOLD": {"uld_use_hybrid_loss": True},
    "GOLD, bayesian": {"uld_use_hybrid_loss": True, "uld_token_merge_strategy": "bayesian"},
}
"""Settings of TRL's configuration, by contender; the rest are its defaults, apart from beta."""


class Contender(DistillationModule):
    """A module whose loss is one of TRL's; the teacher is a ForeignTeacher.

    Attributes:
        loss: TRL's loss.
    """

    loss: ULDLoss
    lengths: tuple[Tensor, Tensor]

    def use(self, name: str, cross_entropy_weight: float, weight: float) -> None:
        """Choose the loss.

        Args:
            name: Key of ``SETTINGS``.
            cross_entropy_weight: Weight of the cross-entropy on the texts.
            weight: Weight of the loss itself.
        """
        foreign = self.pair.teacher.tokenizer
        assert foreign is not None
        own = TokenBytes(self.tokenizer, "--model.student").pieces
        other = TokenBytes(foreign, "--model.teacher").pieces
        self.lengths = _lengths(own, self.pair.vocabulary.size), _lengths(other, len(foreign))
        config = GOLDConfig(
            output_dir="unused",
            use_cpu=True,
            report_to=[],
            beta=0.0,  # forward KL, which is measured
            uld_crossentropy_weight=cross_entropy_weight,
            uld_distillation_weight=weight,
            uld_skip_student_eos=False,
            uld_skip_teacher_eos=False,
            **SETTINGS[name],
        )
        self.loss = ULDLoss(config, _Vocabulary(own), _Vocabulary(other))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return TRL's loss of a batch."""
        own, other = batch.student_reads, batch.teacher_reads
        teacher = self.pair.teacher.model
        assert teacher is not None
        student_logits = self.student(
            own.input_ids, attention_mask=own.attention_mask.long()
        ).logits
        with torch.no_grad():
            teacher_logits = teacher(
                other.input_ids, attention_mask=other.attention_mask.long()
            ).logits
        starts = batch.prompt_lengths
        # the teacher's prompt ends before its first token with loss, which every row has
        teacher_starts = other.mask.int().argmax(-1)
        return self.loss(
            student_logits,
            teacher_logits,
            _labels(own, starts),
            _labels(other, teacher_starts),
            own.input_ids,
            other.input_ids,
            _offsets(own, starts, self.lengths[0]),
            _offsets(other, teacher_starts, self.lengths[1]),
        ).sum()


class _Vocabulary(SimpleNamespace):
    """A tokenizer as far as TRL's loss reads it: texts, here bytes, and their ids."""

    def __init__(self, pieces: Any) -> None:
        super().__init__(pieces=pieces)

    def get_vocab(self) -> dict[bytes, int]:
        return {piece: i for i, piece in enumerate(self.pieces) if piece}


def _lengths(pieces: Any, size: int) -> Tensor:
    """[ids] bytes of each token; 1 for an id without text, which replaces a character."""
    found = [1 if piece is None else len(piece) for piece in pieces][:size]
    return torch.tensor(found + [1] * (size - len(found)))


def _logits(model: Any, reads: Any) -> Tensor:
    found: Tensor = model(reads.input_ids, attention_mask=reads.attention_mask.long()).logits
    return found


def _labels(reads: Any, starts: Tensor) -> Tensor:
    places = torch.arange(reads.input_ids.shape[1])
    inside = (places >= starts[:, None]) & (places < reads.lengths[:, None])
    return reads.input_ids.where(inside, -100)


def _offsets(reads: Any, starts: Tensor, lengths: Tensor) -> Tensor:
    """[batch, seq, 2] bytes of the response before and after each of its tokens."""
    own = _labels(reads, starts) >= 0
    ends = lengths[reads.input_ids].where(own, 0).cumsum(-1)
    return torch.stack([ends - lengths[reads.input_ids].where(own, 0), ends], -1)
