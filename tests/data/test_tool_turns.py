"""Text of a chat template between two turns with tool calls, and refused templates.

Frozen here: with Qwen's template and with a small one, ids after a call are the template's own, in
one stretch; a conversation written in turns is the data set's row of the same conversation, ids and
masks; rows that name no tools are shown the declared ones; a response column answers a chat.
"""

from __future__ import annotations

import json

import pytest
import tool_chats
from tool_chats import END, call_of

from okd_lightning.data import Columns, RolloutDataModule
from okd_lightning.data.tool_turns import ToolTurns
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.engines.tool_rollouts import Exchange, ToolEngine
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.records import Request
from okd_lightning.records.collation import dataset_row
from okd_lightning.records.requests import Chat
from okd_lightning.tools import Calculator, Toolbox
from okd_lightning.tools.tool_calls import ToolCall

SCHEMAS = Toolbox([Calculator()]).schemas
CALL = {"type": "function", "function": {"name": "calculator", "arguments": {"expression": "3*7"}}}
CHAT = [
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "I count.", "tool_calls": [CALL, CALL]},
    {"role": "tool", "content": "21"},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "21, I am sure."},
]


@pytest.fixture(params=["qwen", "small"])
def tokenizer(request):
    """Qwen's own tokenizer and template; and one that needs no file."""
    if request.param == "small":
        return tool_chats.make_tokenizer()
    return request.getfixturevalue("real_tokenizer")("tokenizers/qwen2.5")


def declared(**overrides) -> Columns:
    return Columns(declared_tools=SCHEMAS, **overrides)


def test_what_is_written_in_turns_is_the_row_of_the_whole_chat(tokenizer, build):
    row = {"messages": CHAT, "tools": list(SCHEMAS)}
    (whole,) = build([row], tokenizer).examples
    (prompt,) = build(
        [{"messages": CHAT[:1]}], tokenizer, needs_response=False, columns=declared()
    ).examples
    rendered = [
        tokenizer.apply_chat_template(
            CHAT[:k], tools=list(SCHEMAS), tokenize=False, add_generation_prompt=is_prompt
        )
        for k, is_prompt in ((1, True), (2, False), (4, True), (5, False), (6, True), (7, False))
    ]
    own = [rendered[k][len(rendered[k - 1]) :].rstrip("\n") for k in (1, 3, 5)]
    engine = tool_chats.ScriptedEngine(tokenizer, {0: own})
    rounds = tool_chats.rounds_of(tokenizer, tools=[Calculator()])
    rollout = ToolEngine(engine, rounds).respond(
        Request((prompt.prompt_for("student"),), Sampling(), NoiseStream(0, 0), 4000)
    )
    given = dataset_row(whole)
    assert prompt.prompt_ids + rollout.response_ids[0] == given.input_ids
    assert (False,) * len(prompt.prompt_ids) + rollout[0].mask == given.mask
    assert [seen[0] for seen in engine.seen] == [rendered[0], rendered[2], rendered[4]]


def test_rows_that_name_no_tools_are_shown_the_declared_ones(tokenizer, build):
    own = [{"type": "function", "function": {"name": "own_tool", "parameters": {}}}]
    rows = [
        {"messages": CHAT[:1], "tools": None},
        {"messages": CHAT[:1], "tools": json.dumps(own)},
        {"messages": CHAT[:1], "tools": "[]"},
    ]
    built = build(rows, tokenizer, needs_response=False, columns=declared())
    shown = [("calculator" in e.prompt, "own_tool" in e.prompt) for e in built.examples]
    assert shown == [(True, False), (False, True), (True, False)]
    assert [e.chat.tools[0]["function"]["name"] for e in built.examples] == [
        "calculator",
        "own_tool",
        "calculator",
    ]
    assert built.examples[0].chat.messages == (CHAT[0],)
    undeclared = build(rows[:1], tokenizer, needs_response=False)
    assert undeclared.examples[0].chat.tools is None
    assert "calculator" not in undeclared.examples[0].prompt


