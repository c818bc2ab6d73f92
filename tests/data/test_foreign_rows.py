"""Semantics frozen here: rows as others write them train as they are, or by one error's hint.

* Every hint is followed, as the command line would parse it, until training begins; one is enough.
* Whatever words a row has for prompt and response are then in the trained prompt and response.
* The system column, and columns beside a prompt that is named, are read or said not to be.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import jsonargparse
import pytest
import tiny
from foreign_rows import FOREIGN

from okd_lightning import DistillationModule, RolloutDataModule
from okd_lightning.callbacks import GKD, SFT
from okd_lightning.errors import DataError

HINT = re.compile(r"use ((?:--data\.\w+ (?:'[^']*'|[^\s;,]+) ?)+)")


def hint_of(message: str) -> str:
    found = HINT.search(message)
    assert found, message
    return found[1].strip()


def parsed(options: str) -> dict[str, Any]:
    """Options as the command line takes them."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RolloutDataModule, "data")
    given = parser.parse_args(shlex.split(options)).data.as_dict()
    names = [word.removeprefix("--data.") for word in shlex.split(options) if "--data." in word]
    return {name: given[name] for name in names}


@dataclass
class Trained:
    """What a run learnt from: prompts and what carried loss in them, as text, in row order."""

    prompts: list[str]
    responses: list[str]


@pytest.fixture
def train(tmp_path, chat_tokenizer):
    """Train one epoch on rows; returns what was read."""

    def fit(rows, method="SFT", **options) -> Trained:
        on_policy = GKD(on_policy_fraction=1.0)
        module = DistillationModule(
            student=tiny.make_llama(1, rows=300, max_position_embeddings=512),
            teacher=None if method == "SFT" else tiny.make_llama(2, rows=300),
            tokenizer=chat_tokenizer,
            learning_rate=1e-3,
        )
        data = RolloutDataModule(
            rows,
            batch_size=2,
            max_prompt_length=400,
            max_response_length=40 if method == "SFT" else 2,
            val_rollouts=0,
            **options,
        )
        trainer = tiny.make_trainer(tmp_path, [SFT() if method == "SFT" else on_policy])
        trainer.fit(module, data)
        assert trainer.global_step == 1
        found = data.examples("train", needs_response=method == "SFT").examples
        assert len(found) == len(rows)
        return Trained([e.prompt for e in found], [_with_loss(e, chat_tokenizer) for e in found])

    return fit


def _with_loss(example, tokenizer) -> str:
    own = [i for i, mask in zip(example.prompt_ids, example.prompt_mask, strict=True) if mask]
    return tokenizer.decode([*own, *example.response_ids])


@pytest.mark.parametrize("name", FOREIGN)
def test_rows_train_as_they_are_or_by_one_hint(name, train):
    foreign = FOREIGN[name]
    options: dict[str, Any] = {}
    if foreign.options:
        with pytest.raises(DataError) as error:
            train(foreign.rows, foreign.method)
        assert hint_of(str(error.value)) == foreign.options
        options = parsed(foreign.options)
    found = train(foreign.rows, foreign.method, **options)
    for texts, words in ((found.prompts, foreign.prompts), (found.responses, foreign.responses)):
        for text, wanted in zip(texts, words, strict=True):
            assert all(word in text for word in wanted), (text, wanted)
