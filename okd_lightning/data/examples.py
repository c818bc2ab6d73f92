"""Raw rows to examples: read, tokenized, limited in length, counted.

Owns the limits and the errors about skipped rows; ``text_rows`` and ``chat_rows`` make the ids.
Deterministic: the same rows and tokenizer give the same examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from okd_lightning.data.chat_rows import examples_from_chats
from okd_lightning.data.columns import Columns, RawRow
from okd_lightning.data.image_cells import has_images
from okd_lightning.data.images import RowImages
from okd_lightning.data.layouts import Layout, choose_layout
from okd_lightning.data.row_templates import with_prompts
from okd_lightning.data.teacher_prompt_ids import PromptedRows, add_teacher_prompts
from okd_lightning.data.teacher_prompts import TeacherPrompts
from okd_lightning.data.text_rows import examples_from_texts
from okd_lightning.data.whole_texts import examples_from_whole_texts
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.models.text_ids import MARGIN, TextEncoder
from okd_lightning.records.batches import Example

OnOverlong: TypeAlias = Literal["skip", "error"]
"""Action for a row whose prompt is too long: skip and count it, or raise."""

OVERLONG_PROMPT = "overlong prompt"
EMPTY_RESPONSE = "empty response"
OVERLONG_TEACHER_PROMPT = "overlong teacher prompt"


@dataclass(frozen=True)
class ExampleSet:
    """The examples of a dataset, and counts of its other rows.

    Attributes:
        examples: In the dataset's order; ``index`` is the row's number in it (from 0).
        skipped: Number of skipped rows, by reason (``OVERLONG_PROMPT``, ``EMPTY_RESPONSE``,
            ``OVERLONG_TEACHER_PROMPT``, ``TeacherPrompts.reason_for_none``).
        num_cut: Examples whose response was cut and therefore has no eos.
        notes: Messages about content that cannot be learned, one per kind.
        usual_length: 95th percentile of the responses' tokens before cutting; 0 without any.
    """

    examples: tuple[Example, ...]
    skipped: Mapping[str, int]
    num_cut: int
    notes: tuple[str, ...] = ()
    usual_length: int = 0

    @property
    def num_skipped(self) -> int:
        """Skipped rows, for any reason."""
        return sum(self.skipped.values())

    @property
    def share_cut(self) -> float:
        """Share of cut responses."""
        return self.num_cut / max(1, sum(bool(e.response_ids) for e in self.examples))

    def __len__(self) -> int:
        return len(self.examples)

    def ends_of_turn(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the special ids that end uncut responses, in id order."""
        specials = set(tokenizer.all_special_ids)
        specials |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest = max(len(example.response_ids) for example in self.examples)
        limit = longest if self.num_cut else longest + 1  # cut responses have the longest length
        whole = [e.response_ids[-1] for e in self.examples if 0 < len(e.response_ids) < limit]
        return sorted(specials & set(whole))


