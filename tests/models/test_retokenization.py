"""A response in the ids of another tokenizer.

Frozen here: chunks have the text of both sides' tokens; each side has its own end, as one chunk; a
cut response's last chunk, what the teacher lacks, its context's end, control ids and invalid UTF-8
carry no loss and are counted; sampled chunks that are not the tokenizer's own carry none either;
dataset rows keep their mask within chunks alone, sampled rows all of it.
"""

from __future__ import annotations

import pytest
import tiny
from pair_tokenizers import merging
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from okd_lightning.models.retokenization import Retokenizer
from okd_lightning.models.token_bytes import TokenBytes
from okd_lightning.records.batches import TrainingRow

LETTERS = tiny.LETTERS


def bytewise() -> PreTrainedTokenizerFast:
    """Return a tokenizer of one id per byte, after <eos>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(["<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


PAIRS = merging("ab", "cd")
STUDENT = merging("bc")


def row(ids, source="dataset", num_prompt=1, teacher_prompt=(2, 3)) -> TrainingRow:
    mask = (False,) * num_prompt + (True,) * (len(ids) - num_prompt)
    return TrainingRow(0, source, tuple(ids), mask, num_prompt, teacher_prompt_ids=teacher_prompt)


def cross(text_or_ids, student=STUDENT, teacher=PAIRS, room=None, end=1, **fields):
    ids = text_or_ids
    if isinstance(ids, str):
        ids = student(ids)["input_ids"]
    made = Retokenizer(student, teacher, end, len(teacher), room)
    return made.row(row([3, *ids], **fields), (student.eos_token_id,))


def texts(found: TrainingRow, student=STUDENT, teacher=PAIRS) -> list[str]:
    """The text of each chunk, equal on both sides."""
    own, other = (TokenBytes(t, "x").pieces for t in (student, teacher))
    ids = found.input_ids[found.prompt_length :]
    pairs = [
        (
            b"".join(own[i] or b"." for i in ids[slice(*span.student)]),
            b"".join(other[i] or b"." for i in found.aligned.teacher_ids[slice(*span.teacher)]),
        )
        for span in found.aligned.spans
    ]
    assert all(one == two for one, two in pairs)
    return [one.decode(errors="replace") for one, _ in pairs]


def test_chunks_have_the_text_of_both_sides_and_ends_of_their_own():
    found = cross("aabcde<eos>")
    assert texts(found) == ["a", "abcd", "e", "."]
    assert found.aligned.teacher_ids == (*PAIRS("aabcde")["input_ids"], 1)
    assert found.aligned.num_unaligned == found.aligned.num_noncanonical == 0
    assert found.aligned.num_one_to_one == 3
    assert found.mask == (False, *[True] * 6)
    assert found.teacher_row.input_ids == (2, 3, *found.aligned.teacher_ids)
    assert found.teacher_row.mask == (False, False, *[True] * 5)


def test_each_side_has_its_own_end():
    found = cross("ab<eos>", end=0)
    assert found.aligned.teacher_ids[-1] == 0
    assert texts(found) == ["ab", "."]


def test_a_teacher_without_an_end_gives_none():
    found = cross("ab<eos>", end=None)
    assert texts(found) == ["ab"]
    assert found.aligned.num_unaligned == 1


def test_the_last_chunk_of_a_cut_response_carries_no_loss():
    found = cross("aabcde")
    assert texts(found) == ["a", "abcd"]
    assert found.aligned.num_unaligned == 1
    assert found.mask == (False, True, True, True, True, False)


def test_what_the_context_does_not_hold_carries_no_loss():
    found = cross("aabcde<eos>", room=5)
    assert len(found.teacher_row.input_ids) == 5
    assert texts(found) == ["a", "abcd"]
    assert cross("ab<eos>", room=2).aligned.spans == ()
    long = cross("ab<eos>", room=1)
    assert long.teacher_prompt_ids == (2,)
    assert long.teacher_row.input_ids == (2,)


def test_a_control_id_within_a_response_has_no_chunk():
    ids = [3, 2, 6, 7, 1]  # a <bos> d e <eos>
    found = cross(ids, source="student")
    assert texts(found) == ["a", "d", "e", "."]
    assert found.aligned.num_unaligned == 1
    assert all(found.mask[1:])


def test_invalid_text_has_no_chunk():
    student = teacher = bytewise()
    ids = student("aé€b")["input_ids"]
    broken = [*ids[:2], *ids[3:], 0]  # é lacks its second byte
    found = cross(broken, student, teacher, end=0, source="student")
    assert len(texts(found, student, teacher)) == len("a") + len("€".encode()) + len("b") + 1
    assert found.aligned.num_unaligned == 1
    assert found.aligned.num_noncanonical == 0


def test_characters_that_the_teacher_lacks():
    teacher = merging("de", letters=LETTERS[1:])
    found = cross("bad<eos>", teacher=teacher)
    assert texts(found, teacher=teacher) == ["b", "d", "."]
    assert found.aligned.num_unaligned == 1
    assert found.mask == (False, True, False, True, True)


@pytest.mark.parametrize("source", ["student", "dataset"])
def test_sampled_chunks_of_other_tokens_carry_no_loss(source):
    ids = [*STUDENT("d")["input_ids"], 4, 5, *STUDENT("ebc")["input_ids"], 1]  # d b c e bc <eos>
    found = cross(ids, source=source)
    if source == "dataset":
        assert texts(found) == ["d", "b", "c", "e", "bc", "."]
        return
    assert texts(found) == ["d", "e", "bc", "."]
    assert found.aligned.num_noncanonical == 2
    assert found.aligned.num_unaligned == 0
    assert all(found.mask[1:])


def test_chunks_beyond_the_longest_carry_no_loss():
    many = merging("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op")
    shifted = merging("bc", "de", "fg", "hi", "jk", "lm", "no", "pa")
    found = cross(LETTERS * 5 + "<eos>", shifted, many)
    assert texts(found, shifted, many) == ["."]
    assert found.aligned.num_unaligned == len(shifted(LETTERS * 5)["input_ids"])


def test_the_first_token_of_a_sequence_is_not_predicted():
    found = cross("abab<eos>", teacher_prompt=())
    assert texts(found) == ["ab", "."]
    assert found.aligned.num_unaligned == 2


def test_masked_tokens_are_in_no_chunk():
    made = Retokenizer(STUDENT, PAIRS, 1, len(PAIRS), None)
    ids = (3, *STUDENT("aba<eos>")["input_ids"])
    given = TrainingRow(
        0, "student", ids, (False, True, False, True, True), 1, teacher_prompt_ids=(2,)
    )
    found = made.row(given, (1,))
    assert texts(found) == ["a", "."]
    assert found.aligned.num_unaligned == 1
