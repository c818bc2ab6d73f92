"""Generation from prompts with images: frozen semantics.

* Greedy responses equal those of ``generate`` row by row, for six families, while rows of different
  lengths, with no, one and two images, leave and join the batch; models whose images have positions
  on several axes keep each row's own offset.
* Equal texts with different images are different prompts.
* An engine without a processor refuses images.
"""

from __future__ import annotations

import pytest
import vision
from transformers import AutoConfig, AutoModelForImageTextToText

from okd_lightning.engines import Sampling, TransformersEngine
from okd_lightning.errors import ConfigError
from okd_lightning.models.image_files import image_ref
from okd_lightning.models.processors import load_reader
from okd_lightning.models.vocabulary import Vocabulary
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.requests import Prompt

FAMILIES = ("idefics3", "llava", "gemma3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
LENGTH = 7


class Given:
    """A model, its processor and prompts."""

    def __init__(self, family, folder) -> None:
        path = vision.save(family, folder, 3, 32 if family in ("idefics3", "smolvlm") else 16)
        self.model = AutoModelForImageTextToText.from_pretrained(path).eval().double()
        self.tokenizer = vision.make_tokenizer(family)
        self.reader = load_reader(path, AutoConfig.from_pretrained(path), self.tokenizer, "model")
        self.vocabulary = Vocabulary.of(self.tokenizer).without(self.reader.mask_ids)
        self.prompts, self.inputs = [], []
        for number, row in enumerate(vision.image_rows(folder, 6)):
            parts = row["messages"][0]["content"]
            names = [part["path"] for part in parts if part["type"] == "image"]
            self.add(number, parts, [folder / name for name in names])

    def add(self, number, parts, paths) -> None:
        content = [{"type": "image"} if p["type"] == "image" else p for p in parts]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pictures = [vision.Image.open(path).convert("RGB") for path in paths]
        inputs = self.reader.processor(
            text=[text],
            images=[pictures] if pictures else None,
            return_tensors="pt",
            add_special_tokens=False,
        )
        refs = tuple(image_ref(path.name, path, b"", "row") for path in paths)
        ids = tuple(inputs["input_ids"][0].tolist())
        self.inputs.append(inputs)
        self.prompts.append(Prompt(ids, number, images=refs))

    def engine(self, **settings) -> TransformersEngine:
        settings = {"images": self.reader, **settings}
        return TransformersEngine(self.model, self.vocabulary, (1,), **settings)

    def expected(self, inputs) -> tuple[int, ...]:
        """Return the greedy response of transformers."""
        masked = [*self.vocabulary.invalid_ids, *range(self.vocabulary.size, 300)]
        rows = self.model.config.get_text_config().vocab_size
        found = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=LENGTH,
            suppress_tokens=[i for i in masked if i < rows],
        )
        return tuple(found[0, inputs["input_ids"].shape[1] :].tolist())


def respond(engine, prompts):
    return engine.generate(prompts, Sampling(temperature=0), NoiseStream(0, 0), LENGTH).response_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_responses_equal_those_of_generate(family, tmp_path):
    given = Given(family, tmp_path)
    longest = max(len(prompt.ids) for prompt in given.prompts)
    found = respond(given.engine(token_budget=3 * (longest + LENGTH)), given.prompts)
    assert found == tuple(map(given.expected, given.inputs))
    assert len(set(found)) > 3


def test_equal_texts_with_different_images_are_different_prompts(tmp_path):
    given = Given("llava", tmp_path)
    first = given.prompts[0]
    vision.picture(77, 30, 9).save(tmp_path / "other.png")
    other = image_ref("other.png", tmp_path / "other.png", b"", "row")
    prompts = [
        first,
        Prompt(first.ids, 1, images=(other,)),
        Prompt(first.ids, 2, images=first.images),
    ]
    found = respond(given.engine(), prompts)
    assert found[0] == found[2] != found[1]


def test_an_engine_without_a_processor_refuses_images(tmp_path):
    given = Given("llava", tmp_path)
    with pytest.raises(ConfigError, match="has no processor"):
        respond(given.engine(images=None), given.prompts)
    assert respond(given.engine(images=None), [given.prompts[2]])  # it has none
