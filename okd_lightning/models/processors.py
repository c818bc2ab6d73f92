"""Processors: the text and the tensors that a vision-language model gets for an image.

Each model of a run has its own. Owns loading, the places of images in a text, and pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from shutil import copyfile
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from okd_lightning.errors import DataError, ModelError, one_line
from okd_lightning.models.adapter_folders import adapter_folder
from okd_lightning.models.image_files import decoded
from okd_lightning.models.multimodal import image_token_id, placeholder_ids, reads_images
from okd_lightning.models.sources import ModelSource, Source, first_line, locate
from okd_lightning.records.images import MARKER, ImageInputs, ImageRef, joined

_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)

_UNUSABLE = (Exception,)
"""Errors of transformers' processors for settings or images that they cannot use, of any type."""


@dataclass(eq=False)
class ImageReader:
    """One model's processor.

    Attributes:
        processor: A ``ProcessorMixin`` of transformers.
        option: How the user named the model, for messages.
        image_id: Id in whose places the model puts the features of images.
        mask_ids: Ids of places of images and of what is around them.
        around: Tokens that the model's chats have before and after an image, besides its expansion
            (Qwen's start and end of vision); empty texts for none.
        source: Location of its files; None for a processor that was given.
    """

    processor: Any
    option: str
    image_id: int
    mask_ids: frozenset[int]
    around: tuple[str, str] = ("", "")
    source: Source | None = None
    _texts: dict[tuple[int, int], str] = field(default_factory=dict)

    @property
    def placeholder(self) -> str:
        """The token of an image in a text, before its expansion."""
        return str(self.processor.image_token)

    def placed(self, text: str) -> str:
        """Return a plain text with the place of an image for each ``<image>``, as chats have it.

        Tokens around an image that the text already has are not repeated.
        """
        before, after = self.around
        bare = text.replace(f"{before}{MARKER}{after}", MARKER)
        return bare.replace(MARKER, f"{before}{self.placeholder}{after}")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's own tokenizer, with the model's chat template."""
        own: PreTrainedTokenizerBase = self.processor.tokenizer
        own.chat_template = own.chat_template or self.processor.chat_template
        return own

    @property
    def digest(self) -> str:
        """Hash of the settings, equal for processors with equal texts and tensors of an image."""
        own = self.processor
        about = [
            type(own).__name__,
            type(own.image_processor).__name__,
            own.image_processor.to_dict(),
            {k: v for k, v in vars(own).items() if isinstance(v, str | int) and k[0] != "_"},
        ]
        about += self.around if any(self.around) else ()
        text = json.dumps(about, sort_keys=True, default=str)
        return sha256(text.encode()).hexdigest()

    def expansion(self, width: int, height: int, what: str) -> str:
        """Return the text of an image, which depends on its size alone.

        Args:
            width: Pixels.
            height: Pixels.
            what: The image, for messages.

        Raises:
            DataError: The processor refuses images of this size.
        """
        if (width, height) not in self._texts:
            try:
                found = self._processed([Image.new("RGB", (width, height))])
                text = self.processor.replace_image_token(found, 0)
            except _UNUSABLE as error:
                raise DataError(
                    f"{what} has {width} x {height} pixels, which the processor of {self.option} "
                    f"refuses: {one_line(str(error), 200)}"
                ) from error
            self._texts[width, height] = text
        return self._texts[width, height]

    def inputs(self, rows: Sequence[Sequence[ImageRef]]) -> ImageInputs | None:
        """Return the model's inputs for the images of some rows; None without any.

        Raises:
            DataError: An image file is missing or has changed; or sizes that do not fit together.
        """
        try:
            return joined([self._inputs_of_row(row) if row else None for row in rows])
        except ValueError as error:
            raise DataError(
                f"the processor of {self.option} makes {error}, which its model cannot read "
                "together: set a crop or a fixed size in its preprocessor_config.json"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the processor's files, besides those of its tokenizer."""
        if self.source is None:
            self.processor.image_processor.save_pretrained(folder)
            return
        for name in _PROCESSOR_FILES:
            path = self.source.file(name)
            if path is not None:
                copyfile(path, folder / name)

    def _inputs_of_row(self, images: Sequence[ImageRef]) -> ImageInputs:
        found = self._processed([decoded(image) for image in images])
        is_nested = "rows" in found  # Idefics3: [1, crops, ...], with rows and columns of crops
        tensors = {
            name: value[0] if is_nested else value
            for name, value in found.items()
            if isinstance(value, Tensor) and name in self._names
        }
        counts = {name: (len(value),) for name, value in tensors.items()}
        return ImageInputs(tensors, counts, is_nested)

    def _processed(self, images: list[Image.Image]) -> Mapping[str, Any]:
        own: Any = self.processor
        earlier = getattr(getattr(own, "valid_processor_kwargs", None), "_defaults", {})
        defaults = earlier.get("images_kwargs", {})  # where transformers 5.19 has them
        settings = dict(getattr(type(own), "images_kwargs", defaults))
        found: Mapping[str, Any] = own.image_processor(
            [images], return_tensors="pt", input_data_format="channels_last", **settings
        )
        return found

    @property
    def _names(self) -> frozenset[str]:
        own = self.processor
        unused = {*getattr(own, "unused_input_names", ()), "rows", "cols", "num_crops"}
        return frozenset(own.image_processor.model_input_names) - unused


