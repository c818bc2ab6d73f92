"""Vocabulary agreement and the ids that count.

Frozen here: ids beyond the tokenizer and gaps in it have no effect, whatever the weights of their
rows are: not the loss, not the gradient, not what is written; tokenizers are compared by content
and by how they cut text, not by size; an id that a table has no row for is masked as well, and a
row of the data that uses it is an error.
"""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from okd_lightning.callbacks import GKD, KD
from okd_lightning.divergences import Jeffreys, JensenShannon
from okd_lightning.errors import DataError, VocabularyError
from okd_lightning.models import Vocabulary, check_vocabulary_agreement
from okd_lightning.training.module import DistillationModule


def with_a_gap() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with one letter less in its middle: id 10 means nothing."""
    vocabulary = {token: i for token, i in tiny.make_tokenizer().get_vocab().items() if i != 10}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>"
    )


def test_valid_ids():
    assert Vocabulary.of(tiny.make_tokenizer()) == Vocabulary(tiny.NUM_IDS, ())
    assert Vocabulary.of(with_a_gap()) == Vocabulary(tiny.NUM_IDS, (10,))


def test_cut():
    logits = torch.arange(6.0)[None]
    assert Vocabulary(4).cut(logits).tolist() == [[0, 1, 2, 3]]
    assert Vocabulary(4, (1, 2)).cut(logits).tolist() == [[0, -torch.inf, -torch.inf, 3]]
    assert logits.tolist() == [[0, 1, 2, 3, 4, 5]]


def spoil(model, ids: list[int]) -> None:
    """Other numbers in the rows of ids that nobody has."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[ids] = 50 * torch.randn_like(module.weight[ids])


def rows_without_the_gap(num: int) -> list[dict[str, str]]:
    return [
        {key: text.replace("h", "a") for key, text in row.items()} for row in tiny.make_rows(num)
    ]


@pytest.mark.parametrize(
    "method",
    [
        KD(temperature=3.0, cross_entropy_weight=0.3),
        KD(Jeffreys()),
        GKD(0.5, on_policy_fraction=1.0),
        KD(JensenShannon(0.25), seq_kd=True),
    ],
    ids=["tempered KD + CE", "Jeffreys", "on-policy", "the teacher writes"],
)
@pytest.mark.parametrize("has_gap", [False, True])
def test_rows_that_no_token_has_change_nothing(method, has_gap, tmp_path, tiny_pair):
    tokenizer = with_a_gap() if has_gap else tiny.make_tokenizer()
    found = []
    for is_spoilt in (False, True):
        student, teacher = copy.deepcopy(tiny_pair)
        if is_spoilt:
            for model, num_rows in ((student, tiny.STUDENT_ROWS), (teacher, tiny.TEACHER_ROWS)):
                spoil(model, [*range(tiny.NUM_IDS, num_rows), *([10] if has_gap else [])])
        module = DistillationModule(student, teacher, tokenizer=tokenizer, learning_rate=1e-2)
        recorder = tiny.fit(tmp_path, module, [copy.deepcopy(method)], rows_without_the_gap(8))
        found.append((recorder, tiny.weights(module)))
    (plain, plain_weights), (spoilt, spoilt_weights) = found
    assert plain.losses == spoilt.losses
    assert [plain.rows(i) for i in range(2)] == [spoilt.rows(i) for i in range(2)]
    valid = [i for i in range(tiny.NUM_IDS) if not (has_gap and i == 10)]
    for name, weight in plain_weights.items():
        other, gradient = spoilt_weights[name], plain.gradients[0][f"student.{name}"]
        if weight.shape[0] == tiny.STUDENT_ROWS:
            nobodys = [i for i in range(tiny.STUDENT_ROWS) if i not in valid]
            assert gradient[nobodys].count_nonzero() == 0
            weight, other = weight[valid], other[valid]
        torch.testing.assert_close(weight, other, rtol=0, atol=0)
        assert gradient.isfinite().all()


def test_generation_never_generates_such_an_id(tmp_path, tiny_pair):
    student, teacher = tiny_pair
    with torch.no_grad():  # ids beyond the tokenizer, and the gap, are by far the most likely
        student.lm_head.weight[[*range(tiny.NUM_IDS, tiny.STUDENT_ROWS), 10]] *= 100
    module = DistillationModule(student, teacher, tokenizer=with_a_gap(), learning_rate=0.0)
    recorder = tiny.fit(tmp_path, module, [GKD(on_policy_fraction=1.0)], rows_without_the_gap(12))
    written = [i for step in range(3) for ids, _, _ in recorder.rows(step) for i in ids]
    assert max(written) < tiny.NUM_IDS
    assert 10 not in written
    assert len(set(written)) > 8