def test_a_tools_column_of_another_name(tokenizer, build):
    row = {"messages": CHAT, "functions": list(SCHEMAS)}
    built = build([row], tokenizer, columns=Columns(tools="functions"))
    assert built == build([{"messages": CHAT, "tools": list(SCHEMAS)}], tokenizer)
    with pytest.raises(DataError, match=r"no column 'function', which --data\.tools_column names"):
        build([row], tokenizer, columns=Columns(tools="function"))
    assert RolloutDataModule([row], tools_column="functions").columns.tools == "functions"


def test_the_response_column_answers_a_chat(tokenizer, build):
    response = f"So: {call_of('1+1')}"
    as_column = build([{"messages": CHAT[:1], "response": response}], tokenizer)
    spoken = {"role": "assistant", "content": response}
    assert as_column == build([{"messages": [CHAT[0], spoken]}], tokenizer)
    (example,) = as_column.examples
    assert example.response == response
    for blank in ({"response": " "}, {"response": None}, {}):
        (prompt,) = build(
            [{"messages": CHAT[:1], **blank}], tokenizer, needs_response=False
        ).examples
        assert (prompt.response_ids, prompt.prompt_ids) == ((), example.prompt_ids)
    answered = {"messages": [CHAT[0], spoken], "response": "not read"}
    assert build([answered], tokenizer) == as_column


def test_results_of_calls_that_are_no_objects_are_shown(tokenizer):
    turns = ToolTurns(tokenizer, eos_id=tokenizer.eos_token_id)
    exchange = Exchange((ToolCall("", None), ToolCall('"\n', {"a": [1]})), ("one", "two"))
    chat = Chat((CHAT[0],), None)
    twice, once = turns.continuations([(chat, [exchange, exchange]), (chat, [exchange])])
    assert twice == once
    text = tokenizer.decode(once)
    assert 0 < text.index("one") < text.index("two")


def template(after_turn="<|im_end|>\n", tool="{{ m.content }}", at_end="", first=""):
    return (
        f"{first}{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n"
        f"{{% if m.role == 'tool' %}}{tool}{{% else %}}{{{{ m.content }}}}"
        "{% for call in m.tool_calls or [] %}[{{ call.function.name }}]{% endfor %}{% endif %}"
        f"{after_turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% else %}}{at_end}{{% endif %}}"
        "{% if tools and false %}{% endif %}"
    )


REFUSED = {
    "counts messages": (template(first="{{ messages | length }}"), "not prefix-stable"),
    "ends the last turn otherwise": (template(at_end="</s>"), "not prefix-stable"),
    "shows no results": (template(tool=""), "does not show what tools answer"),
    "closes no turn": (template(after_turn="\n"), "closes a turn with no special token"),
    "refuses tools": (
        template(tool="{{ raise_exception('no tools here') }}"),
        "refuses this chat .*no tools here",
    ),
    "none": (None, "has no chat_template"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_cannot_be_used_is_refused(name):
    text, problem = REFUSED[name]
    tokenizer = tool_chats.make_tokenizer(text)
    with pytest.raises((ConfigError, DataError), match=rf"(?s)data\.tools.*{problem}"):
        ToolTurns(tokenizer, eos_id=END).check(SCHEMAS)


def test_a_template_that_lists_no_tools_warns():
    tokenizer = tool_chats.make_tokenizer(template())
    with pytest.warns(UserWarning, match="does not list tools"):
        assert ToolTurns(tokenizer, eos_id=tool_chats.EOS).check(SCHEMAS) == [END]


def test_a_template_that_takes_one_call_a_turn_still_shows_all_results():
    single = tool_chats.TEMPLATE.replace(
        "{% for call in m.tool_calls or [] %}",
        "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}"
        "{% for call in m.tool_calls or [] %}",
    )
    exchange = Exchange((ToolCall("a", {}), ToolCall("b", {})), ("one", "two"))
    chat = Chat((CHAT[0],), None)
    found = [
        ToolTurns(tool_chats.make_tokenizer(text), eos_id=END).continuations([(chat, [exchange])])
        for text in (single, tool_chats.TEMPLATE)
    ]
    assert found[0] == found[1]


def test_plain_rows_with_tools_are_refused(tokenizer, build):
    with pytest.raises(
        DataError, match=r"rows\.jsonl: the rows are plain prompts, and --data.tools"
    ):
        build([{"prompt": "a", "response": "b"}], tokenizer, columns=declared())
