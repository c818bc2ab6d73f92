"""Semantics frozen here: loss lies on the assistant's words and end-of-turn token, nowhere else.

The ids laid end to end are the template's own rendering; a rollout's prompt is the rendering with
the generation prompt. Where the template renders a beginning differently once more follows, only
the last turn carries loss; where it does not begin an answer with its generation prompt, the chat
is a prompt, and refused where a response is needed. Both are said once.
"""

from __future__ import annotations

import json
from copy import deepcopy

import pytest

from okd_lightning.data import load_rows
from okd_lightning.errors import DataError

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello.\n\n  How are you? "},
    {"role": "user", "content": "\nFine"},
    {"role": "assistant", "content": "\n\nGood <b>"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "content": "I look it up.", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny, 20"},
    {"role": "tool", "content": "SECRET"},
    {"role": "assistant", "content": "Sunny."},
]


def runs(tokenizer, example):
    """The texts of the stretches that carry loss: earlier turns, then the response."""
    texts, current = [], []
    for token, is_loss in zip(example.prompt_ids, example.prompt_mask, strict=True):
        if is_loss:
            current.append(token)
        elif current:
            texts.append(tokenizer.decode(current))
            current = []
    assert not current, "the prompt ends inside an assistant turn"
    return [*texts, tokenizer.decode(example.response_ids)] if example.response_ids else texts


def rendering(tokenizer, messages, *, prompt=False, tools=None):
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=prompt
    )


@pytest.fixture
def qwen(real_tokenizer):
    return real_tokenizer("tokenizers/qwen2.5")


