"""Semantics frozen here: rows in other formats train unchanged, or with one error's hint.

* Every hint is followed, as the command line would parse it, until training begins; one is enough.
* Whatever words a row has for prompt and response are then in the trained prompt and response.
* The system column, and columns next to a named prompt column, are read or reported as unread.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import tiny
from foreign_rows import CHATS, FOREIGN, bot, pairs, user

from okd_lightning import DistillationModule, RolloutDataModule
from okd_lightning.callbacks import GKD, SFT
from okd_lightning.data import Columns
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
    """Prompts of a run and their parts with loss, as text, in row order."""

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
            batch_size=len(rows),
            max_prompt_length=400,
            val_rollouts=0,
            **{"max_response_length": 40 if method == "SFT" else 2, **options},
        )
        trainer = tiny.make_trainer(tmp_path, [SFT() if method == "SFT" else on_policy])
        trainer.fit(module, data)
        assert trainer.global_step == 1
        found = data.examples("train", needs_response=method == "SFT").examples
        assert len(found) == len(rows)
        return Trained([e.prompt for e in found], [_with_loss(e, chat_tokenizer) for e in found])

    return fit


def _with_loss(example, tokenizer) -> str:
    """Return the row's ids that carry loss."""
    own = [i for i, mask in zip(example.prompt_ids, example.prompt_mask, strict=True) if mask]
    return tokenizer.decode([*own, *example.response_ids])


@pytest.mark.filterwarnings("ignore:.*chat template does not show (tool_calls|the tools)")
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


def build_error(build, rows, tokenizer, **settings):
    with pytest.raises(DataError) as error:
        build(rows, tokenizer, **settings)
    message = str(error.value)
    assert "\n" not in message
    return message


REFUSED = {
    "kto": (
        pairs("prompt", "completion", label=(True, False)),
        ["row 2", "label", "leave such rows out"],
    ),
    "kto in a table of texts": (
        pairs("prompt", "completion", label=("True", "False")),
        ["row 2", "label", "leave such rows out"],
    ),
    "ms-swift's kto": (
        [{"messages": CHATS[0], "label": True}, {"messages": CHATS[1], "label": False}],
        ["row 2", "label", "leave such rows out"],
    ),
    "messages as pandas writes them": (
        [{"prompt": str(c[:1]), "response": str(c[1:])} for c in CHATS],
        ["row 1", "'prompt'", "as Python prints it", "json.dumps"],
    ),
    "responses as pandas writes them": (
        [{"prompt": "one", "response": f"[{bot('uno')}]"}],
        ["row 1", "'response'", "as Python prints it"],
    ),
    "a first row without a response": (
        [{"prompt": "one"}, {"prompt": "two", "response": "dos"}],
        ["row 1", "no column 'response', which later rows have"],
    ),
    "a first row without a prompt": (
        [{"response": "uno"}, {"prompt": "two", "response": "dos"}],
        ["row 1", "no column 'prompt', which later rows have"],
    ),
    "a first row without a chat": (
        [{"id": 1}, {"messages": CHATS[0]}],
        ["row 1", "no column 'messages', which later rows have"],
    ),
    "oasst": (
        [{"message_id": "1", "parent_id": None, "role": "prompter", "text": "one"}],
        ["one message of a conversation", "join"],
    ),
    "texts in turn": (
        [{"conversations": ["one", "uno"], "source": "made"}],
        ["'conversations' holds a list that is not a chat", '{"messages": [{"role": "user"'],
    ),
    "segments": (
        [{"segments": [{"label": False, "text": "one"}, {"label": True, "text": "uno"}]}],
        ["'segments' holds a list that is not a chat", '{"messages": [{"role": "user"'],
    ),
    "squad": (
        [{"context": "stone", "question": "one", "answers": {"text": ["uno"]}}],
        ["{context}\\n\\n{question}", "--data.response_column NAME"],
    ),
    "two responses": (
        pairs("prompt", "response_a", response_b=("x", "y")),
        ["--data.response_column NAME"],
    ),
    "prompts alone": (
        [{"prompt": "one"}],
        ["dataset responses", "--method GKD --method.on_policy_fraction 1"],
    ),
    "two system prompts": (
        [{"system": "a", "messages": [{"role": "system", "content": "b"}, user("one")]}],
        ["row 1", "another one in 'system'", "--data.system_column null"],
    ),
    "a completion that is a chat": (
        [{"prompt": [user("one")], "response": [user("one"), bot("uno")]}],
        ["row 1", "begins with 'user'", "--data.messages_column response"],
    ),
    "an answer in messages": (
        [{"prompt": "one", "response": [bot("uno")]}],
        ["row 1", "is list", "--data.as_chat true"],
    ),
    "a part that is no text": (
        [{"messages": [user([{"type": "image_url"}]), bot("uno")]}],
        ["message 1", "'image_url'"],
    ),
}


@pytest.mark.parametrize(("rows", "words"), REFUSED.values(), ids=REFUSED)
def test_rows_that_mislead_are_refused(rows, words, build, chat_tokenizer):
    message = build_error(build, rows, chat_tokenizer)
    assert all(word in message for word in words), message


