"""``RougeL`` against the ``rouge_score`` package and on other scripts.

Frozen: on ASCII text, with and without stems, it is the ``rouge_score`` package's; the best of
several references counts; texts of other scripts are compared by their own words.
"""

from __future__ import annotations

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from okd_lightning.rewards import RougeL
from okd_lightning.rewards.rouge import rouge_l

SENTENCE = "the cats cat were running runs run quickly on 3 mats, mat-like! (and) then slept. A's"


@pytest.mark.parametrize("stem", [True, False])
def test_ascii_texts_score_as_with_the_reference_package(stem):
    draw = random.Random(1)
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    texts = [" ".join(draw.choices(SENTENCE.split(), k=draw.randint(0, 12))) for _ in range(60)]
    for response, first, second in zip(texts, texts[1:], texts[2:], strict=False):
        alone = scorer.score(first, response)["rougeL"].fmeasure
        assert rouge_l(response, first, stem) == pytest.approx(alone, abs=1e-6)
        best = scorer.score_multi([first, second], response)["rougeL"].fmeasure
        assert rouge_l(response, [first, second], stem) == pytest.approx(best, abs=1e-6)


def test_stems_are_compared_by_default():
    assert rouge_l("the dogs were barking", "the dog was bark") > 0.7
    assert RougeL()([""], ["dogs barked"], ["dog barking"]) == pytest.approx([1.0])
    assert RougeL(stem=False)([""], ["dogs barked"], ["dog barking"]) == [0.0]


@pytest.mark.parametrize("text", ["北京", "สวัสดี", "हिन्दी भाषा", "Привет, мир", "été", "こんにちは"])
def test_a_text_of_any_script_scores_1_against_itself(text):
    assert rouge_l(text, text) == pytest.approx(1)


def test_characters_of_unspaced_scripts_are_words():
    assert rouge_l("我住在北京", "他住在北京") == pytest.approx(4 / 5)
    assert rouge_l("Привет мир", "Привет дом") == pytest.approx(1 / 2)


@pytest.mark.parametrize(("response", "reference"), [("", "a"), ("a", ""), ("...", "a"), ("", "")])
def test_no_words_score_0(response, reference):
    assert rouge_l(response, reference) == 0