@dataclass(frozen=True)
class _Limits:
    """Limits of a row; see ``build_examples``."""

    max_prompt_length: int
    max_response_length: int
    on_overlong: OnOverlong
    needs_response: bool
    where: str
    teacher_prompts: TeacherPrompts | None = None
    images: RowImages | None = None

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_response_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--data.{name} is {getattr(self, name)}; expected at least 1")
        if self.on_overlong not in get_args(OnOverlong):
            raise ConfigError(
                f"--data.on_overlong is {self.on_overlong!r}; expected 'skip' or 'error'"
            )

    def reason_to_skip(self, example: Example) -> str | None:
        """Return why this row is skipped, or None; raise if ``on_overlong`` is "error"."""
        num_tokens = len(example.prompt_ids)
        if num_tokens > self.max_prompt_length:
            self._stop_if_asked(example, "prompt", num_tokens, self.max_prompt_length)
            return OVERLONG_PROMPT
        if self.needs_response and not example.response_ids:
            return EMPTY_RESPONSE
        if self.teacher_prompts is None:
            return None
        num_tokens = len(example.teacher_prompt_ids)
        if not num_tokens:
            return self.teacher_prompts.reason_for_none
        if num_tokens > self.teacher_prompts.max_length:
            limit = self.teacher_prompts.max_length
            self._stop_if_asked(example, "teacher prompt", num_tokens, limit)
            return OVERLONG_TEACHER_PROMPT
        return None

    def _stop_if_asked(self, example: Example, what: str, num_tokens: int, limit: int) -> None:
        if self.on_overlong == "error":
            raise DataError(
                f"{self.where}, row {example.index + 1}: the {what} has "
                f"{_counted(num_tokens, limit)} tokens, "
                f"more than --data.max_{what.replace(' ', '_')}_length {limit}; raise it, "
                "or leave such rows out with --data.on_overlong skip"
            )

    def none_left(self, examples: Sequence[Example], skipped: Mapping[str, int]) -> DataError:
        """Return the error for a dataset without remaining rows."""
        lengths = [len(example.prompt_ids) for example in examples]
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
        if OVERLONG_PROMPT in skipped:
            advice = (
                f"prompts have {_range(lengths, self.max_prompt_length)} tokens; "
                f"raise --data.max_prompt_length (now {self.max_prompt_length})"
            )
        elif OVERLONG_TEACHER_PROMPT in skipped and self.teacher_prompts is not None:
            lengths = [len(e.teacher_prompt_ids) for e in examples if e.teacher_prompt_ids]
            advice = (
                f"teacher prompts have {_range(lengths, self.teacher_prompts.max_length)} tokens; "
                "raise "
                f"--data.max_teacher_prompt_length (now {self.teacher_prompts.max_length})"
            )
        elif EMPTY_RESPONSE in skipped:
            advice = (
                "give rows with responses, or use a method that needs prompts only "
                "(--method GKD --method.on_policy_fraction 1)"
            )
        else:
            advice = "give rows that the teacher's prompt can be made of"
        return DataError(
            f"{self.where}: all {len(examples)} rows were skipped ({reasons}); {advice}"
        )

    def apply(self, examples: Sequence[Example]) -> ExampleSet:
        """Skip and cut rows."""
        kept: list[Example] = []
        skipped: Counter[str] = Counter()
        lengths: list[int] = []
        for example in examples:
            reason = self.reason_to_skip(example)
            if reason is not None:
                skipped[reason] += 1
                continue
            lengths.append(len(example.response_ids))
            kept.append(
                replace(example, response_ids=example.response_ids[: self.max_response_length])
            )
        if not kept:
            raise self.none_left(examples, skipped)
        num_cut = sum(length > self.max_response_length for length in lengths)
        return ExampleSet(tuple(kept), dict(skipped), num_cut, usual_length=_usual_length(lengths))


def _usual_length(lengths: Sequence[int]) -> int:
    """Return the 95th percentile of the responses' lengths; 0 without any."""
    given = sorted(length for length in lengths if length)
    return given[math.ceil(0.95 * len(given)) - 1] if given else 0


def _counted(num_tokens: int, limit: int) -> str:
    """Format a length for messages; texts that are much too long are not tokenized to their end."""
    return f"{'at least ' if num_tokens >= limit + MARGIN else ''}{num_tokens}"


def _range(lengths: Sequence[int], limit: int) -> str:
    return f"{_counted(min(lengths), limit)} to {_counted(max(lengths), limit)}"


