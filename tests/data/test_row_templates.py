"""Semantics frozen here: prompts made of several columns, and prompts as chats.

* of several templates a row takes the first whose columns it fills; cells are put in as they are;
* ``as_chat`` converts a prompt to a chat with one user message of that text;
* both are checked before anything is tokenized, and a message says what to type.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from byte_tokenizer import CHATML

from okd_lightning.data import Columns, RolloutDataModule
from okd_lightning.errors import ConfigError, DataError

DOLLY = ("{instruction}\n\n{context}\n", "{instruction}\n")
ROWS = [
    {"instruction": "Sum {up}", "context": "a {b}", "response": "x", "category": "summarization"},
    {"instruction": "Name one", "context": "", "response": "y", "category": "open_qa"},
    {"instruction": "Name two", "response": "z"},
]
FILLED = ["Sum {up}\n\na {b}\n", "Name one\n", "Name two\n"]


def test_a_row_takes_the_first_template_that_it_fills(byte_tokenizer, build):
    found = build(ROWS, byte_tokenizer, columns=Columns(templates=DOLLY)).examples
    expected = build(
        [{"prompt": p, "response": r["response"]} for p, r in zip(FILLED, ROWS, strict=True)],
        byte_tokenizer,
    ).examples
    assert [example.prompt for example in found] == FILLED
    assert found == expected


def test_a_template_may_read_the_prompt_column_itself(byte_tokenizer, build):
    columns = Columns(prompt="question", response="answer", templates=("{question}?",))
    (found,) = build([{"question": "a", "answer": "b"}], byte_tokenizer, columns=columns).examples
    assert (found.prompt, found.response) == ("a?", "b")


@pytest.mark.parametrize("templates", [(), ("{instruction}!",)])
def test_a_prompt_is_what_a_user_would_have_said(templates, chat_tokenizer, build):
    columns = Columns(prompt="instruction", templates=templates, as_chat=True)
    found = build(ROWS[1:], chat_tokenizer, columns=columns).examples
    end = "!" if templates else ""
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"] + end},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in ROWS[1:]
    ]
    assert found == build(chats, chat_tokenizer).examples


def test_the_chat_template_is_told_what_was_given(chat_tokenizer, build):
    tokenizer = copy.deepcopy(chat_tokenizer)
    think = "{% if enable_thinking is defined and not enable_thinking %}(no){% endif %}"
    tokenizer.chat_template = think + CHATML
    for row, prompt in ((ROWS[1], "Name one"), (ROWS[2], "Name two")):
        columns = Columns(prompt="instruction", as_chat=True)
        (plain,) = build([row], tokenizer, columns=columns).examples
        columns = replace(columns, chat_template_kwargs={"enable_thinking": False})
        (told,) = build([row], tokenizer, columns=columns).examples
        assert prompt in plain.prompt
        assert (told.prompt, told.response_ids) == ("(no)" + plain.prompt, plain.response_ids)


def test_chats_of_prompts_need_responses_where_rows_do(chat_tokenizer, build):
    columns = Columns(prompt="instruction", as_chat=True)
    row = {"instruction": "a", "output": "b"}
    with pytest.raises(DataError, match=r"--data\.response_column output"):
        build([row], chat_tokenizer, columns=columns)
    (found,) = build([row], chat_tokenizer, columns=columns, needs_response=False).examples
    assert found.response_ids == ()


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (Columns(templates=("{instuction}",)), ROWS, "{instuction}, which is not a column"),
        (Columns(templates=("{instuction}",)), ROWS, "did you mean {instruction}?"),
        (Columns(templates=("{context}",)), ROWS, "row 2: fills no --data.prompt_template"),
        (Columns(templates=("{n}",)), [{"n": 1, "response": "a"}], "'n', .* is int, expected text"),
        (
            Columns(as_chat=True),
            [{"messages": [{"role": "user", "content": "a"}]}],
            "leave --data.as_chat out",
        ),
        (
            Columns(chat_template_kwargs={"enable_thinking": False}),
            [{"prompt": "a", "response": "b"}],
            "set --data.as_chat true, or leave them out",
        ),
        (Columns(as_chat=True), [{"prompt": "", "response": "a"}], "row 1: the prompt"),
    ],
)
def test_rows_that_do_not_fit_are_refused(columns, rows, message, chat_tokenizer, build):
    with pytest.raises(DataError, match=message):
        build(rows, chat_tokenizer, columns=columns)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("as it is", "names no field"),
        ("{question", "expected {COLUMN}"),
        ("{question.upper}", "is not the name of a column"),
        ("{question[0]}", "is not the name of a column"),
        ("{question!r}", "is not the name of a column"),
        ("{}", "is not the name of a column"),
        (["{question}", ""], "names no field"),
    ],
)
def test_templates_are_checked_first(template, message):
    with pytest.raises(ConfigError, match=message):
        RolloutDataModule("rows.jsonl", prompt_template=template)
