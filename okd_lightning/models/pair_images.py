"""Processors of a pair, which make each model's inputs for the images of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.models.loading import load_model_config
from okd_lightning.models.multimodal import reads_images
from okd_lightning.models.processors import ImageReader, load_reader
from okd_lightning.models.sources import ModelSource
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.requests import Generator, Prompt


@dataclass(frozen=True)
class PairImages:
    """The processors of a student and its teacher.

    Attributes:
        student: The student's; None where the pair reads no images.
        teacher: The teacher's, where it makes other inputs or prompts than the student's; None
            where the teacher reads the student's inputs.
        refusal: Why rows with images are refused; None where they are read.
        is_text: Whether no model reads images.
    """

    student: ImageReader | None = None
    teacher: ImageReader | None = None
    refusal: str | None = None
    is_text: bool = False

    @property
    def mask_ids(self) -> frozenset[int]:
        """Ids of images, in both models."""
        readers = [reader for reader in (self.student, self.teacher) if reader is not None]
        return frozenset[int]().union(*(reader.mask_ids for reader in readers))

    def reader_of(self, generator: Generator) -> ImageReader | None:
        """Return the processor of the model that generates."""
        return self.student if generator == "student" else self.teacher or self.student

    def shared_reader(self, prompts: Sequence[Prompt]) -> ImageReader | None:
        """Return the processor of both models, for tokens that both sample.

        Raises:
            ConfigError: There are images, and the models have different processors.
        """
        if self.teacher is not None and any(prompt.images for prompt in prompts):
            raise ConfigError(
                "responses from a mixture of teacher and student need one processor and chat "
                "template for both models, and theirs differ: leave the mixture out"
            )
        return self.student

    def check(self, has_tools: bool = False) -> None:
        """Refuse rows with images where they are not read.

        Args:
            has_tools: Whether rollouts call tools.

        Raises:
            ConfigError: The message says which model is missing what.
        """
        if self.refusal is not None:
            raise ConfigError(f"the data has images, and {self.refusal}")
        if has_tools:
            raise ConfigError(
                "the data has images, and rollouts that call tools read text alone: leave "
                "--data.tools out"
            )

    def with_inputs(self, batch: DistillBatch) -> DistillBatch:
        """Return a batch that has images with both models' inputs, on its device.

        Raises:
            DataError: An image file is missing, or has changed since the data was read.
        """
        if batch.image_inputs is not None or batch.teacher_image_inputs is not None:
            return batch
        self.check()
        assert self.student is not None
        device = batch.input_ids.device
        own = other = self.student.inputs(batch.images)
        is_same = self.teacher is None and batch.images == batch.teacher_images
        if not is_same:
            other = (self.teacher or self.student).inputs(batch.teacher_images)
        own, other = (None if one is None else one.to(device) for one in (own, other))
        has_own_reads = not is_same or batch.teacher_input_ids is not None
        return replace(
            batch, image_inputs=own, teacher_image_inputs=other if has_own_reads else None
        )


def find_images(
    tokenizer: PreTrainedTokenizerBase,
    student: ModelSource,
    teachers: Sequence[ModelSource],
    refusal: str | None,
) -> PairImages:
    """Return the processors of a pair.

    A model that has none of its own, such as one from a config, takes that of the tokenizer's
    folder.

    Args:
        tokenizer: The run's tokenizer.
        student: Source of the student.
        teachers: Sources of the teachers of their own.
        refusal: Why the kind of teacher, or the engine, reads no images; None where it does.

    """
    named = [("--model.student", student), *(("--model.teacher", one) for one in teachers)]
    configs = [load_model_config(source, option, len(tokenizer)) for option, source in named]
    able = [reads_images(config) for config in configs]
    if not any(able):
        return PairImages(refusal="no model of this run reads images", is_text=True)
    if not all(able):
        (option, _), config = next(
            pair
            for pair, reads in zip(zip(named, configs, strict=True), able, strict=True)
            if not reads
        )
        return PairImages(
            refusal=f"{option} is a {config.model_type} model, which reads text alone: student and "
            "teacher both need to be vision-language models, or the images have to be left out",
        )
    if refusal is not None:
        return PairImages(refusal=refusal)
    try:
        own, *others = (
            _reader(source, config, tokenizer, option)
            for (option, source), config in zip(named, configs, strict=True)
        )
    except ModelError as error:  # the run may have no images
        return PairImages(refusal=str(error))
    tokenizer.chat_template = tokenizer.chat_template or own.tokenizer.chat_template
    kinds = {(one.digest, one.tokenizer.chat_template) for one in others}
    if len(kinds) > 1:
        several = "the teachers have different processors or chat templates"
        return PairImages(refusal=f"{several}: give teachers of one family")
    is_same = kinds <= {(own.digest, tokenizer.chat_template)}
    return PairImages(own, None if is_same else others[0])


def _reader(
    source: ModelSource, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, option: str
) -> ImageReader:
    found = load_reader(source, config, tokenizer, option)
    found = found or load_reader(tokenizer.name_or_path, config, tokenizer, option)
    if found is None:
        raise ModelError(
            f"{option} has no processor: copy preprocessor_config.json (and processor_config.json) "
            "of its model into its folder, or into that of --model.tokenizer"
        )
    return found