FOLLOWED = {
    "two system prompts": (REFUSED["two system prompts"][0][0] | {"response": "uno"}, "b"),
    "a completion that is a chat": (REFUSED["a completion that is a chat"][0][0], "one"),
    "an answer in messages": (REFUSED["an answer in messages"][0][0], "one"),
    "prompt or chat": (
        {"prompt": "one", "response": "uno", "messages": [user("a"), bot("b")]},
        "a",
    ),
    "text of on-policy runs": ({"text": "one"}, "one"),
}


@pytest.mark.parametrize(("row", "word"), FOLLOWED.values(), ids=FOLLOWED)
def test_other_hints_lead_to_training_too(row, word, train, build, chat_tokenizer):
    method = "on-policy" if row.keys() == {"text"} else "SFT"
    message = build_error(build, [row], chat_tokenizer, needs_response=method == "SFT")
    found = train([row], method, **parsed(hint_of(message)))
    assert word in found.prompts[0]


def test_open_texts_carry_loss_everywhere_but_on_the_first_token(build, make_tokenizer):
    for opening, first in (("", "o"), ("<s>", "<s>")):
        tokenizer = make_tokenizer(opening)
        columns = Columns(prompt=None, response="text")
        (found,) = build([{"text": "one uno"}], tokenizer, columns=columns).examples
        eos = tokenizer.eos_token_id
        assert tokenizer.decode(found.prompt_ids) == first
        assert found.response_ids[-1] == eos
        whole = tokenizer.decode([*found.prompt_ids, *found.response_ids[:-1]])
        assert whole.removeprefix("<s>") == "one uno"
        assert found.response_ids.count(eos) == 1
    message = build_error(build, [{"text": " "}], tokenizer, columns=columns)
    assert "row 1: the text ('text') is empty" in message


UNREAD = {
    "alpaca's input": (
        pairs("prompt", "response", input=("a", "")),
        {},
        """'["{prompt}\\n\\n{input}","{prompt}"]'""",
    ),
    "a system prompt": (
        pairs("prompt", "response", system=("be brief", "")),
        {},
        """'["{system}\\n\\n{prompt}","{prompt}"]'""",
    ),
    "a chat's system prompt": (
        [{"messages": [user("one"), bot("uno")], "system_prompt": "be brief"}],
        {},
        "--data.system_column system_prompt",
    ),
    "inputs that are empty": (pairs("prompt", "response", input=("", "")), {}, None),
    "a template that names it": (
        pairs("prompt", "response", input=("a", "b")),
        {"prompt_template": "{prompt} {input}"},
        None,
    ),
    "a chat's system column": (
        [{"messages": [user("one"), bot("uno")], "system": "be brief"}],
        {},
        None,
    ),
}


@pytest.mark.parametrize(("rows", "options", "advice"), UNREAD.values(), ids=UNREAD)
def test_columns_that_are_not_read_are_named(rows, options, advice, train):
    if advice is None:
        train(rows, **options)
        return
    with pytest.warns(UserWarning, match="not read") as warned:
        train(rows, **options)
    (message,) = [str(w.message) for w in warned if "not read" in str(w.message)]
    assert advice in message
    found = train(rows, **parsed(hint_of(message)))
    assert any("be brief" in prompt or "a" in prompt for prompt in found.prompts)


def test_the_cut_responses_are_a_warning_that_names_the_usual_length(train):
    rows = [{"prompt": "a", "response": "b" * n} for n in (50, 60, 70, 3, 3, 3, 3, 3, 3, 3, 3)]
    with pytest.warns(
        UserWarning, match="27% of the responses are cut at --data.max_resp"
    ) as warned:
        train(rows)
    (message,) = [str(w.message) for w in warned if "are cut" in str(w.message)]
    assert hint_of(message) == "--data.max_response_length 71"
    assert "does not teach the student to stop" in message
    train(rows[2:])  # 1 of 9
    with pytest.warns(UserWarning, match="20% of the responses are cut"):
        train(rows[1:])  # 2 of 10: from 20 % on
    train(rows, max_response_length=71)


def documented() -> dict[str, tuple[dict[str, Any], str]]:
    """The tables of both pages on other trainers: format → a row, and its flags."""
    lines = []
    for name in ("from_trl", "from_others"):
        page = (Path(__file__).parents[2] / "docs" / f"{name}.md").read_text()
        section = page.split("\n## Data sets\n")[1].split("\n## ")[0]
        lines += [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {
        name: (json.loads(row.strip("`")), "" if flags == "none" else flags.strip("`"))
        for name, row, flags, *_ in cells
    }


@pytest.mark.parametrize("name", documented())
def test_the_documented_flags_are_the_hints_and_train(name, train, build, chat_tokenizer):
    row, flags = documented()[name]
    method = "on-policy" if "rompt-only" in name else "SFT"
    if flags:
        message = build_error(build, [row], chat_tokenizer, needs_response=method == "SFT")
        assert hint_of(message) == flags
    found = train([row], method, **parsed(flags))
    row.pop("rejected", None)
    digits = [character for text in _texts(row) for character in text if character.isdigit()]
    read = found.prompts[0] + found.responses[0]
    assert [character for character in read if character.isdigit()] == digits


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _texts(item)]
