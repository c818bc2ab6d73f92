"""Contents of chats that the template leaves out: frozen semantics.

* Messages of a role, the tools of a row, calls of tools, and the thinking of the last turn that the
  template does not show are one warning each, at most once a data set.
* What the template shows, and earlier thinking that it drops, are no warning.
"""

from __future__ import annotations

import pytest

from okd_lightning.data.columns import Columns

ASKED = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = {**ANSWER, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
TWO_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ m.role }}:{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SHOWS_ALL = (
    "{{ tools }}{% for m in messages %}{{ m.role }}:{{ m.tool_calls }}"
    "{% if loop.last or m.role != 'assistant' %}{{ m.reasoning_content }}{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)

LEFT_OUT = {
    "system": ([{"role": "system", "content": "c"}, ASKED, ANSWER], {}, "the role 'system'"),
    "a later system": (
        [ASKED, ANSWER, {"role": "system", "content": "c"}, ASKED, ANSWER],
        {},
        "'system' after the first one",
    ),
    "a tool's answer": (
        [ASKED, ANSWER, {"role": "tool", "content": "3"}, ANSWER],
        {},
        "the role 'tool'",
    ),
    "thinking": ([ASKED, {**ANSWER, "reasoning_content": "c"}], {}, "'reasoning_content'"),
    "calls": ([ASKED, CALL], {}, "tool_calls"),
    "tools": ([ASKED, ANSWER], {"tools": [TOOL]}, "the tools of rows"),
}


@pytest.mark.parametrize(("messages", "others", "words"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_content_without_effect_is_one_warning(messages, others, words, chat_tokenizer, build):
    rows = [{"messages": messages, **others}] * 2
    chat_tokenizer.chat_template = TWO_ROLES
    with pytest.warns(UserWarning, match=f"rows.jsonl: the chat template does not show .*{words}"):
        (note,) = build(rows, chat_tokenizer).notes
    assert words in note
    chat_tokenizer.chat_template = SHOWS_ALL
    assert not [text for text in build(rows, chat_tokenizer).notes if "does not show" in text]


def test_earlier_thinking_and_declared_tools_are_no_warning(chat_tokenizer, build):
    thinking = {**ANSWER, "reasoning_content": "c"}
    rows = [{"messages": [ASKED, thinking, ASKED, ANSWER]}]
    assert build(rows, chat_tokenizer, columns=Columns(declared_tools=(TOOL,))).notes == ()
