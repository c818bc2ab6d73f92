"""Images of rows: which ones a row has, and their places in its prompt.

A row has images as parts of its messages, or in a column, one for each place ``<image>`` in its
text. Owns the check of their number, and the expansion of a place to the tokens of its image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from okd_lightning.data.columns import Columns, RawRow
from okd_lightning.data.image_cells import cells_of, places_of, source_of
from okd_lightning.data.templates import RenderedChat, Turn
from okd_lightning.errors import DataError
from okd_lightning.models.image_files import image_hash, image_ref
from okd_lightning.models.processors import ImageReader
from okd_lightning.records.batches import Example
from okd_lightning.records.images import MARKER, ImageRef


@dataclass(eq=False)
class RowImages:
    """Reads the images of a dataset's rows, and puts their tokens into prompts.

    Attributes:
        student: The student's processor.
        teacher: The teacher's, where it makes other inputs or prompts; None where it reads the
            student's.
        folder: Folder that paths are relative to.
        are_present: Whether the dataset has an image; without one ``<image>`` is ordinary text.
        are_optional: Whether a prompt without places leaves the images to the other model's prompt.
    """

    student: ImageReader
    teacher: ImageReader | None
    folder: Path
    are_present: bool = True
    are_optional: bool = False
    _known: dict[object, ImageRef] = field(default_factory=dict)

    def digest_of(self, rows: Sequence[RawRow], columns: Columns, where: str) -> str:
        """Return a digest of processors and image files, on which prompt ids depend.

        Files are read and not decoded.
        """
        readers = [reader for reader in (self.student, self.teacher) if reader is not None]
        about = [f"{reader.digest} {reader.tokenizer.chat_template}" for reader in readers]
        files = list[str]()
        for number, row in enumerate(rows if self.are_present else (), start=1):
            at = f"{where}, row {number}"
            given = [*cells_of(row, columns, at), *filter(None, places_of(row, columns))]
            files += [self._hash(cell, f"image {n}", at) for n, cell in enumerate(given, start=1)]
        return " ".join([str(self.folder), *about, *files])

    def of_row(
        self, row: RawRow, columns: Columns, at: str, text: str | None = None
    ) -> tuple[ImageRef, ...]:
        """Return the images of a row's prompt, in the order of their places.

        Args:
            row: The raw row.
            columns: The columns that are read.
            at: File and row, for messages.
            text: The prompt, where it is plain text; None for a chat.

        Raises:
            DataError: An image cannot be read, or there are more or fewer than places.
        """
        if not self.are_present:
            return ()
        places = [None] * text.count(MARKER) if text is not None else places_of(row, columns)
        given = [(cell, f"image {n}") for n, cell in enumerate(cells_of(row, columns, at), start=1)]
        num_open = sum(place is None for place in places)
        if num_open == 0 and self.are_optional:
            given = []
        if num_open != len(given):
            raise DataError(
                f"{at}: the prompt has {num_open} {MARKER} without an image, and the column "
                f"{columns.images!r} has {len(given)} images; write {MARKER} once for each image, "
                "where it belongs"
            )
        column = iter(given)
        cells = [
            next(column) if place is None else (place, f"image {number}")
            for number, place in enumerate(places, start=1)
        ]
        return tuple(self._ref(cell, name, at) for cell, name in cells)

    def _ref(self, cell: Any, name: str, at: str) -> ImageRef:
        path, data, name = source_of(cell, name, at)
        place = self._place(path)
        key = data if place is None else str(place)
        if key not in self._known:
            self._known[key] = image_ref(name, place, data, at)
        return self._known[key]

    def _hash(self, cell: Any, name: str, at: str) -> str:
        path, data, name = source_of(cell, name, at)
        return image_hash(name, self._place(path), data, at)

    def _place(self, path: str | None) -> Path | None:
        if path is None:
            return None
        try:
            return self.folder / Path(path).expanduser()
        except RuntimeError:  # of a user without a home
            return self.folder / path

    def prompt(
        self,
        text: str,
        images: Sequence[ImageRef],
        at: str,
        *,
        is_rendered: bool,
        reader: ImageReader | None = None,
    ) -> str:
        """Return a prompt with the tokens of its images.

        Args:
            text: The prompt.
            images: Its images.
            at: File and row, for messages.
            is_rendered: Whether a chat template has made it, with the model's own places of images.
            reader: The processor of the model that reads it; None for the student's.

        Raises:
            DataError: There are more or fewer images than places.
        """
        if not self.are_present:
            return text
        reader = reader or self.student
        own = text if is_rendered else reader.placed(text)
        (found,) = _expanded([own], images, reader, at)
        return found

    def chat(self, chat: RenderedChat, images: Sequence[ImageRef], at: str) -> RenderedChat:
        """Return a rendered chat with the tokens of its images.

        Args:
            chat: The chat as text.
            images: Its images, in the order of their places.
            at: File and row, for messages.

        Raises:
            DataError: An assistant's turn has an image, or there are more or fewer images than
                places.
        """
        if not self.are_present:
            return chat
        if any(self.student.placeholder in turn.text for turn in chat.turns):
            raise DataError(
                f"{at}: an assistant's turn has the place of an image; images belong to the "
                "messages of other roles"
            )
        parts = [chat.opening, *(turn.after for turn in chat.turns)]
        opening, *after = _expanded(parts, images, self.student, at)
        turns = tuple(
            Turn(turn.text, rest, turn.content)
            for turn, rest in zip(chat.turns, after, strict=True)
        )
        return replace(chat, opening=opening, turns=turns)


def _expanded(
    texts: Sequence[str], images: Sequence[ImageRef], reader: ImageReader, at: str
) -> list[str]:
    """Return texts that follow each other with the tokens of their images."""
    pieces = [text.split(reader.placeholder) for text in texts]
    num_places = sum(len(piece) - 1 for piece in pieces)
    if num_places != len(images):
        raise DataError(
            f"{at}: the prompt has {num_places} places of an image ({reader.placeholder}) and "
            f"{len(images)} images; write {MARKER} for each image, and use a chat template that "
            "renders parts of the type image"
        )
    tokens = iter(
        reader.expansion(image.width, image.height, f"{at}: the image {image.name!r}")
        for image in images
    )
    return ["".join(_between(piece, tokens)) for piece in pieces]


def _between(pieces: Sequence[str], tokens: Iterator[str]) -> Iterator[str]:
    yield pieces[0]
    for piece in pieces[1:]:
        yield next(tokens)
        yield piece


def num_places(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the places of images in messages as ``read_turns`` returns them."""
    return sum(str(message.get("content")).count(MARKER) for message in messages)


def check_image_ids(
    examples: Sequence[Example],
    image_ids: frozenset[int],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> None:
    """Refuse rows that would have loss on an id of an image.

    Args:
        examples: Tokenized rows.
        image_ids: The ids.
        tokenizer: Names a token in the message.
        where: The dataset's name for messages.

    Raises:
        DataError: A response, or an earlier assistant turn, has one; the message names both.
    """
    for example in examples:
        learned = [i for i, m in zip(example.prompt_ids, example.prompt_mask, strict=True) if m]
        found = next((i for i in (*example.response_ids, *learned) if i in image_ids), None)
        if found is not None:
            raise DataError(
                f"{where}, row {example.index + 1}: a response has "
                f"{tokenizer.convert_ids_to_tokens(found)!r}, an id of images, which is "
                "never generated; delete it or the row"
            )
