"""The processors of a pair: frozen semantics.

* A text model with a vision-language one, a teacher or an engine that is sent text, tools, and a
  model without a processor read no images; each is refused by name, and only where there are some.
* A model without files of a processor takes those of the tokenizer's folder.
* The files that an export gets load again as the same processor.
* A self-teacher reads the student's images: its divergence is exactly 0.
"""

from __future__ import annotations

import pytest
import vision
from transformers import LlamaConfig, LlamaForCausalLM

from okd_lightning.data.columns import Columns
from okd_lightning.data.examples import build_examples
from okd_lightning.data.images import RowImages
from okd_lightning.divergences import ForwardKL
from okd_lightning.errors import ConfigError
from okd_lightning.losses.quantities import ExactDivergence
from okd_lightning.models.processors import load_reader
from okd_lightning.records.collation import collate, dataset_row
from okd_lightning.teachers import CachedTeacher, ForeignTeacher, FrozenSelf, ServedTeacher
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.pair_settings import images_refused

KL = ExactDivergence(ForwardKL())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    vision.save("llava", folder / "seeing")
    tokenizer = vision.make_tokenizer("llava")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return folder


def refusal(*models, **settings) -> str:
    with pytest.raises(ConfigError, match="the data has images") as error:
        DistillationModule(*map(str, models), **settings).pair.use_images()
    return str(error.value)


def test_a_text_model_in_the_pair_is_named(root):
    assert "--model.student is a llama model" in refusal(root / "text", root / "seeing")
    assert "--model.teacher is a llama model" in refusal(root / "seeing", root / "text")
    assert "no model of this run" in refusal(root / "text", root / "text")
    DistillationModule(str(root / "seeing"), str(root / "seeing")).pair.use_images()


def test_a_missing_processor_is_named(root, tmp_path):
    for path in (root / "seeing").iterdir():
        if "processor" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "--model.student has no processor" in refusal(tmp_path, root / "seeing")
    found = DistillationModule(
        str(tmp_path), str(root / "seeing"), tokenizer=str(root / "seeing")
    ).pair.images
    assert found.refusal is None


def test_what_is_sent_text_is_named(root):
    class Engine:
        pass

    for kind in (CachedTeacher, ForeignTeacher, ServedTeacher):
        assert not kind.reads_images
        assert kind.__name__ in images_refused(kind.__new__(kind), None)
    assert "Engine is sent text alone" in images_refused(FrozenSelf(), Engine())
    assert images_refused(FrozenSelf(), None) is None
    pair = DistillationModule(str(root / "seeing"), str(root / "seeing")).pair
    pair.tool_rounds = object()
    with pytest.raises(ConfigError, match=r"leave --data\.tools out"):
        pair.use_images()


def test_saved_processor_is_the_same(root, tmp_path):
    pair = DistillationModule(str(root / "seeing")).pair
    reader = pair.images.student
    config = vision.config_of("llava", pair.tokenizer)
    config.save_pretrained(tmp_path)
    pair.tokenizer.save_pretrained(tmp_path)
    reader.save(tmp_path)
    again = load_reader(str(tmp_path), config, pair.tokenizer, "--model.student")
    assert again.digest == reader.digest
    assert again.mask_ids == reader.mask_ids


def test_a_self_teacher_reads_the_images_of_the_student(root, tmp_path):
    module = DistillationModule(str(root / "seeing"), FrozenSelf())
    module.pair.use_images()
    rows = vision.image_rows(tmp_path, 3)
    found = build_examples(
        rows,
        module.tokenizer,
        eos_id=1,
        columns=Columns(),
        max_prompt_length=250,
        max_response_length=16,
        on_overlong="error",
        needs_response=True,
        where="rows",
        images=RowImages(module.pair.images.student, module.pair.images.teacher, tmp_path),
    )
    module.configure_model()
    module.eval()
    batch = collate([dataset_row(example) for example in found.examples])
    assert not module.measure(batch, (KL,))[KL].any()
