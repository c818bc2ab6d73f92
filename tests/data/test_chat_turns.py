"""Semantics frozen here: keys switch a turn's loss off, and tool calls are read in every form.

A chat ends with the last turn that is learned; a turn without loss is context. Values that no mask
can express, keys about parts of a turn, and loss on other roles are refused. Of TRL's prompt and
completion the completion alone is learned. Arguments of tool
calls given as JSON text render as those given as an object.
"""

from __future__ import annotations

import json

import pytest

from okd_lightning.data.columns import Columns
from okd_lightning.errors import DataError

ASK, AGAIN = {"role": "user", "content": "One?"}, {"role": "user", "content": "Two?"}
ONE, TWO = {"role": "assistant", "content": "1"}, {"role": "assistant", "content": "2"}
OFF = [{"weight": 0}, {"train": False}, {"loss": False}, {"training": 0}, {"loss_weight": 0.0}]
ON = [{"weight": 1}, {"train": True}, {"loss": 1.0}, {"trainable": True}]


def learned(tokenizer, example) -> str:
    """The tokens that carry loss, as text."""
    marked = zip(example.prompt_ids, example.prompt_mask, strict=True)
    return tokenizer.decode([*(i for i, m in marked if m), *example.response_ids])


@pytest.mark.parametrize("off", OFF)
def test_a_turn_whose_loss_is_off_is_context(off, chat_tokenizer, build):
    messages = [ASK, {**ONE, **off}, AGAIN, TWO]
    (example,) = build([{"messages": messages}], chat_tokenizer).examples
    (plain,) = build([{"messages": [ASK, ONE, AGAIN, TWO]}], chat_tokenizer).examples
    assert example.prompt_ids == plain.prompt_ids
    assert learned(chat_tokenizer, example) == "2<|im_end|>"
    assert learned(chat_tokenizer, plain) == "1<|im_end|>2<|im_end|>"


@pytest.mark.parametrize("off", OFF)
def test_a_chat_ends_with_its_last_turn_that_is_learned(off, chat_tokenizer, build):
    rows = [{"messages": [ASK, ONE, AGAIN, {**TWO, **off}]}, {"messages": [ASK, ONE]}]
    cut, short = build(rows, chat_tokenizer).examples
    assert (cut.prompt_ids, cut.response_ids) == (short.prompt_ids, short.response_ids)
    assert cut.response == "1"


def test_a_chat_without_a_turn_that_is_learned_is_a_prompt(chat_tokenizer, build):
    off = {"weight": 0}
    rows = [{"messages": [ASK, {**ONE, **off}, AGAIN, {**TWO, **off}]}]
    (example,) = build(rows, chat_tokenizer, needs_response=False).examples
    assert learned(chat_tokenizer, example) == ""
    assert example.prompt.endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    with pytest.raises(DataError, match="empty response: 1"):
        build(rows, chat_tokenizer)


@pytest.mark.parametrize("on", ON)
def test_keys_that_say_what_is_done_anyway_change_nothing(on, chat_tokenizer, build):
    marked = [{**ASK, "weight": 0}, {**ONE, **on}, {**AGAIN, "train": False}, {**TWO, **on}]
    found = build([{"messages": marked}], chat_tokenizer)
    assert found == build([{"messages": [ASK, ONE, AGAIN, TWO]}], chat_tokenizer)


@pytest.mark.parametrize("response", ["completion", "chosen"])
@pytest.mark.parametrize(
    ("answer", "turns"),
    [
        ([TWO], "2<|im_end|>"),
        ([TWO, AGAIN, {**ONE, "content": "3"}], "2<|im_end|>3<|im_end|>"),
        ("2", "2<|im_end|>"),
    ],
)
def test_of_prompt_and_completion_the_completion_is_learned(
    answer, turns, response, chat_tokenizer, build
):
    row = {"prompt": [ASK, ONE, AGAIN], response: answer}
    columns = Columns(response=response)
    (example,) = build([row], chat_tokenizer, columns=columns).examples
    assert learned(chat_tokenizer, example) == turns
    assert "1<|im_end|>" in chat_tokenizer.decode(example.prompt_ids)
    marked = {**row, "prompt": [ASK, {**ONE, "weight": 1}, AGAIN]}
    (example,) = build([marked], chat_tokenizer, columns=columns).examples
    assert learned(chat_tokenizer, example) == f"1<|im_end|>{turns}"
    chat = {"messages": row["prompt"], "response": "2"}
    (example,) = build([chat], chat_tokenizer).examples
    assert learned(chat_tokenizer, example) == "1<|im_end|>2<|im_end|>"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({**ONE, "weight": 0.5}, r"message 2 has 'weight': 0\.5; expected 0 or 1"),
        ({**ONE, "loss": "no"}, r"message 2 has 'loss': 'no'; expected 0 or 1"),
        ({**ONE, "train_detail": []}, r"message 2 has 'train_detail', .* not supported"),
        ({**ONE, "function_call": {"name": "a"}}, r"message 2 has 'function_call'.*tool_calls"),
        ({**AGAIN, "train": True}, r"message 2 \(user\) has 'train': True, but loss lies"),
    ],
)
def test_what_no_mask_can_express_is_refused(message, words, chat_tokenizer, build):
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: " + words):
        build([{"messages": [ASK, message, TWO]}], chat_tokenizer)


CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    "{{ f.name }}{{ f.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_of(arguments, is_flat=False):
    call = {"name": "warm", "arguments": arguments}
    calls = [call] if is_flat else [{"id": "1", "type": "function", "function": call}]
    return {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": calls}]}


@pytest.mark.parametrize("is_flat", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"place": "Bern", "days": [1, 2.5, None]}])
def test_arguments_as_json_text_render_as_the_object(arguments, is_flat, chat_tokenizer, build):
    chat_tokenizer.chat_template = CALLS
    rows = [chat_of(arguments, is_flat), chat_of(json.dumps(arguments, indent=1), is_flat)]
    given, as_text = build(rows, chat_tokenizer).examples
    assert given.response_ids == as_text.response_ids
    assert chat_tokenizer.decode(given.response_ids) == f"warm{json.dumps(arguments)}<|im_end|>"


@pytest.mark.parametrize("arguments", ["", " "])
def test_no_text_is_no_arguments(arguments, chat_tokenizer, build):
    chat_tokenizer.chat_template = CALLS
    (example,) = build([chat_of(arguments)], chat_tokenizer).examples
    assert chat_tokenizer.decode(example.response_ids) == "warm{}<|im_end|>"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("{'a': 1}", "text that is not JSON"), ("[1]", "JSON text of list, expected an object")],
)
def test_arguments_that_are_no_object_are_refused(arguments, words, chat_tokenizer, build):
    with pytest.raises(DataError, match=rf"row 1: message 2, tool call 1: .*{words}"):
        build([chat_of(arguments)], chat_tokenizer)
