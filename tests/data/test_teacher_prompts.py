"""Prompts of a privileged teacher, from templates and columns (OPSD, arXiv 2601.18734).

Frozen here: the ids are those of the filled template or of the column, rendered by the chat
template as a prompt of its own; the response's ids are untouched; rows without what the template
needs and rows whose teacher prompt is too long are left out, counted and named; a template is
checked before any data is read.
"""

from __future__ import annotations

import pytest

from okd_lightning.data.teacher_prompts import TeacherPrompts, teacher_prompts_from
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.records.collation import collate, dataset_row

SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [
    SYSTEM,
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6 {sic}"},
]
TEMPLATE = "{prompt}\n\nSolution: {reference} {{checked}}"


def prompts(max_length: int = 10_000, **settings) -> TeacherPrompts:
    return TeacherPrompts(max_length, **settings)


def rendering(tokenizer, messages) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(params=["qwen", "chat_tokenizer"])
def chatml(request):
    """Qwen's own tokenizer and template where they are; and a byte-level one, without a file."""
    if request.param == "qwen":
        return request.getfixturevalue("real_tokenizer")("tokenizers/qwen2.5")
    return request.getfixturevalue(request.param)


def test_a_template_fills_plain_prompts(make_tokenizer, build):
    tokenizer = make_tokenizer("<s>", "</s>")
    rows = [{"prompt": "2 {x}", "response": "4"}, {"prompt": "1 + 1", "response": "2"}]
    plain = build(rows, tokenizer).examples
    found = build(rows, tokenizer, teacher_prompts=prompts(template=TEMPLATE)).examples
    for row, example, without in zip(rows, found, plain, strict=True):
        text = f"{row['prompt']}\n\nSolution: {row['response']} {{checked}}"
        assert tokenizer.decode(example.teacher_prompt_ids) == "<s>" + text
        assert (example.prompt_ids, example.response_ids) == (
            without.prompt_ids,
            without.response_ids,
        )
        assert without.teacher_prompt_ids == ()


def test_a_column_of_texts(byte_tokenizer, build):
    rows = [{"prompt": "a", "response": "b", "hint": "a, that is b"}]
    (example,) = build(rows, byte_tokenizer, teacher_prompts=prompts(column="hint")).examples
    assert byte_tokenizer.decode(example.teacher_prompt_ids) == "a, that is b"
    with pytest.raises(DataError, match=r"row 1: the teacher prompt \('hint'\) holds half a char"):
        build(
            [{**rows[0], "hint": "\ud83d"}], byte_tokenizer, teacher_prompts=prompts(column="hint")
        )


def test_a_template_in_a_chat_replaces_the_last_user_message(chatml, build):
    messages = [*CHAT[:3], {"role": "user", "content": "Q: And 3 + 3? A: 6 {sic}"}]
    settings = prompts(template="Q: {prompt} A: {reference}")
    (example,) = build([{"messages": CHAT}], chatml, teacher_prompts=settings).examples
    assert list(example.teacher_prompt_ids) == rendering(chatml, messages)
    assert list(example.prompt_ids) == rendering(chatml, CHAT[:4])


def test_a_column_of_messages(chatml, build):
    own = [SYSTEM, {"role": "user", "content": "It is 6. What is 3 + 3?"}]
    rows = [{"messages": CHAT, "hint": own}]
    (example,) = build(rows, chatml, teacher_prompts=prompts(column="hint")).examples
    assert list(example.teacher_prompt_ids) == rendering(chatml, own)


def test_response_tokens_are_aligned(chatml, build):
    """The teacher's sequence ends with the student's response; only that carries loss."""
    rows = [
        {"messages": CHAT},
        {"messages": [CHAT[1], CHAT[2]]},
        {"messages": [{"role": "user", "content": "?" * 40}, CHAT[4]]},
    ]
    settings = prompts(template="{reference}{reference} {prompt}")
    examples = build(rows, chatml, teacher_prompts=settings).examples
    batch = collate([dataset_row(example) for example in examples])
    teacher = batch.teacher_reads
    assert teacher.input_ids.shape[1] != batch.input_ids.shape[1]
    for i, example in enumerate(examples):
        for side, prompt in ((batch, example.prompt_ids), (teacher, example.teacher_prompt_ids)):
            whole = [*prompt, *example.response_ids]
            assert side.input_ids[i, : side.lengths[i]].tolist() == whole
            assert side.mask[i].nonzero().squeeze(-1).tolist() == list(
                range(len(prompt), len(whole))
            )
        assert batch.input_ids[i][batch.mask[i]].equal(teacher.input_ids[i][teacher.mask[i]])