def build_examples(
    rows: Sequence[RawRow],
    tokenizer: PreTrainedTokenizerBase,
    *,
    eos_id: int,
    columns: Columns,
    max_prompt_length: int,
    max_response_length: int,
    on_overlong: OnOverlong,
    needs_response: bool,
    where: str,
    teacher_prompts: TeacherPrompts | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    images: RowImages | None = None,
) -> ExampleSet:
    """Tokenize rows into examples: prompt + response + eos; see ``text_ids`` for the rules.

    Args:
        rows: At least one; all of the layout of the first (prompt and response, or chat messages),
            unless ``columns`` has templates.
        tokenizer: Encodes text, and renders chats.
        eos_id: Appended to a response that was not cut and does not end with it or with the
            tokenizer's eos.
        columns: Which columns to read.
        max_prompt_length: Tokens; ``on_overlong`` decides about longer prompts.
        max_response_length: Tokens, the eos included; longer responses are cut and get no eos.
        on_overlong: "skip" skips and counts the row, "error" raises.
        needs_response: Whether the run learns from dataset responses: rows without one are then
            skipped, and a dataset without such a column is refused.
        where: The dataset's name for messages (``describe_source``).
        teacher_prompts: The teacher's own prompts; None: the same prompts. Rows whose teacher
            prompt is missing or too long are skipped like rows with too long prompts.
        teacher_tokenizer: Tokenizer of a teacher that has another one, which makes the teacher's
            prompts; None for a teacher that reads the student's ids.
        images: Reads the images of rows; None where the models read text alone.

    Raises:
        ConfigError: A limit below 1 or an unknown ``on_overlong``.
        DataError: Columns are missing, a cell has the wrong type, a chat cannot be rendered with
            exact masks, a prompt is too long (``on_overlong="error"``), or no row is left.
    """
    limits = _Limits(
        max_prompt_length,
        max_response_length,
        on_overlong,
        needs_response,
        where,
        teacher_prompts,
        images,
    )
    if not rows:
        raise DataError(f"{where}: no rows; expected at least one")
    if images is not None:
        images = replace(images, are_optional=teacher_prompts is not None)
        limits, columns = replace(limits, images=images), replace(columns, no_images=None)
    examples, notes = _tokenized(rows, columns, limits, tokenizer, eos_id, teacher_tokenizer)
    found = replace(limits.apply(examples), notes=notes)
    warn_of(found, where)
    return found


def _tokenized(
    rows: Sequence[RawRow],
    columns: Columns,
    limits: _Limits,
    tokenizer: PreTrainedTokenizerBase,
    eos_id: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[list[Example], tuple[str, ...]]:
    """Tokenize rows for both sides, before any is skipped or cut; see ``build_examples``.

    Returns:
        An example for each row, and messages about content that cannot be learned.
    """
    where, needs_response = limits.where, limits.needs_response
    rows, columns = with_prompts(rows, columns, needs_response=needs_response, where=where)
    layout = choose_layout(rows, columns, needs_response=needs_response, where=where)
    encoder = TextEncoder(tokenizer)
    own_eos = tokenizer.eos_token_id
    eos_ids = [eos_id] if own_eos in (None, eos_id) else [eos_id, own_eos]
    examples, notes = _read(rows, encoder, columns, layout, limits, eos_ids)
    prompted = PromptedRows(rows, columns, layout, limits.teacher_prompts, where)
    examples = add_teacher_prompts(
        examples, prompted, encoder, teacher_tokenizer=teacher_tokenizer, images=limits.images
    )
    return examples, notes


def _read(
    rows: Sequence[RawRow],
    encoder: TextEncoder,
    columns: Columns,
    layout: Layout,
    limits: _Limits,
    eos_ids: list[int],
) -> tuple[list[Example], tuple[str, ...]]:
    """Tokenize rows by the reader of their layout; return the examples, and notes on the set."""
    read: dict[str, Any] = {
        "columns": columns,
        "where": limits.where,
        "eos_ids": eos_ids,
        "max_prompt_length": limits.max_prompt_length,
        "max_response_length": limits.max_response_length,
    }
    if layout == "chat":
        read |= {"needs_response": limits.needs_response, "images": limits.images}
        return examples_from_chats(rows, encoder, **read)
    if columns.chat_template_kwargs:
        raise DataError(
            f"{limits.where}: the rows are plain prompts, and --data.chat_template_kwargs are for "
            "a chat template; set --data.as_chat true, or leave them out"
        )
    if columns.prompt is None:
        if limits.images is not None and has_images(rows, columns, limits.where):
            raise DataError(
                f"{limits.where}: rows with images are whole texts; give them as chats, or with a "
                "prompt column"
            )
        return examples_from_whole_texts(rows, encoder, **read), ()
    read |= {"needs_response": limits.needs_response, "images": limits.images}
    return examples_from_texts(rows, encoder, **read), ()


def warn_of(found: ExampleSet, where: str) -> None:
    """Warn of the content of a dataset that cannot be learned."""
    for note in found.notes:
        rank_zero_warn(f"{where}: {note}")
