"""Plain prompts with a tokenizer that has a chat template.

Frozen here: ``fit`` says that a chat model wants messages, once, for the training data alone; with
chats, whole texts, or no template it says nothing.
"""

from __future__ import annotations

import pytest
import tiny

from okd_lightning import KD, RolloutDataModule

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
