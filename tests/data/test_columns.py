"""Semantics frozen here: a wrong column or cell is refused, and the message says what to type."""

from __future__ import annotations

import pytest

from okd_lightning.data import Columns, load_rows
from okd_lightning.errors import DataError

USER = {"role": "user", "content": "a"}
CHAT = [USER, {"role": "assistant", "content": "b"}]

MISSING_COLUMNS = {
    "gsm8k": (
        {"question": "a", "answer": "b"},
        Columns(),
        ["'prompt'", "'question', 'answer'", "_column question --data.response_column answer"],
    ),
    "alpaca": (
        {"instruction": "a", "output": "b"},
        Columns(),
        ["--data.prompt_column instruction", "--data.response_column output"],
    ),
    "near name": ({"prompts": "a", "response": "b"}, Columns(), ["--data.prompt_column prompts"]),
    "nothing near": ({"xyz": "a"}, Columns(), ["found: 'xyz'", "--data.prompt_column NAME"]),
    "an empty row": ({}, Columns(), ["found: none"]),
    "chat of another name": (
        {"conversations": CHAT},
        Columns(),
        ["--data.messages_column conversations"],
    ),
    "response": (
        {"prompt": "a", "completion": "b"},
        Columns(),
        ["no column 'response'", "dataset responses", "--data.response_column completion"],
    ),
    "mapped prompt": (
        {"question": "a", "response": "b"},
        Columns(prompt="questoin"),
        ["'questoin'", "--data.prompt_column", "did you mean 'question'?"],
    ),
    "mapped chat": ({"prompt": "a", "response": "b"}, Columns(messages="chat"), ["'chat'"]),
    "prompt and chat": (
        {"prompt": "a", "messages": CHAT},
        Columns(),
        ["to read the chats use --data.prompt_column null"],
    ),
    "prompt, response and chat": (
        {"prompt": "a", "response": "b", "messages": CHAT},
        Columns(),
        ["--data.prompt_column null", "--data.messages_column null"],
    ),
    "tools of plain prompts": (
        {"prompt": "a", "response": "b", "functions": "[]"},
        Columns(tools="functions"),
        ["--data.tools_column functions is read in chats", "set --data.as_chat true"],
    ),
    "a system prompt of plain prompts": (
        {"prompt": "a", "response": "b", "persona": "c"},
        Columns(system="persona"),
        ["--data.system_column persona is read in chats", "set --data.as_chat true"],
    ),
    "no prompts wanted": ({"prompt": "a"}, Columns(prompt=None), ["--data.messages_column NAME"]),
    "neither wanted": (
        {"prompt": "a"},
        Columns(prompt=None, messages=None),
        ["--data.messages_column NAME"],
    ),
}


def refused(build, row, tokenizer, *words, **settings):
    with pytest.raises(DataError) as error:
        build([row] if isinstance(row, dict) else row, tokenizer, **settings)
    message = str(error.value)
    assert "\n" not in message
    for word in ("rows.jsonl", *words):
        assert word in message, message


@pytest.mark.parametrize("named", [{"tools": "functions"}, {"system": "persona"}])
def test_a_column_that_is_optional_may_be_absent_from_the_first_row(named, chat_tokenizer, build):
    rows = [{"messages": CHAT}, {"messages": CHAT, "functions": "[]", "persona": "c"}]
    _, second = build(rows, chat_tokenizer, columns=Columns(**named)).examples
    assert ("c<|im_end|>" in second.prompt) == ("system" in named)


@pytest.mark.parametrize("named", [{"tools": "functions"}, {"system": "persona"}])
def test_the_hint_of_columns_for_chats_is_true(named, chat_tokenizer, build):
    row = {"prompt": "a", "response": "b", "functions": "[]", "persona": "c"}
    columns = Columns(**named, as_chat=True)
    (example,) = build([row], chat_tokenizer, columns=columns).examples
    assert ("c<|im_end|>" in example.prompt) == ("system" in named)


@pytest.mark.parametrize(("row", "columns", "words"), MISSING_COLUMNS.values(), ids=MISSING_COLUMNS)
def test_missing_columns_name_the_option(row, columns, words, build, chat_tokenizer):
    refused(build, row, chat_tokenizer, *words, columns=columns)


