"""The parts of a run's data (train, val, test, predict): their sources and their examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from okd_lightning.data.columns import Columns, RawRow
from okd_lightning.data.distilled_module import DistilledPair
from okd_lightning.data.examples import ExampleSet
from okd_lightning.data.image_cells import check_images_are_read, has_images
from okd_lightning.data.images import RowImages, check_image_ids
from okd_lightning.data.row_report import report_plain_prompts, report_rows, warn_of_unread
from okd_lightning.data.sources import DataSource, describe_source, load_rows
from okd_lightning.data.table_ids import check_table_ids
from okd_lightning.data.teacher_choice import check_choice, teachers_of
from okd_lightning.data.token_cache import cached_examples
from okd_lightning.records.requests import Generator


def part_sources(
    train: DataSource | None,
    val: DataSource | None,
    test: DataSource | None,
    predict: DataSource | None,
) -> dict[str, DataSource | None]:
    """Return the source of each part; test and predict have defaults if they are None."""
    held_out = test if test is not None else val  # an empty list is a dataset, refused later
    return {
        "train": train,
        "val": val,
        "test": held_out,
        "predict": predict if predict is not None else held_out,
    }


def _images(
    source: DataSource, rows: Sequence[RawRow], pair: DistilledPair, columns: Columns
) -> RowImages | None:
    """Return the reader of some rows' images; None where the models read text alone.

    Raises:
        ConfigError: There are images, and a model, the teacher or the engine reads none.
        DataError: The rows have images that would be left out.
    """
    own, where = pair.images, describe_source(source)
    if own.is_text:  # an image in a message is then an error about its row
        check_images_are_read(rows, columns, where, is_text=True)
        return None
    are_present = has_images(rows, columns, where)
    if are_present:
        pair.use_images()
    else:
        check_images_are_read(rows, columns, where, is_text=False)
    if own.student is None:
        return None
    folder = Path.cwd()
    if isinstance(source, str | Path) and Path(source).expanduser().exists():
        path = Path(source).expanduser()
        folder = path if path.is_dir() else path.parent
    return RowImages(own.student, own.teacher, folder.absolute(), are_present)


def read_part(
    part: str,
    source: DataSource,
    pair: DistilledPair,
    *,
    split: str,
    subset: str | None,
    token_cache: str | None,
    teacher_column: str | None,
    **settings: Any,
) -> ExampleSet:
    """Return the tokenized rows of one part, and log their number and the skipped rows.

    Args:
        part: "train", "val", "test" or "predict".
        source: Its source.
        pair: The models, with the images that they read.
        split: Split of a dataset that has several.
        subset: Configuration of a hub dataset.
        token_cache: See ``cached_examples``.
        teacher_column: Column with each row's teacher; None for one teacher.
        **settings: Further arguments of ``build_examples``.

    Raises:
        DataError: It cannot be read, or a row has an id without a row in a model's table.
        ConfigError: Its rows are longer than a model was made for.
    """
    where = describe_source(source)
    check_choice(teacher_column, pair.teacher.names)
    rows = load_rows(source, split=split, subset=subset)
    settings["images"] = images = _images(source, rows, pair, settings["columns"])
    found = cached_examples(
        token_cache, rows, pair.tokenizer, eos_id=pair.eos_ids[0], where=where, **settings
    )
    if images is not None and images.are_present:
        check_image_ids(found.examples, pair.images.mask_ids, pair.tokenizer, where)
    if teacher_column is not None and part != "predict":
        chosen = teachers_of(rows, teacher_column, pair.teacher.names, where)
        found = replace(
            found, examples=tuple(replace(e, teacher=chosen[e.index]) for e in found.examples)
        )
    warn_of_unread(rows, settings["columns"], where)
    own = found.examples
    if settings.get("teacher_tokenizer") is not None:  # its prompts are not in the student's ids
        own = tuple(replace(example, teacher_prompt_ids=()) for example in own)
    check_table_ids(own, pair.vocabulary, pair.tokenizer, where=where)
    limit = settings["max_response_length"]
    report_rows(part, where, found, limit, teaches_responses=settings["needs_response"])
    if part == "train":
        report_plain_prompts(part, found, pair.tokenizer)
    generators: tuple[Generator, ...] = ("student", "teacher")
    longest = [
        max(len(e.prompt_for(generator).ids) for e in found.examples) + limit
        for generator in generators
    ]
    pair.check_lengths(*longest)
    return found
