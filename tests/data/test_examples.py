"""Semantics frozen here: ids are bos (where one is) + prompt + response + eos.

A response that is cut has no eos; a prompt that is too long is skipped and counted, or refused; the
index is the row's number in the file whatever was skipped; nothing is random, nothing is warned of.
"""

from __future__ import annotations

import logging

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from okd_lightning.data import Columns, load_rows
from okd_lightning.data.examples import ExampleSet
from okd_lightning.errors import ConfigError, DataError
from okd_lightning.records.batches import Example

EOS = 1  # "</s>" of the byte tokenizer
GSM8K = Columns(prompt="question", response="answer")


def byte_ids(tokenizer, text):
    return tuple(tokenizer.convert_tokens_to_ids(list(text)))


def row(prompt, response="r"):
    return {"prompt": prompt, "response": response}


def test_ids_are_prompt_response_eos(build, byte_tokenizer):
    (example,) = build([row("ab", "cde")], byte_tokenizer, eos_id=EOS).examples
    assert example.prompt_ids == byte_ids(byte_tokenizer, "ab")
    assert example.response_ids == (*byte_ids(byte_tokenizer, "cde"), EOS)
    assert example.prompt_mask == (False, False)
    assert (example.index, example.prompt, example.response) == (0, "ab", "cde")


@pytest.mark.parametrize(
    ("opening", "closing", "num_opening"),
    [("", "", 0), ("<s>", "", 1), ("", "</s>", 0), ("<s>", "</s>", 1), ("</s>", "</s>", 1)],
)
def test_a_prompt_keeps_bos_and_loses_eos(opening, closing, num_opening, build, make_tokenizer):
    tokenizer = make_tokenizer(opening, closing)
    (example,) = build([row("ab", "cd")], tokenizer, eos_id=EOS).examples
    opened = (tokenizer.convert_tokens_to_ids(opening),) * num_opening
    assert example.prompt_ids == (*opened, *byte_ids(tokenizer, "ab"))
    assert example.response_ids == (*byte_ids(tokenizer, "cd"), EOS)


def test_an_eos_that_the_prompt_itself_ends_with_stays(build, make_tokenizer):
    (example,) = build([row("ab</s>")], make_tokenizer("<s>", "</s>"), eos_id=EOS).examples
    assert example.prompt_ids[-1] == EOS
    assert example.prompt_ids.count(EOS) == 1


@pytest.mark.parametrize(
    ("limit", "num_tokens", "has_eos", "num_cut"),
    [(5, 4, True, 0), (4, 4, True, 0), (3, 3, False, 1), (1, 1, False, 1)],
)
def test_a_cut_response_has_no_eos(limit, num_tokens, has_eos, num_cut, build, byte_tokenizer):
    built = build([row("ab", "cde")], byte_tokenizer, eos_id=EOS, max_response_length=limit)
    (example,) = built.examples
    whole = (*byte_ids(byte_tokenizer, "cde"), EOS)
    assert example.response_ids == whole[:num_tokens]
    assert (example.response_ids[-1] == EOS) is has_eos
    assert (built.num_cut, built.num_skipped) == (num_cut, 0)
    assert example.response == "cde"  # the reference of task metrics is whole


def test_overlong_prompts_are_skipped_and_counted_and_the_index_stays(build, byte_tokenizer):
    rows = [row("abc"), row("abcd"), row("a"), row("abcde"), row("ab")]
    built = build(rows, byte_tokenizer, max_prompt_length=3, on_overlong="skip")
    assert [(e.index, e.prompt) for e in built.examples] == [(0, "abc"), (2, "a"), (4, "ab")]
    assert built.skipped == {"overlong prompt": 2}
    assert (built.num_skipped, len(built)) == (2, 3)


