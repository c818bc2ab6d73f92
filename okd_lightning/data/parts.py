"""The parts of a run's data (train, val, test, predict): their sources and their examples."""

from __future__ import annotations

from typing import Any

from okd_lightning.data.distilled_module import DistilledModule
from okd_lightning.data.examples import ExampleSet
from okd_lightning.data.row_report import report_rows, warn_of_unread
from okd_lightning.data.sources import DataSource, describe_source, load_rows
from okd_lightning.data.table_ids import check_table_ids
from okd_lightning.data.token_cache import cached_examples


def part_sources(
    train: DataSource | None,
    val: DataSource | None,
    test: DataSource | None,
    predict: DataSource | None,
) -> dict[str, DataSource | None]:
    """What each part is read from; test and predict fall back where they are not given at all."""
    held_out = test if test is not None else val  # an empty list is a data set, and refused as one
    return {
        "train": train,
        "val": val,
        "test": held_out,
        "predict": predict if predict is not None else held_out,
    }


def read_part(
    part: str,
    source: DataSource,
    module: DistilledModule,
    *,
    split: str,
    subset: str | None,
    token_cache: str | None,
    **settings: Any,
) -> ExampleSet:
    """The tokenized rows of one part; says how many there are, and what was left out.

    Args:
        part: "train", "val", "test" or "predict".
        source: What it is read from.
        module: With its tokenizer; the ends of the data's own responses become its own.
        split: Of a data set that has several.
        subset: Configuration of a hub data set.
        token_cache: See ``cached_examples``.
        **settings: What else ``build_examples`` takes.

    Raises:
        DataError: It cannot be read, or a row holds an id that a model has no row for.
        ConfigError: Its rows are longer than a model was made for.
    """
    where = describe_source(source)
    rows = load_rows(source, split=split, subset=subset)
    found = cached_examples(
        token_cache, rows, module.tokenizer, eos_id=module.eos_ids[0], where=where, **settings
    )
    warn_of_unread(rows, settings["columns"], where)
    check_table_ids(found.examples, module.vocabulary, module.tokenizer, where=where)
    limit = settings["max_response_length"]
    module.add_eos_ids(found.ends_of_turn(module.tokenizer))
    report_rows(part, where, found, limit, teaches_responses=settings["needs_response"])
    longest = [
        max(len(e.prompt_ids_of(author)) for e in found.examples) + limit
        for author in ("student", "teacher")
    ]
    module.check_lengths(*longest)
    return found
