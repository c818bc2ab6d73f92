"""A teacher with another tokenizer: it reads the text of each row in its own ids.

Owns the checks of rows and terms that such a teacher supports. ``models.retokenization`` gives rows
their second set of ids, ``losses.chunked`` the losses over chunks of text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Self, final, get_args

from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.errors import ConfigError, VocabularyError
from okd_lightning.losses import Quantity, Side, Term, token_values
from okd_lightning.metrics import adapted_chunk_measures, chunk_measures
from okd_lightning.models import (
    EndTokensArgument,
    ModelArgument,
    ModelSource,
    Vocabulary,
    check_vocabulary_agreement,
    find_end_tokens,
    load_tokenizer,
    vocabulary_of,
)
from okd_lightning.models.aligned_rows import AlignedRows
from okd_lightning.models.retokenization import Retokenizer, TextLoss
from okd_lightning.records.batches import DistillBatch, TrainingRow
from okd_lightning.records.collation import RowReader, dataset_row
from okd_lightning.records.counts import count_chunks
from okd_lightning.teachers.base import Measurement, Teacher
from okd_lightning.teachers.loaded import LoadedTeacher
from okd_lightning.teachers.online_module import OnlineModuleSettings
from okd_lightning.teachers.run import GeneratingModels, Opening, TeacherOptions, TeacherRun

_OPTION = "--model.teacher ForeignTeacher"
_END_TOKENS = "model.teacher.end_tokens"
_FIRST_ROWS = 64
"""Dataset rows that are read before training."""


@final
class ForeignTeacher(Teacher):
    """A teacher whose tokenizer is not the student's; both are compared on the text.

    Its prompt is rendered by its own chat template, and a response reaches it as bytes. Losses are
    over chunks: spans of text between positions where both tokenizations have a token end;
    docs/concepts/another-tokenizer.md explains what each method then minimises, and its bias.

    Args:
        model: The teacher, as ``--model.teacher PATH`` takes it, a LoadedTeacher or a
            ServedTeacher. A server gives probabilities of tokens alone: methods on sampled tokens,
            and ``loss: chunk``.
        tokenizer: Folder or hub id of its tokenizer; by default the model's own. A ServedTeacher
            needs it.
        end_tokens: Its ids or tokens that mean "the response ends here", one outcome; by default
            those of its generation config and tokenizer.
        loss: What a divergence compares at each chunk. chunk: {this chunk, anything else}, by the
            probability of both models' own tokens. text: the same, by the probability that a text
            begins so, through any token that reaches or passes its end. next_byte: the next byte's
            distribution at the chunk's beginning, and the end. shared_tokens: the next token's
            there, over the tokens that both vocabularies have, the end and everything else: for
            tokenizers that are nearly the same, and wrong for others. By default text, and chunk
            for a ServedTeacher. Methods on sampled tokens compare chunks.

    Raises:
        ConfigError: A kind of teacher that has no ids of its own, a loss that it cannot serve, or
            no tokenizer.
    """

    option = _OPTION
    generates = False
    reads_images = False
    to_generate = "give --model.teacher a folder or hub id of a model with the student's tokenizer"

    def __init__(
        self,
        model: Teacher | ModelArgument,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        end_tokens: EndTokensArgument | None = None,
        loss: TextLoss | None = None,
    ) -> None:
        if loss is not None and loss not in get_args(TextLoss):
            raise ConfigError(
                f"model.teacher.loss is {loss!r}; expected one of {', '.join(get_args(TextLoss))}"
            )
        inner = model if isinstance(model, Teacher) else LoadedTeacher(model)
        if not inner.text_losses:
            raise ConfigError(
                f"{_OPTION}: model is a {type(inner).__name__}, which reads the student's ids; "
                "expected a folder, a hub id, a LoadedTeacher or a ServedTeacher"
            )
        if loss is not None and loss not in inner.text_losses:
            raise ConfigError(
                f"model.teacher.loss {loss} needs all logits of the teacher, and "
                f"{type(inner).__name__} gives probabilities of its own tokens alone: give loss "
                f"{' or '.join(inner.text_losses)}, or --model.teacher.model a folder or hub id"
            )
        self._loss: TextLoss = loss or inner.text_losses[0]
        self._arguments = {
            "model": model,
            "tokenizer": tokenizer,
            "end_tokens": end_tokens,
            "loss": self._loss,
        }
        self.inner: Teacher = inner
        self._own_tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._made: Callable[[TextLoss], Retokenizer]
        self._rows: AlignedRows | None = None

    # ---------------------------------------------------------------- settings

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The model and its tokenizer."""
        return self._arguments

    @property
    def mark(self) -> str:
        """The kind and its loss: a run resumes with the same."""
        return f"ForeignTeacher ({self._loss})"

    @property
    def source(self) -> ModelSource | None:
        """The inner teacher's; there is no ``own_source``, whose tokenizer would be compared."""
        return self.inner.source

    @property
    def computes_elsewhere(self) -> bool:
        """The inner teacher's."""
        return self.inner.computes_elsewhere

    @property
    def online_module(self) -> OnlineModuleSettings | None:
        """The inner teacher's."""
        return self.inner.online_module

    def check_options(self, options: TeacherOptions) -> None:
        """Check the arguments for the inner teacher."""
        self.inner.check_options(options)

    def adapted(self, adapt: Callable[[Teacher], Teacher]) -> Teacher:
        """Return the teacher with a module on the inner one."""
        own = copy(self)
        own.inner = adapt(self.inner)
        return own

    def check_adaptable(self) -> None:
        """Check the argument for the inner teacher."""
        self.inner.check_adaptable()

    def check_sharding(self) -> None:
        """Check the argument for the inner teacher."""
        self.inner.check_sharding()

    def for_student(self, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> Teacher:
        """Return the inner teacher where its tokenizer is the student's: ids pass through.

        Raises:
            ConfigError: ``end_tokens`` would then have no effect.
        """
        own = copy(self)
        own._own_tokenizer = _tokenizer(self._own_tokenizer, self.inner)
        if not _are_same(tokenizer(), own._own_tokenizer):
            return own
        if self._end_tokens is not None:
            raise ConfigError(
                f"{_END_TOKENS} has no effect: the teacher has the student's tokenizer, "
                "and the ends of both are --model.end_tokens"
            )
        rank_zero_info(
            "teacher: the student's tokenizer, so that ids are compared one by one, as with "
            "--model.teacher PATH; model.teacher.loss is not used"
        )
        return self.inner

    def join(self, run: TeacherRun) -> Self:
        """Return a copy for ``run``; the inner teacher's run has its own tokenizer.

        Raises:
            VocabularyError: A tokenizer that cannot be read as bytes.
        """
        own = super().join(run)
        tokenizer = _tokenizer(self._own_tokenizer, self.inner)
        own.tokenizer = tokenizer
        source = self.inner.own_source
        if source is None:  # on a server: all ids of its tokenizer
            vocabulary, source = Vocabulary.of(tokenizer), tokenizer.name_or_path
        else:
            vocabulary = vocabulary_of(tokenizer, source, "--model.teacher")
        ends = find_end_tokens(source, (), tokenizer, vocabulary, self._end_tokens, _END_TOKENS)
        vocabulary = replace(vocabulary, end_ids=ends.end_ids)
        own_run = replace(run, tokenizer=tokenizer, vocabulary=vocabulary, reads_texts=True)
        own.inner = self.inner.join(own_run)
        own._made = partial(
            Retokenizer,
            run.tokenizer,
            tokenizer,
            ends.end_ids[0],
            vocabulary.size,
            own.inner.context_length,
        )
        own._rows = AlignedRows(own._made(self._loss))
        return own

    def config(self, student: PretrainedConfig) -> PretrainedConfig | None:
        """Return None: a row that is too long has loss on the part that fits into the context."""
        del student
        return None

    def check_term(self, term: Term) -> None:
        """Refuse a method that compares single tokens, or whose responses it would generate."""
        if term.asks_teacher:
            raise ConfigError(
                f"method {term.name} has the teacher generate responses; {self.to_generate}: "
                "another "
                "one's responses are not in the student's ids"
            )
        if not _uses_teacher(term):
            return
        for quantity in term.quantities:
            try:
                token_values(quantity)
            except ConfigError as error:
                raise ConfigError(f"method {term.name} with {_OPTION}: {error}") from error
        self.inner.check_text_term(term)
        if 0 < term.discount < 1:
            raise ConfigError(
                f"method {term.name} has discount {term.discount:g}, and with {_OPTION} sums over "
                "the rest of a response are biased: which chunks they begin with depends on later "
                "bytes; set discount to 0, or to 1 for the sum over the whole response"
            )

    # ---------------------------------------------------------------- building

    def build(self) -> None:
        """Build the inner teacher."""
        self.inner.build()
        self.model, self.packs = self.inner.model, self.inner.packs

    @property
    def module(self) -> nn.Module | None:
        """The inner teacher's."""
        return self.inner.module

    def open(self, opening: Opening) -> None:
        """Open the inner teacher, and log the compared units.

        Raises:
            VocabularyError: The teacher's tokenizer keeps less than half of the first rows' text.
        """
        self.inner.open(opening)
        if any("dataset" in t.sources and _uses_teacher(t) for t in opening.terms):
            sets, _ = opening.read_rows(_OPTION)
            self._report([dataset_row(example) for example in sets[0][:_FIRST_ROWS]])
        assert self.tokenizer is not None
        sampled = any("student" in term.sources for term in opening.terms)
        centred = "; OPDPlus is centred: a state value is not known" if sampled else ""
        rank_zero_info(
            f"teacher: another tokenizer ({len(self.tokenizer):,} tokens, the student's "
            f"{len(self.run.tokenizer):,}): methods compare chunks of text, in train/... and in "
            f"val/chunk_*, per token of the student{centred}"
        )

    def _report(self, rows: Sequence[TrainingRow]) -> None:
        """Log the alignment of both tokenizers on dataset rows."""
        found = self.retokenized(rows)
        _, total, one_to_one, unaligned, _ = count_chunks(found).sum(-1).tolist()
        if unaligned > total / 2:
            raise VocabularyError(
                f"{_OPTION}: {unaligned} of {total} response tokens of the first {len(rows)} rows "
                "are not text that the teacher's tokenizer keeps (characters that it lacks or "
                "changes); give a teacher whose tokenizer knows this data"
            )
        longest = max((one.longest for row in found if (one := row.aligned)), default=0)
        rank_zero_info(
            f"first {len(rows)} rows: {one_to_one / max(1, total):.0%} of the student's response "
            f"tokens are one token of the teacher, {unaligned / max(1, total):.1%} are unaligned "
            f"(no loss); the longest chunk has {longest} tokens"
        )

    # ---------------------------------------------------------------- running

    def retokenized(self, rows: Sequence[TrainingRow]) -> list[TrainingRow]:
        """Return rows with their response in its ids."""
        assert self._rows is not None
        return self._rows.read(rows, self.run.vocabulary.end_ids)

    def text_readers(self) -> Mapping[str, RowReader]:
        """Return a reader for each loss, of rows that are not kept."""
        ends = self.run.vocabulary.end_ids
        losses = [loss for loss in get_args(TextLoss) if loss in self.inner.text_losses]
        return {loss: partial(_all_rows, self._made(loss), ends) for loss in losses}

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the teacher's side at its own loss positions (``DistillBatch.chunks``).

        Raises:
            ConfigError: The rows have no text in its ids.
        """
        if batch.chunks is None:
            raise ConfigError(
                "the teacher has another tokenizer, and these rows have no text in its ids: "
                "measures and commands that compare single tokens need a teacher with the "
                "student's tokenizer; leave them out"
            )
        return self.inner.text_side(batch, quantities)

    def base_side(self, batch: DistillBatch) -> Side:
        """Return the inner teacher's."""
        return self.inner.base_side(batch)

    def generator(self) -> GeneratingModels:
        """Raise: its responses would be in its own ids."""
        raise ConfigError(f"{_OPTION} generates no responses: they would be in its own ids")

    def as_base(self) -> AbstractContextManager[None]:
        """Disable the module within the block."""
        return self.inner.as_base()

    def measurements(self, stage: str, is_own: bool) -> Iterator[Measurement]:
        """Yield the base's measures over chunks; on dataset responses also those of a module."""
        yield self.as_base(), chunk_measures(stage, is_own, self.inner.covers_vocabulary)
        if self.online_module is not None and not is_own:
            yield nullcontext(), adapted_chunk_measures(stage)

    def keeps(self, name: str, trained: Collection[str], frozen: Collection[str]) -> bool:
        """Return the inner teacher's answer."""
        return self.inner.keeps(name, trained, frozen)

    def settings(self) -> Mapping[str, Any]:
        """Return the inner teacher's."""
        return self.inner.settings()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the inner teacher too."""
        own = super().__deepcopy__(memo)
        own.inner = deepcopy(self.inner, memo)
        return own


def _all_rows(
    made: Retokenizer, end_ids: tuple[int, ...], rows: Sequence[TrainingRow]
) -> list[TrainingRow]:
    return [made.row(row, end_ids) for row in rows]


def _uses_teacher(term: Term) -> bool:
    """Return whether a term compares both models."""
    return any(quantity.needs_teacher for quantity in term.quantities)


def _tokenizer(
    given: str | PreTrainedTokenizerBase | None, inner: Teacher
) -> PreTrainedTokenizerBase:
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    source = inner.own_source
    name = given or (source.name_or_path if isinstance(source, PreTrainedModel) else source)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{_OPTION}: its model is not a folder or hub id, so that its tokenizer is not known; "
            "give --model.teacher.tokenizer a folder or hub id"
        )
    return load_tokenizer(name, "--model.teacher.tokenizer" if given else "--model.teacher")


def _are_same(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    try:
        check_vocabulary_agreement(student, teacher)
    except VocabularyError:
        return False
    return True