def load_reader(
    source: ModelSource, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, option: str
) -> ImageReader | None:
    """Return the processor of a model; None for a text model, and where it has no files.

    Args:
        source: Source of the model. A model in memory has that of the folder it was loaded from.
        config: Its config.
        tokenizer: The run's tokenizer.
        option: How the user named it, for messages.

    Raises:
        ModelError: The processor cannot be loaded, or does not fit the tokenizer.
    """
    if not reads_images(config):
        return None
    name = source.name_or_path if isinstance(source, PreTrainedModel) else source
    if not isinstance(name, str) or not name:
        return None
    found = locate(name, option)
    if not any(found.file(file) for file in _PROCESSOR_FILES):
        adapter = adapter_folder(found, option)
        return None if adapter is None else load_reader(adapter.base, config, tokenizer, option)
    try:
        processor = _processor(found, config)
    except _UNUSABLE as error:
        raise ModelError(
            f"{option} {found.given!r}: its processor cannot be loaded ({first_line(error)}); "
            "copy preprocessor_config.json and processor_config.json again, and install "
            "okd-lightning[images]"
        ) from error
    return replace(reader_of(processor, config, tokenizer, option), source=found)


def reader_of(
    processor: Any, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, option: str
) -> ImageReader:
    """Return the reader of a processor.

    Raises:
        ModelError: It has no tokens for images, or the tokenizer gives them other ids.
    """
    own = image_token_id(config)
    around = _surrounding_tokens(config, tokenizer)
    reader = ImageReader(processor, option, own, frozenset(), around)
    if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
        raise ModelError(
            f"{option}: {type(processor).__name__} does not expand images to tokens; expected "
            "a processor of transformers with replace_image_token"
        )
    text = reader.expansion(64, 64, f"{option}: an image")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if own not in ids:
        token = tokenizer.convert_ids_to_tokens(own)
        raise ModelError(
            f"{option}: its config puts images in the places of id {own}, which is {token!r} in "
            "the run's tokenizer, and its processor writes other ids; give the tokenizer of this "
            "model"
        )
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    reader.mask_ids = frozenset(special & set(ids)) | placeholder_ids(config)
    return reader


def _surrounding_tokens(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Return the tokens that a config names as start and end of an image; empty for none.

    In the other families the processor's expansion of an image has them.
    """
    ids = (getattr(config, f"vision_{side}_token_id", None) for side in ("start", "end"))
    before, after = ("" if i is None else str(tokenizer.convert_ids_to_tokens(i)) for i in ids)
    return before, after


def _processor(found: Source, config: PretrainedConfig) -> Any:
    try:
        loaded = AutoProcessor.from_pretrained(found.name, **found.arguments)
    except ImportError:  # its part for videos needs torchvision; images do not
        return _without_videos(found, config)
    return loaded


def _without_videos(found: Source, config: PretrainedConfig) -> Any:
    """Put the image processor and the tokenizer of a model together."""
    kind: Any = PROCESSOR_MAPPING[type(config)]
    images = AutoImageProcessor.from_pretrained(found.name, backend="pil", **found.arguments)
    path = found.file("processor_config.json")
    known = json.loads(path.read_text()) if path is not None else {}
    settings = {k: v for k, v in known.items() if isinstance(v, str | int)}
    settings.pop("processor_class", None)
    tokenizer = kind._load_tokenizer_from_pretrained("tokenizer", found.name, "")
    processor = kind.__new__(kind)
    # transformers would import torchvision to check the class of the part for videos
    processor.check_argument_for_proper_class = lambda name, argument: None
    processor.__init__(images, tokenizer, _NoVideos(), **settings)
    del processor.check_argument_for_proper_class  # a worker process gets the processor pickled
    return processor


class _NoVideos:
    """Placeholder for a video processor that cannot be loaded."""

    model_input_names: Sequence[str] = ()