def test_a_response_column_that_was_named_must_exist_even_if_not_needed(build, byte_tokenizer):
    columns = Columns(response="anser")
    row = {"prompt": "a", "answer": "b"}
    refused(
        build, row, byte_tokenizer, "'anser'", "'answer'?", columns=columns, needs_response=False
    )


WRONG_CELLS = {
    "number": ({"prompt": 3, "response": "b"}, ["the prompt ('prompt') is int"]),
    "null": ({"prompt": None, "response": "b"}, ["the prompt ('prompt') is NoneType"]),
    "empty": ({"prompt": "", "response": "b"}, ["is empty"]),
    "chat": ({"prompt": CHAT, "response": "b"}, ["is list, expected text as in the first row"]),
    "response": ({"prompt": "a", "response": ["b"]}, ["the response ('response') is list"]),
    "no prompt": ({"response": "b"}, ["no column 'prompt'", "found: 'response'"]),
    "no response": ({"prompt": "a"}, ["no column 'response'"]),
    "half a prompt": (
        {"prompt": "ab\ud83d", "response": "b"},
        ["the prompt ('prompt') holds half a character (\\ud83d", "at character 3"],
    ),
    "half a response": (
        {"prompt": "a", "response": "\ude00b"},
        ["the response ('response') holds half a character (\\ude00"],
    ),
}


@pytest.mark.parametrize(("row", "words"), WRONG_CELLS.values(), ids=WRONG_CELLS)
def test_a_wrong_cell_is_named_by_row(row, words, build, byte_tokenizer):
    good = {"prompt": "a", "response": "b"}
    refused(build, [good, good, row], byte_tokenizer, "row 3", *words)


WRONG_CHATS = {
    "text": ("hello", ["is str", "list of messages"]),
    "empty": ([], ["an empty list"]),
    "strings": (["hello"], ["message 1", "str"]),
    "no role": ([{"content": "a"}], ["message 1", '"role"', "'content'"]),
    "no content": ([USER, {"role": "assistant"}], ["message 2", 'no "content"']),
    "parts": (
        [{"role": "user", "content": [{"type": "image"}]}],
        ["message 1", "image", "text alone"],
    ),
    "no keys": ([{"speaker": "human", "text": "a"}], ['"role"', "'speaker', 'text'"]),
    "a call that is none": (
        [USER, {"from": "function_call", "value": "{"}],
        ["message 2", "call of a tool", "not valid JSON"],
    ),
    "assistant first": (CHAT[1:], ["begins with the assistant"]),
    "half a character": (
        [{"role": "user", "content": "a\ud83d"}],
        ["the chat holds half a character (\\ud83d"],
    ),
}


@pytest.mark.parametrize(("chat", "words"), WRONG_CHATS.values(), ids=WRONG_CHATS)
def test_a_wrong_chat_is_named_by_row_and_message(chat, words, build, chat_tokenizer):
    refused(build, [{"messages": CHAT}, {"messages": chat}], chat_tokenizer, "row 2", *words)


@pytest.mark.parametrize("tools", ["[{", 3, {"name": "f"}, ["{"]])
def test_tools_must_be_a_list(tools, build, chat_tokenizer):
    refused(build, {"messages": CHAT, "tools": tools}, chat_tokenizer, "row 1", "tools")


def test_columns_are_mapped(build, byte_tokenizer):
    rows = [{"id": 7, "question": "a", "answer": "b"}]
    columns = Columns(prompt="question", response="answer")
    (example,) = build(rows, byte_tokenizer, columns=columns).examples
    assert (example.prompt, example.response) == ("a", "b")


def test_either_of_prompt_and_chat_can_be_chosen(build, chat_tokenizer):
    rows = [{"prompt": "p", "response": "r", "messages": CHAT}]
    text = build(rows, chat_tokenizer, columns=Columns(messages=None)).examples[0]
    chat = build(rows, chat_tokenizer, columns=Columns(prompt=None)).examples[0]
    assert (text.response, chat.response) == ("r", "b")


def test_real_gsm8k_says_how_to_map_itself(shared_data, build, byte_tokenizer):
    rows = load_rows(shared_data / "datasets" / "gsm8k" / "test.jsonl")
    options = "use --data.prompt_column question --data.response_column answer"
    refused(build, rows, byte_tokenizer, options)
