"""The model that a teacher was trained from, where a method compares both.

Owns its loading and its checks. It is frozen, outside of the module's weights, and therefore in no
checkpoint, optimizer or shard: every rank holds it whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.errors import ConfigError
from okd_lightning.models import DTypeName, ModelSource, load_model_config
from okd_lightning.models.deferred import deferred_weights
from okd_lightning.models.lengths import check_lengths
from okd_lightning.models.packing import packs_rows
from okd_lightning.models.pair import check_joins, load_checked
from okd_lightning.models.vocabulary import Vocabulary


@dataclass
class TeacherBase:
    """Frozen third model, besides student and teacher.

    Attributes:
        source: Location of the model.
        option: How the user named it, for messages.
        vocabulary: The run's.
        model: In eval mode; None before ``load``.
        packs: Whether it gets packed rows.
    """

    source: ModelSource
    option: str
    vocabulary: Vocabulary
    model: PreTrainedModel | None = None
    packs: bool = False

    @classmethod
    def joining(
        cls,
        known: TeacherBase | None,
        source: ModelSource,
        option: str,
        vocabulary: Vocabulary,
        tokenizer: PreTrainedTokenizerBase,
        is_foreign: bool,
    ) -> TeacherBase:
        """Return the base that a method names; the one that is known, if it is the same.

        Args:
            known: The base that another method of the run has named.
            source: Folder or hub id.
            option: How the user named it, for messages.
            vocabulary: The run's.
            tokenizer: The run's.
            is_foreign: Whether the teacher has another tokenizer.

        Raises:
            ConfigError: Another method of the run compares with another model, or the teacher has
                another tokenizer.
            ModelError, VocabularyError: It cannot be read, or has other ids.
        """
        if is_foreign:
            raise ConfigError(
                f"{option} {source!r} would be compared with a teacher of another tokenizer, which "
                "is not offered: give --model.teacher a model with the student's tokenizer"
            )
        if known is None:
            base = cls(source, option, vocabulary)
            base.check(tokenizer)
            return base
        if known.source != source:
            raise ConfigError(
                f"{option} {source!r} and {known.source!r}: the methods of a run "
                "compare the teacher with one model; name the same one"
            )
        return known

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse one that has other ids than the run.

        Raises:
            VocabularyError: Its tokenizer differs, or its table has no rows for some ids.
            ModelError: Its config cannot be read.
        """
        check_joins(tokenizer, self.vocabulary, self.source, self.option)

    def check_length(self, num_tokens: int) -> None:
        """Refuse sequences that are longer than its context.

        Raises:
            ConfigError: Naming both lengths.
        """
        config = load_model_config(self.source, self.option, self.vocabulary.size)
        check_lengths(None, config, num_tokens, num_tokens, "teacher's base")

    def load(self, dtype: DTypeName, attn_implementation: str | None, packing: bool) -> None:
        """Load it, once, also where a strategy leaves the pair's own weights on disk.

        Raises:
            ModelError: It cannot be loaded, or is not causal.
        """
        if self.model is not None:
            return
        with deferred_weights(False):
            model = load_checked(
                self.source,
                self.option,
                self.vocabulary.size,
                dtype=dtype,
                attn_implementation=attn_implementation,
            )
        self.model = model.requires_grad_(False).eval()
        self.packs = packs_rows(self.model, packing, "teacher")

    def on(self, device: torch.device) -> PreTrainedModel:
        """The model, moved to where a batch is."""
        assert self.model is not None
        if self.model.device != device:
            self.model.to(device)  # type: ignore[arg-type]
        return self.model
