"""The built-in engine, on real (tiny) models.

Frozen here: greedy is transformers' own ``generate``; samples follow the model; the sampler's
log-probs are the trainer's on the same tokens, under the distribution that was drawn from; a sample
depends on neither its batch, its order nor the token budget; several eos ids end a row and belong
to it; what is cut has none; prompts of different lengths do not disturb each other, also under a
sliding window and with learned positions.
"""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from architectures import build

from okd_lightning.engines import NoiseStream, Sampling, TransformersEngine
from okd_lightning.models import Vocabulary, recompute_activations
from okd_lightning.records.requests import Prompt, PromptBatch, Request

GREEDY = Sampling(temperature=0)


def prompts_of(num: int, seed: int = 0, longest: int = 7) -> tuple[Prompt, ...]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num,), generator=generator).tolist()
    return PromptBatch(
        input_ids=tuple(
            tuple(torch.randint(3, tiny.NUM_IDS, (length,), generator=generator).tolist())
            for length in lengths
        ),
        index=tuple(range(num)),
        sample=(0,) * num,
    )


def select(prompts: PromptBatch, rows: list[int]) -> tuple[Prompt, ...]:
    return tuple(prompts[i] for i in rows)


def engine_of(model, eos_ids=(tiny.EOS,), vocabulary=None, **settings) -> TransformersEngine:
    return TransformersEngine(model, vocabulary or Vocabulary(tiny.NUM_IDS), eos_ids, **settings)


def write(model, prompts, sampling=None, max_new_tokens=12, seed=5, **settings):
    engine = engine_of(model, **settings)
    noise = NoiseStream(seed, 0)
    return engine.respond(Request(prompts, sampling or Sampling(), noise, max_new_tokens))


MODELS = {
    "llama": lambda: tiny.make_llama(1, tiny.NUM_IDS),
    "gpt2": lambda: tiny.make_gpt2(3, tiny.NUM_IDS),
    "gemma2, window 4": lambda: build("gemma2", vocab_size=tiny.NUM_IDS, sliding_window=4),
    "granite": lambda: build("granite", vocab_size=tiny.NUM_IDS),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("eos_ids", [(4, 9, 12)], ids=str)
def test_greedy_is_generate(name, eos_ids):
    model = MODELS[name]()
    prompts = prompts_of(7)
    rollout = write(model, prompts, GREEDY, eos_ids=eos_ids)
    for prompt, written in ((p.ids, r.ids) for p, r in zip(prompts, rollout, strict=True)):
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(eos_ids),
            pad_token_id=tiny.PAD,
        )
        assert list(written) == expected[0, len(prompt) :].tolist()


def test_samples_follow_the_model():
    model = tiny.make_llama(1)
    num, prompt = 4000, (5, 6, 7)
    prompts = PromptBatch((prompt,) * num, (3,) * num, tuple(range(num)))
    rollout = write(model, prompts, max_new_tokens=2)
    with torch.no_grad():
        probs = model(torch.tensor([prompt])).logits[0, -1, : tiny.NUM_IDS].double().softmax(-1)
        first = Counter(ids[0] for ids in rollout.response_ids)
        check_counts([first[i] for i in range(tiny.NUM_IDS)], probs * num)
        token = max((i for i in first if i != tiny.EOS), key=first.__getitem__)
        after = torch.tensor([[*prompt, token]])
        probs = model(after).logits[0, -1, : tiny.NUM_IDS].double().softmax(-1)
    second = Counter(ids[1] for ids in rollout.response_ids if ids[0] == token)
    check_counts([second[i] for i in range(tiny.NUM_IDS)], probs * first[token])


def check_counts(found: list[int], expected: torch.Tensor) -> None:
    deviation = (torch.tensor(found).double() - expected).abs() / expected.clamp(min=1).sqrt()
    assert deviation.max() < 5, deviation


ROUNDING = 1e-4
"""Rounding of float32 logits up to 30 in another order of summation: some 50 times 2^-24 · 30."""

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=5),
    Sampling(top_p=0.8),
    Sampling(temperature=2.0, top_k=9, top_p=0.9),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2, window 4"])
def test_the_samplers_logprobs_are_the_trainers(sampling, name):
    model = MODELS[name]()
    prompts = prompts_of(8)
    rollout = write(model, prompts, sampling)
    for asked, response in zip(prompts, rollout, strict=True):
        prompt, ids, logprobs = asked.ids, response.ids, response.logprobs
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        teacher_forced = sampling.logprobs(logits).gather(-1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs), teacher_forced, rtol=0, atol=ROUNDING)
        if sampling.top_k:
            assert (logits >= logits.gather(-1, torch.tensor(ids)[:, None])).sum(-1).max() <= 9