def test_earlier_turns_carry_loss_only_without_a_teacher_prompt(chat_tokenizer, build):
    (plain,) = build([{"messages": CHAT}], chat_tokenizer).examples
    settings = prompts(template="{prompt}!")
    (own,) = build([{"messages": CHAT}], chat_tokenizer, teacher_prompts=settings).examples
    assert dataset_row(plain).num_loss_tokens > dataset_row(own).num_loss_tokens
    assert dataset_row(own).num_loss_tokens == len(own.response_ids)


def test_the_reference_is_whole_where_the_response_is_cut(byte_tokenizer, build):
    rows = [{"prompt": "a", "response": "bcdefg"}]
    settings = {"max_response_length": 2, "teacher_prompts": prompts(template="{reference}")}
    (example,) = build(rows, byte_tokenizer, **settings).examples
    assert byte_tokenizer.decode(example.teacher_prompt_ids) == "bcdefg"
    assert byte_tokenizer.decode(example.response_ids) == "bc"


ROWS = [
    {"prompt": "a", "response": "b", "hint": "abc"},
    {"prompt": "a", "response": " ", "hint": None},
    {"prompt": "a", "response": "b" * 20, "hint": "d" * 20},
    {"prompt": "a", "response": None},
]


@pytest.mark.parametrize(
    ("settings", "skipped"),
    [
        (
            {"template": "{prompt} {reference}"},
            {"no reference for the teacher prompt": 2, "overlong teacher prompt": 1},
        ),
        ({"template": "{prompt}?"}, {}),
        ({"column": "hint"}, {"no teacher prompt": 2, "overlong teacher prompt": 1}),
    ],
)
def test_rows_without_one_are_skipped_and_counted(settings, skipped, byte_tokenizer, build):
    found = build(
        ROWS,
        byte_tokenizer,
        needs_response=False,
        on_overlong="skip",
        teacher_prompts=prompts(10, **settings),
    )
    assert found.skipped == skipped
    assert [example.index for example in found.examples] == ([0] if skipped else [0, 1, 2, 3])


def test_overlong_ones_stop_the_run_where_that_is_asked_for(byte_tokenizer, build):
    message = r"row 3: the teacher prompt has 22 tokens.*--data\.max_teacher_prompt_length 10"
    settings = prompts(10, template="{prompt} {reference}")
    with pytest.raises(DataError, match=message):
        build(ROWS, byte_tokenizer, needs_response=False, teacher_prompts=settings)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (ROWS[2:3], {"template": "{reference}"}, "raise --data.max_teacher_prompt_length"),
        (ROWS[1:2], {"template": "{reference}"}, "no reference for the teacher prompt: 1"),
        (ROWS[:1], {"column": "hnit"}, "did you mean 'hint'"),
        ([{**ROWS[0], "hint": 3}], {"column": "hint"}, "'hint'.* is int, expected text"),
    ],
)
def test_data_that_does_not_serve(rows, settings, message, byte_tokenizer, build):
    with pytest.raises(DataError, match=message):
        build(
            rows,
            byte_tokenizer,
            needs_response=False,
            on_overlong="skip",
            teacher_prompts=prompts(10, **settings),
        )


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"messages": CHAT, "hint": "abc"}, {"column": "hint"}, "'hint'.* is str, expected a list"),
        ({"messages": CHAT, "hint": CHAT}, {"column": "hint"}, "ends with the assistant's turn"),
        ({"messages": [SYSTEM, CHAT[2]]}, {"template": "{prompt}"}, "no user message"),
    ],
)
def test_chats_that_do_not_serve(row, settings, message, chat_tokenizer, build):
    with pytest.raises(DataError, match=message):
        build([row], chat_tokenizer, teacher_prompts=prompts(**settings))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{promt}", r"unknown field \{promt\}.*did you mean \{prompt\}"),
        ("{prompt.__class__}", r"unknown field \{prompt.__class__\}"),
        ("{prompt!r:>9}", r"unknown field \{prompt!r:>9\}"),
        (r"\boxed{} {prompt}", r"unknown field \{\}.*literal braces"),
        ("Think.", "names no field"),
        ("", "names no field"),
        ("{prompt", "expected {prompt} and/or {reference}"),
    ],
)
def test_templates_are_checked_first(template, message):
    with pytest.raises(ConfigError, match=message):
        prompts(template=template)


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="either"):
        teacher_prompts_from("hint", "{prompt}", None, 8)
    with pytest.raises(ConfigError, match="has no effect"):
        teacher_prompts_from(None, None, 8, 8)
    with pytest.raises(ConfigError, match="at least 1"):
        teacher_prompts_from("hint", None, 0, 8)
    assert teacher_prompts_from(None, None, None, 8) is None
    assert teacher_prompts_from("hint", None, None, 8) == prompts(8, column="hint")