def bpe(merges: list[tuple[str, str]], is_lower: bool = False) -> PreTrainedTokenizerFast:
    """Same tokens, whatever is merged and however text is normalised."""
    vocabulary = {token: i for i, token in enumerate(["T", "t", "f", "o", "x", "fo", "ox", "fox"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if is_lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


FIRST = [("f", "o"), ("o", "x"), ("fo", "x")]


def test_tokenizers_of_one_content_agree():
    check_vocabulary_agreement(tiny.make_tokenizer(), tiny.make_tokenizer())
    check_vocabulary_agreement(bpe(FIRST), bpe(FIRST))


def test_same_size_and_other_content_is_refused_and_named():
    other = tiny.make_tokenizer("abcdefghijklmnpo")
    with pytest.raises(VocabularyError, match=r"2 tokens disagree.*'o' \(student 17, teacher 18\)"):
        check_vocabulary_agreement(tiny.make_tokenizer(), other)


def test_a_token_more_is_refused_and_named():
    with pytest.raises(VocabularyError, match=r"1 tokens disagree.*'z' \(student none, teacher 19"):
        check_vocabulary_agreement(tiny.make_tokenizer(), tiny.make_tokenizer(tiny.LETTERS + "z"))


@pytest.mark.parametrize("other", [bpe(FIRST, is_lower=True), bpe([("o", "x")])])
def test_same_tokens_that_cut_text_differently_are_refused(other):
    assert other.get_vocab() == bpe(FIRST).get_vocab()
    with pytest.raises(VocabularyError, match="split text differently"):
        check_vocabulary_agreement(bpe(FIRST), other)


def test_folders_whose_tokenizers_differ_are_refused(tmp_path, student_folder):
    tiny.make_llama(2).save_pretrained(tmp_path)
    tiny.make_tokenizer(tiny.LETTERS[::-1]).save_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match="tokens disagree"):
        DistillationModule(str(student_folder), str(tmp_path))


def with_a_special_more() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id more than the models have rows, as Gemma 3's image token."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_an_id_without_a_row_is_never_sampled(side, tmp_path, tiny_pair):
    """The id is not counted either: the run equals that of the tokenizer without it."""
    found = []
    for tokenizer in (tiny.make_tokenizer(), with_a_special_more()):
        pair = dict(zip(("student", "teacher"), copy.deepcopy(tiny_pair), strict=True))
        pair[side] = tiny.make_llama(5, tiny.NUM_IDS)
        module = DistillationModule(**pair, tokenizer=tokenizer, learning_rate=1e-2)
        assert module.vocabulary == Vocabulary(tiny.NUM_IDS, end_ids=(tiny.EOS,))
        recorder = tiny.fit(tmp_path, module, [GKD(on_policy_fraction=1.0)], tiny.make_rows(8))
        found.append((recorder.losses, [recorder.rows(i) for i in range(2)]))
    assert found[0] == found[1]


@pytest.mark.parametrize("column", ["prompt", "response"])
def test_a_row_with_such_an_id_is_a_data_error(column, tmp_path):
    models = (tiny.make_llama(1, tiny.NUM_IDS), tiny.make_llama(2, tiny.NUM_IDS))
    module = DistillationModule(*models, tokenizer=with_a_special_more())
    rows = tiny.make_rows(4)
    rows[2][column] = "ab<image>c"
    with pytest.raises(DataError, match=r"row 3: the token '<image>' has id 19.*rows up to 18"):
        tiny.fit(tmp_path, module, [KD()], rows)


def test_an_end_without_a_row_is_refused():
    models = (tiny.make_llama(1, tiny.NUM_IDS), tiny.make_llama(2, tiny.NUM_IDS))
    models[0].generation_config.eos_token_id = tiny.NUM_IDS
    with pytest.raises(VocabularyError, match=r"end-of-sequence ids hold 19 .'<image>'.*up to 18"):
        DistillationModule(*models, tokenizer=with_a_special_more())


def test_rows_are_those_that_both_tables_have():
    assert Vocabulary(8, (3, 6)).within(5) == Vocabulary(5, (3,))
    assert Vocabulary(8, (3, 6)).within(9) == Vocabulary(8, (3, 6))