@pytest.fixture(params=["qwen", "chat_tokenizer"])
def chatml(request):
    """Qwen's own tokenizer and template; and a byte-level one, which needs no file."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["no system", "system"])
@pytest.mark.parametrize("num_messages", [2, 4])
def test_loss_lies_on_the_assistants_words_alone(system, num_messages, chatml, build):
    messages = [*system, *CHAT[:num_messages]]
    im_end = chatml.convert_tokens_to_ids("<|im_end|>")
    (example,) = build([{"messages": messages}], chatml, eos_id=im_end).examples
    words = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert runs(chatml, example) == words
    assert example.response_ids[-1] == im_end
    assert example.response == messages[-1]["content"]


@pytest.mark.parametrize("num_messages", [2, 4])
def test_the_ids_are_the_rendering(num_messages, chatml, build):
    messages = CHAT[:num_messages]
    (example,) = build([{"messages": messages}], chatml).examples
    whole = chatml.decode(example.prompt_ids + example.response_ids)
    assert whole + "\n" == rendering(chatml, messages)
    before = rendering(chatml, messages[:-1], prompt=True)
    assert chatml.decode(example.prompt_ids) == before == example.prompt


@pytest.mark.parametrize("needs_response", [True, False])
def test_the_rollout_prompt_is_what_the_tokenizer_makes_of_it(needs_response, chatml, build):
    messages = [SYSTEM, CHAT[0]]
    expected = chatml(rendering(chatml, messages, prompt=True), add_special_tokens=False)
    row = {"messages": [*messages, CHAT[1]] if needs_response else messages}
    (example,) = build([row], chatml, needs_response=needs_response).examples
    assert list(example.prompt_ids) == expected.input_ids
    assert bool(example.response_ids) is needs_response
    assert not any(example.prompt_mask)


def test_a_prompt_only_chat_carries_loss_on_earlier_turns(chatml, build):
    messages = CHAT[:3]
    (example,) = build([{"messages": messages}], chatml, needs_response=False).examples
    assert chatml.decode(example.prompt_ids) == rendering(chatml, messages, prompt=True)
    assert runs(chatml, example) == [CHAT[1]["content"] + "<|im_end|>"]
    assert (example.response_ids, example.response) == ((), "")


def test_a_blank_last_turn_is_a_prompt(chatml, build):
    blank = {"role": "assistant", "content": " "}
    with_blank, without = (
        build([{"messages": messages}], chatml, needs_response=False).examples
        for messages in ([CHAT[0], blank], [CHAT[0]])
    )
    assert with_blank == without


def test_chats_without_a_response_are_skipped_where_one_is_needed(chatml, build):
    built = build([{"messages": CHAT[:3]}, {"messages": CHAT}], chatml)
    assert [example.index for example in built.examples] == [1]
    assert built.skipped == {"empty response": 1}


@pytest.mark.parametrize("as_text", [True, False])
def test_tool_calls_carry_loss_and_tool_results_do_not(as_text, qwen, build):
    row = {"messages": TOOL_CHAT, "tools": json.dumps(TOOLS) if as_text else TOOLS}
    (example,) = build([row], qwen).examples
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    assert runs(qwen, example) == [f"I look it up.\n{call}<|im_end|>", "Sunny.<|im_end|>"]
    assert qwen.decode(example.prompt_ids + example.response_ids) + "\n" == rendering(
        qwen, TOOL_CHAT, tools=TOOLS
    )
    assert "SECRET" in example.prompt
    assert "Weather of a city" in example.prompt


@pytest.mark.parametrize("content", [{}, {"content": ""}, {"content": None}])
def test_a_tool_call_alone_is_a_response(content, chat_tokenizer, build):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls %}CALL {{ call.function.name }}{% endfor %}"
        "<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [CHAT[0], {"role": "assistant", "tool_calls": [CALL], **content}]
    (example,) = build([{"messages": messages}], chat_tokenizer).examples
    assert runs(chat_tokenizer, example) == ["CALL weather<|im_end|>"]
    assert example.response == "CALL weather"


def test_nulls_that_tables_write_are_not_shown_to_the_template(qwen, build):
    null = {"tool_calls": None, "name": None}
    padded = [{**message, **null} for message in CHAT]
    with_nulls = build([{"messages": padded, "tools": None}], qwen)
    assert with_nulls == build([{"messages": CHAT}], qwen)


def chatml_with(after_turn="<|im_end|>\n", at_end="", content="{{ m.content }}"):
    return (
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}}\n{content}{after_turn}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{{% else %}}{at_end}{{% endif %}}"
    )


APART = {
    # template -> the last answer "<think>hm</think>Hello." as its response
    "strips earlier thinking": (
        chatml_with(content="{{ m.content if loop.last else m.content.split('</think>')[-1] }}"),
        "<think>hm</think>Hello.<|im_end|>",
    ),
    "adds something only at the end": (
        chatml_with(at_end="</s>"),
        "<think>hm</think>Hello.<|im_end|>\n</s>",
    ),
    "shows thinking in the last turn only": (
        chatml_with(
            content="{{ '<think></think>' if loop.last and m.role == 'assistant' else '' }}"
            "{{ m.content }}"
        ),
        "<think></think><think>hm</think>Hello.<|im_end|>",
    ),
}
UNSTABLE = {
    "shows the number of messages": "{{ messages | length }}" + chatml_with(),
    "opens thinking in the generation prompt": chatml_with().replace(
        "<|im_start|>assistant\n{%", "<|im_start|>assistant\n<think>\n{%"
    ),
    "ends the last message otherwise": chatml_with(
        after_turn="{{ '</s>' if loop.last else '<|im_end|>' }}"
    ),
}
THOUGHT = [
    *CHAT[:1],
    {"role": "assistant", "content": "<think>one</think>Hello."},
    {"role": "user", "content": "Again?"},
    {"role": "assistant", "content": "<think>hm</think>Hello."},
]


@pytest.mark.parametrize(("template", "response"), APART.values(), ids=APART)
def test_a_template_that_treats_the_last_answer_apart_is_learned_there(
    template, response, chat_tokenizer, build
):
    chat_tokenizer.chat_template = template
    rows = [{"messages": THOUGHT}, {"messages": THOUGHT[:2]}, {"messages": THOUGHT[:3]}]
    with pytest.warns(UserWarning, match=r"rows\.jsonl: the chat template .* in 2 of 3 chats "):
        built = build(rows, chat_tokenizer, needs_response=False)
    last, single, prompt = built.examples
    assert runs(chat_tokenizer, last) == [response]
    assert runs(chat_tokenizer, single) == [response.replace("hm", "one")]
    assert runs(chat_tokenizer, prompt) == []
    before = rendering(chat_tokenizer, THOUGHT[:3], prompt=True)
    for example in (last, prompt):
        assert chat_tokenizer.decode(example.prompt_ids) == before == example.prompt
    assert last.response == THOUGHT[-1]["content"]


@pytest.mark.parametrize("template", UNSTABLE.values(), ids=UNSTABLE)
def test_a_template_that_does_not_begin_an_answer_as_its_prompt_ends(
    template, chat_tokenizer, build
):
    chat_tokenizer.chat_template = template
    rows = [{"messages": THOUGHT}]
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: .*not prefix-stable at message 4"):
        build(rows, chat_tokenizer)
    with pytest.warns(UserWarning, match="1 of 1 chats are prompts without a response"):
        (example,) = build(rows, chat_tokenizer, needs_response=False).examples
    expected = rendering(chat_tokenizer, THOUGHT[:3], prompt=True)
    assert chat_tokenizer.decode(example.prompt_ids) == expected
    assert (example.response_ids, example.response) == ((), THOUGHT[-1]["content"])
    assert not any(example.prompt_mask)


def test_stable_chats_of_such_a_template_are_learned_whole(chat_tokenizer, build):
    chat_tokenizer.chat_template = APART["strips earlier thinking"][0]
    (example,) = build([{"messages": CHAT}], chat_tokenizer).examples
    words = [CHAT[1]["content"] + "<|im_end|>", CHAT[3]["content"] + "<|im_end|>"]
    assert runs(chat_tokenizer, example) == words


ENDINGS = {
    # template's text after a turn -> (eos, the response's own text)
    "eos": ("</s>", "</s>", "Hello.</s>"),
    "end of turn that is not eos": ("<|im_end|>\n", "</s>", "Hello.<|im_end|>"),
    "two tokens, neither eos": ("<|im_end|><s>\n", "</s>", "Hello.<|im_end|><s>"),
    "end of turn, then eos": ("<|im_end|>\n</s>", "</s>", "Hello.<|im_end|>\n</s>"),
    "end of turn that is eos, then more": ("<|im_end|>\n</s>", "<|im_end|>", "Hello.<|im_end|>"),
    "none": ("\n", "</s>", "Hello.</s>"),
    "nothing at all": ("", "</s>", "Hello.</s>"),
}


@pytest.mark.parametrize(("ending", "eos", "response"), ENDINGS.values(), ids=ENDINGS)
def test_a_response_is_ended_once(ending, eos, response, chat_tokenizer, build):
    chat_tokenizer.chat_template = chatml_with(after_turn=ending)
    eos_id = chat_tokenizer.convert_tokens_to_ids(eos)
    rows = [{"messages": [CHAT[0], {"role": "assistant", "content": "Hello."}]}]
    (example,) = build(rows, chat_tokenizer, eos_id=eos_id).examples
    assert chat_tokenizer.decode(example.response_ids) == response


def test_earlier_turns_get_no_eos_that_the_template_does_not_write(chat_tokenizer, build):
    chat_tokenizer.chat_template = chatml_with(after_turn="\n")
    messages = [CHAT[0], {"role": "assistant", "content": "Hello."}, CHAT[0], CHAT[1]]
    (example,) = build([{"messages": messages}], chat_tokenizer).examples
    assert runs(chat_tokenizer, example)[0] == "Hello."
    assert chat_tokenizer.decode(example.prompt_ids) == example.prompt
    assert example.prompt == rendering(chat_tokenizer, messages[:-1], prompt=True)


def test_a_cut_response_loses_its_end_of_turn(chatml, build):
    whole = build([{"messages": CHAT}], chatml).examples[0].response_ids
    limit = len(whole) - 1
    built = build([{"messages": CHAT}], chatml, max_response_length=limit)
    assert built.examples[0].response_ids == whole[:-1]
    assert built.num_cut == 1


def test_a_prompt_is_measured_with_its_earlier_turns(chatml, build):
    length = len(build([{"messages": CHAT}], chatml).examples[0].prompt_ids)
    with pytest.raises(DataError, match=f"{length} tokens"):
        build([{"messages": CHAT}], chatml, max_prompt_length=length - 1)


def test_a_tokenizer_without_template_is_refused(byte_tokenizer, build):
    with pytest.raises(DataError, match=r"rows\.jsonl: rows are chats, but .* no chat_template"):
        build([{"messages": CHAT}], byte_tokenizer)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{% for x", "{{ 'a' + messages[0] }}"],
    ids=["raises", "broken", "wrong type"],
)
def test_a_template_that_refuses_the_chat_is_named_by_row(template, chat_tokenizer, build):
    chat_tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"row 1: the chat template refuses.*user, assistant"):
        build([{"messages": CHAT[:2]}], chat_tokenizer)


def test_a_rendered_bos_is_not_doubled(make_tokenizer, build):
    tokenizer = make_tokenizer("<s>", "</s>")
    tokenizer.chat_template = "<s>" + chatml_with()
    (example,) = build([{"messages": CHAT}], tokenizer).examples
    bos = tokenizer.bos_token_id
    assert (example.prompt_ids[0], example.prompt_ids.count(bos)) == (bos, 1)
    assert example.response_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_llama_writes_no_space_before_a_turn_in_the_middle(real_tokenizer, build):
    """SentencePiece writes a space before a text that is tokenized alone; a turn is not alone."""
    llama = deepcopy(real_tokenizer("tokenizers/llama2"))
    llama.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    messages = [*CHAT[:1], {"role": "assistant", "content": "Hello."}]
    (example,) = build([{"messages": messages}], llama).examples
    whole = llama(rendering(llama, messages), add_special_tokens=False).input_ids
    assert list(example.prompt_ids + example.response_ids) == whole


def test_real_gsm8k_as_chats(qwen, shared_data, build):
    rows = load_rows(shared_data / "datasets" / "gsm8k" / "test.jsonl")[:200]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ]
        }
        for row in rows
    ]
    built = build(chats, qwen)
    assert len(built) == 200
    for example, chat in zip(built.examples, chats, strict=True):
        whole = qwen(rendering(qwen, chat["messages"]), add_special_tokens=False).input_ids
        assert [*example.prompt_ids, *example.response_ids] == whole[:-1]  # but for the newline
        assert qwen.decode(example.response_ids[:-1]) == chat["messages"][1]["content"]
