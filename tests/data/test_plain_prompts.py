"""Plain prompts with a tokenizer that has a chat template.

Frozen here: ``fit`` says that a chat model wants messages, once, for the training data alone; with
chats, whole texts, or no template it says nothing. Images in plain prompts have the tokens around
them that the model's chats have.
"""

from __future__ import annotations

import pytest
import tiny
import vision
from transformers import AutoConfig

from okd_lightning import KD, RolloutDataModule
from okd_lightning.data.columns import Columns
from okd_lightning.data.examples import build_examples
from okd_lightning.data.images import RowImages
from okd_lightning.models.multimodal import FAMILIES
from okd_lightning.models.processors import load_reader

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "settings", "is_told"),
    [
        (TEMPLATE, {}, True),
        (TEMPLATE, {"as_chat": True}, False),
        (TEMPLATE, {"prompt_column": None}, False),
        (None, {}, False),
    ],
    ids=["plain", "chats", "whole texts", "no template"],
)
def test_a_chat_model_that_reads_plain_prompts(
    template, settings, is_told, tmp_path, make_module, caplog
):
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = template
    rows = tiny.make_rows(4)
    data = RolloutDataModule(rows, rows, max_response_length=4, val_rollouts=0, **settings)
    with caplog.at_level("INFO"):
        trainer = tiny.make_trainer(tmp_path, [KD()], max_steps=1)
        trainer.fit(make_module(tokenizer=tokenizer), data)
    told = [r.getMessage() for r in caplog.records if "wants messages" in r.getMessage()]
    assert len(told) == is_told
    assert all(line.startswith("train: plain prompts") for line in told)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_prompts_have_the_tokens_of_chats(family, tmp_path):
    """The ids of "x<image>y" are those that a chat of this text has between its own."""
    tokenizer = vision.make_tokenizer(family)
    path = vision.save(family, tmp_path / family)
    own = load_reader(path, AutoConfig.from_pretrained(path), tokenizer, "--model.student")
    vision.picture(0).save(tmp_path / "a.png")
    settings = {"eos_id": 1, "where": "rows", "max_prompt_length": 250, "max_response_length": 8}
    settings |= {"on_overlong": "error", "needs_response": True, "columns": Columns()}

    def ids(row) -> tuple[int, ...]:
        images = RowImages(own, None, tmp_path)
        (example,) = build_examples([row], own.tokenizer, images=images, **settings).examples
        return example.prompt_ids

    def plain(text: str) -> tuple[int, ...]:
        return ids({"prompt": text, "response": "b", "images": ["a.png"]})

    opening, closing = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("U:", "\nA:"))
    content = [{"type": "text", "text": "x"}, {"type": "image", "path": "a.png"}]
    content.append({"type": "text", "text": "y"})
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    assert ids({"messages": turns}) == (*opening, *plain("x<image>y"), *closing)
    before, after = own.around
    assert bool(before and after) == family.startswith("qwen")
    assert plain(f"x{before}<image>{after}y") == plain("x<image>y")