@pytest.mark.parametrize("name", MODELS)
def test_samples_depend_on_neither_batch_order_nor_budget(name):
    model = MODELS[name]()
    prompts = prompts_of(12)
    whole = write(model, prompts)
    one_by_one = [write(model, select(prompts, [i])) for i in range(12)]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2)).tolist()
    shuffled = write(model, select(prompts, order))
    small = write(model, prompts, token_budget=50)
    for i in range(12):
        at = order.index(i)
        for other, j in ((one_by_one[i], 0), (shuffled, at), (small, i)):
            assert other.response_ids[j] == whole.response_ids[i]
            assert other[j].stop_reason == whole[i].stop_reason
            assert other[j].logprobs == pytest.approx(whole[i].logprobs, abs=ROUNDING)
    assert len({len(ids) for ids in whole.response_ids}) > 2  # rows did leave at different times


def test_samples_of_one_prompt_differ_and_a_limit_cuts_without_changing():
    model = tiny.make_llama(1)
    prompts = PromptBatch(((5, 6),) * 8, (3,) * 8, tuple(range(8)))
    long, short = (write(model, prompts, max_new_tokens=n) for n in (12, 3))
    assert len(set(long.response_ids)) > 4
    for whole, cut in zip(long, short, strict=True):
        ids = whole.ids
        assert cut.ids == ids[:3]
        assert cut.stop_reason == ("eos" if len(ids) <= 3 and ids[-1] == tiny.EOS else "length")


def test_other_seeds_and_epochs_write_something_else():
    model, prompts = tiny.make_llama(1), prompts_of(8)
    found = [
        engine_of(model).generate(prompts, Sampling(), NoiseStream(*keys), 8).response_ids
        for keys in ((1, 0), (1, 1), (2, 0))
    ]
    assert len(set(found)) == 3


def test_where_a_response_ends():
    model = tiny.make_llama(1)
    rollout = write(model, prompts_of(60), eos_ids=(4, 9, tiny.EOS), max_new_tokens=5)
    assert {ids[-1] for ids in rollout.response_ids} >= {4, 9, tiny.EOS}
    assert {r.stop_reason for r in rollout} == {"eos", "length"}
    for ids, logprobs, reason in ((r.ids, r.logprobs, r.stop_reason) for r in rollout):
        assert len(ids) == len(logprobs) > 0
        assert not set(ids[:-1]) & {4, 9, tiny.EOS}
        assert (reason == "eos") == (ids[-1] in (4, 9, tiny.EOS))
        assert reason == "eos" or len(ids) == 5
    assert rollout.num_tokens == sum(map(len, rollout.response_ids))


def test_pad_is_an_id_like_others():
    """With pad = eos, or pad in the middle of a prompt, nothing is masked by id."""
    model = tiny.make_llama(1)
    prompt = (tiny.EOS, 5, tiny.PAD, 6)
    alone = write(model, PromptBatch((prompt,), (0,), (0,)), GREEDY)
    beside = write(model, PromptBatch((prompt, (7,) * 9), (0, 1), (0, 0)), GREEDY)
    assert alone.response_ids[0] == beside.response_ids[0]
    with torch.no_grad():
        best = model(torch.tensor([prompt])).logits[0, -1, : tiny.NUM_IDS].argmax()
    assert alone.response_ids[0][0] == best


def test_progress_counts_every_row_and_token_once():
    told: list[tuple[int, int]] = []
    engine = engine_of(tiny.make_llama(1), token_budget=80)
    rollout = engine.respond(
        Request(
            prompts_of(20),
            Sampling(),
            NoiseStream(0, 0),
            6,
            progress=lambda *seen: told.append(seen),
        )
    )
    assert sum(rows for rows, _ in told) == 20
    assert sum(tokens for _, tokens in told) == rollout.num_tokens
    assert len([rows for rows, _ in told if rows]) > 4


def test_an_engine_can_be_used_again():
    engine = engine_of(tiny.make_llama(1))
    first, second = (
        engine.respond(Request(prompts_of(5), Sampling(), NoiseStream(0, 0), 6)) for _ in range(2)
    )
    assert first == second


def test_gradient_checkpointing_does_not_change_responses():
    model, prompts = tiny.make_llama(1), prompts_of(6)
    expected = write(model, prompts)
    recompute_activations(model, "--model.student")
    assert write(model.eval(), prompts).response_ids == expected.response_ids
