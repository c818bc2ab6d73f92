"""Log and warnings about the rows of a run: number, skipped, cut and unread content."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from okd_lightning.data.column_hints import unread_warning
from okd_lightning.data.columns import Columns, RawRow
from okd_lightning.data.examples import ExampleSet

MANY_CUT = 0.2
"""Share of cut responses from which on a run warns: a cut response has no end to learn."""


PLAIN_PROMPTS = (
    "plain prompts, though the tokenizer has a chat template: a chat model wants messages "
    "(--data.as_chat true)"
)


def report_rows(
    part: str, where: str, found: ExampleSet, limit: int, *, teaches_responses: bool
) -> None:
    """Log the rows of a part, and warn if many responses are cut.

    Args:
        part: "train", "val", "test" or "predict".
        where: The dataset's name.
        found: Its examples.
        limit: Length limit of responses, in tokens.
        teaches_responses: Whether the run learns from them.
    """
    skipped = ", ".join(f"{count} {reason}" for reason, count in found.skipped.items())
    rank_zero_info(
        f"{part}: {len(found)} rows from {where}, {found.num_skipped} skipped"
        f"{f' ({skipped})' if skipped else ''}, {found.num_cut} responses cut at {limit} tokens"
    )
    if teaches_responses and found.share_cut >= MANY_CUT:
        rank_zero_warn(f"{part}: {cut_advice(found, limit)}")


def report_plain_prompts(part: str, found: ExampleSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log that rows are plain prompts although the tokenizer has a chat template."""
    has_template = getattr(tokenizer, "chat_template", None) is not None
    is_plain = any(
        example.chat is None and len(example.prompt_ids) > 1 for example in found.examples[:1]
    )  # a whole text's prompt is its first id
    if has_template and is_plain:
        rank_zero_info(f"{part}: {PLAIN_PROMPTS}")


def cut_advice(found: ExampleSet, limit: int) -> str:
    """Return the share of cut responses, its effect, and a limit that cuts few."""
    return (
        f"{found.share_cut:.0%} of the responses are cut at --data.max_response_length {limit}, "
        "and a cut response does not teach the student to stop; "
        f"95 % of them have at most {found.usual_length} tokens: "
        f"use --data.max_response_length {found.usual_length}"
    )


def warn_of_unread(rows: Sequence[RawRow], columns: Columns, where: str) -> None:
    """Warn of columns that seem to belong to the prompts and are not read."""
    warning = unread_warning(rows, columns)
    if warning is not None:
        rank_zero_warn(f"{where}: {warning}")