def test_overlong_prompts_are_refused_on_request(build, byte_tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl, row 2: .* 4 tokens.* 3; .*on_overlong skip"):
        build([row("abc"), row("abcd")], byte_tokenizer, max_prompt_length=3, on_overlong="error")


def test_nothing_left_says_how_many_and_how_long(build, byte_tokenizer):
    words = r"all 2 rows were skipped \(overlong prompt: 2\).* 4 to 6 tokens.*max_prompt_length"
    rows = [row("abcd"), row("abcdef")]
    with pytest.raises(DataError, match=words):
        build(rows, byte_tokenizer, max_prompt_length=3, on_overlong="skip")


@pytest.mark.parametrize("blank", ["", " \n"])
def test_blank_responses_are_skipped_where_needed(blank, build, byte_tokenizer):
    built = build([row("a", blank), row("b")], byte_tokenizer)
    assert [e.index for e in built.examples] == [1]
    assert built.skipped == {"empty response": 1}
    with pytest.raises(DataError, match=r"all 1 rows were skipped .*empty response: 1"):
        build([row("a", blank)], byte_tokenizer)


@pytest.mark.parametrize("given", [{}, {"response": None}, {"response": ""}, {"answer": "b"}])
def test_prompts_alone_do_where_no_response_is_needed(given, build, byte_tokenizer):
    built = build([{"prompt": "a", **given}], byte_tokenizer, needs_response=False)
    (example,) = built.examples
    assert (example.response_ids, example.response) == ((), "")
    assert built.num_skipped == 0


def test_a_given_response_is_kept_even_if_not_needed(build, byte_tokenizer):
    with_need = build([row("a", "b")], byte_tokenizer, needs_response=True)
    without = build([row("a", "b")], byte_tokenizer, needs_response=False)
    assert with_need == without


@pytest.mark.parametrize(
    "settings", [{"max_prompt_length": 0}, {"max_response_length": -1}, {"on_overlong": "cut"}]
)
def test_settings_that_cannot_work_are_refused_by_name(settings, build, byte_tokenizer):
    with pytest.raises(ConfigError, match=f"--data.{next(iter(settings))}"):
        build([row("a")], byte_tokenizer, **settings)


def test_no_rows_are_refused(build, byte_tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl: no rows"):
        build([], byte_tokenizer)


def test_a_prompt_without_tokens_is_refused(build):
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    with pytest.raises(DataError, match="row 2: the prompt ' ' has no tokens"):
        build([row("a", "a"), row(" ", "a")], words)


def test_more_rows_than_one_tokenizer_call_stay_in_order(build, byte_tokenizer):
    rows = [row(f"p{i}", f"r{i}") for i in range(2500)]
    examples = build(rows, byte_tokenizer).examples
    assert [byte_tokenizer.decode(e.prompt_ids) for e in examples] == [r["prompt"] for r in rows]
    assert [e.index for e in examples] == list(range(2500))


def test_long_texts_are_not_warned_of(build, byte_tokenizer, caplog, capfd):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.DEBUG):
        build([row("a" * 100, "b" * 100)], byte_tokenizer)  # model_max_length is 8
    assert "longer than" not in caplog.text + "".join(capfd.readouterr())


def test_pad_equal_to_eos_changes_nothing(build, byte_tokenizer, make_tokenizer):
    padded = make_tokenizer()
    padded.pad_token = padded.eos_token
    rows = [row("a", "bcd"), row("abc", "d")]
    assert build(rows, padded) == build(rows, byte_tokenizer)


@pytest.mark.parametrize("opening", ["", "<s>"])
def test_a_prompt_that_was_rendered_before_keeps_its_one_bos(opening, build, make_tokenizer):
    tokenizer = make_tokenizer(opening, "</s>")
    (example,) = build([row("<s>ab", "cd")], tokenizer).examples
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["<s>", "a", "b"]


@pytest.mark.parametrize("end", ["", "</s>", "</s></s>", "</s>\n", "</s><s>"])
def test_a_response_ends_once(end, build, byte_tokenizer):
    (example,) = build([row("ab", f"cd{end}")], byte_tokenizer).examples
    assert byte_tokenizer.convert_ids_to_tokens(example.response_ids) == ["c", "d", "</s>"]


def test_a_response_that_ends_with_the_tokenizers_own_eos_gets_no_other(build, byte_tokenizer):
    end_of_turn = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [row("ab", "cd</s>"), row("ab", "cd<|im_end|>"), row("ab", "cd")]
    built = build(rows, byte_tokenizer, eos_id=end_of_turn).examples
    ends = [byte_tokenizer.convert_ids_to_tokens(e.response_ids[2:]) for e in built]
    assert ends == [["</s>"], ["<|im_end|>"], ["<|im_end|>"]]


def test_texts_that_are_much_too_long_are_counted_and_cut(build, byte_tokenizer):
    rows = [row("a" * 10**6, "b"), row("a", "b" * 10**6)]
    limits = {"max_prompt_length": 20, "max_response_length": 30}
    built = build(rows, byte_tokenizer, on_overlong="skip", **limits)
    assert (built.skipped, built.num_cut) == ({"overlong prompt": 1}, 1)
    assert built.examples[0].response_ids == byte_ids(byte_tokenizer, "b" * 30)
    with pytest.raises(DataError, match=r"row 1: the prompt has at least \d+ tokens, more than"):
        build(rows, byte_tokenizer, **limits)


@pytest.mark.parametrize("folder", ["tokenizers/llama2", "models/stories260K"])
def test_real_llama_tokenizers_open_the_prompt_with_one_bos(folder, real_tokenizer, build):
    tokenizer = real_tokenizer(folder)
    (example,) = build([row("Once upon", " a time")], tokenizer, eos_id=1).examples
    assert example.prompt_ids[0] == tokenizer.bos_token_id == 1
    assert example.prompt_ids.count(1) == 1
    assert tokenizer.decode(example.prompt_ids, skip_special_tokens=True) == "Once upon"
    assert example.response_ids.count(1) == 1
    assert example.response_ids[-1] == 1
    joined = tokenizer.decode(example.prompt_ids + example.response_ids, skip_special_tokens=True)
    assert joined == "Once upon a time"


def test_real_tinystories(shared_data, real_tokenizer, build):
    rows = load_rows(shared_data / "datasets" / "tinystories" / "train.jsonl")
    tokenizer = real_tokenizer("models/stories260K")
    limits = {"max_prompt_length": 40, "max_response_length": 96, "on_overlong": "skip"}
    built = build(rows, tokenizer, eos_id=1, **limits)
    assert len(built) + built.num_skipped == len(rows)
    assert built == build(rows, tokenizer, eos_id=1, **limits)
    num_without_eos = 0
    for example in built.examples:
        source = rows[example.index]
        # the plain call on the whole story gives the same ids
        whole = tokenizer(source["prompt"] + source["response"]).input_ids
        assert list(example.prompt_ids) == tokenizer(source["prompt"]).input_ids
        assert [*example.prompt_ids, *example.response_ids] == [*whole, 1][
            : len(example.prompt_ids) + 96
        ]
        num_without_eos += example.response_ids[-1] != 1
    assert num_without_eos == built.num_cut > 0
    assert built.skipped["overlong prompt"] == sum(
        len(tokenizer(r["prompt"]).input_ids) > 40 for r in rows
    )


@pytest.mark.parametrize("folder", ["tokenizers/gpt2", "tokenizers/qwen2.5"])
def test_real_gsm8k_round_trips(folder, shared_data, real_tokenizer, build):
    rows = load_rows(shared_data / "datasets" / "gsm8k" / "test.jsonl")
    tokenizer = real_tokenizer(folder)
    built = build(rows, tokenizer, columns=GSM8K, on_overlong="skip")
    assert (len(built), built.num_skipped, built.num_cut) == (1319, 0, 0)
    for example, source in zip(built.examples, rows, strict=True):
        assert tokenizer.decode(example.prompt_ids) == source["question"]
        assert tokenizer.decode(example.response_ids[:-1]) == source["answer"]
        assert example.response_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("num_cut", "ends"), [(0, [EOS]), (1, [])])
def test_responses_of_one_length_end_their_turns_unless_they_are_cut(num_cut, ends, byte_tokenizer):
    """The last token of a response that was cut is any."""
    examples = tuple(Example(i, (5,), (False,), (5 + i, EOS), "", "") for i in range(2))
    assert ExampleSet(examples, {}, num_cut).ends_of_turn(byte_tokenizer) == ends
