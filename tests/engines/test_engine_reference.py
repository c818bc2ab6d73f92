"""The engine against a loop that reads each row alone, from its start, for every token.

Frozen here: the same samples and log-probs on every architecture, also where memory cannot be
rearranged (state-space models), where rows end at once, after one token, and where prompts differ a
hundredfold in length; whatever the token budget, so independent of the joining and leaving rows;
prompts that are equal are read once; draws from a mixture of two models; a model's own layers are
as they were afterwards.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, SMALL, build
from transformers import AutoConfig, AutoModelForCausalLM

from okd_lightning.engines import Blend, NoiseStream, Sampling, TransformersEngine, kv_cache
from okd_lightning.engines import transformers_engine as engine_module
from okd_lightning.losses import cpu_linear
from okd_lightning.models import Vocabulary
from okd_lightning.records.counts import rollout_metrics
from okd_lightning.records.requests import Prompt, PromptBatch, Request, Rollout

NUM_IDS = 20
EOS_IDS = (1, 7)
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.7),
    Sampling(top_k=4),
    Sampling(temperature=1.5, top_k=9, top_p=0.8),
]

MAMBA = {
    "vocab_size": 23,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 8,
    "initializer_range": 0.3,
}
MAMBA_2 = {**MAMBA, "num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8}
STATE_SPACE = {"mamba": MAMBA, "mamba2": MAMBA_2}
EXTRA = {
    "gemma2, window 4": ("gemma2", {"sliding_window": 4}),
    "mistral": ("mistral", {**SMALL, "sliding_window": 5}),
    "qwen3_moe": (
        "qwen3_moe",
        {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
}


def model_of(name: str):
    if name in ARCHITECTURES:
        return build(name)
    model_type, settings = EXTRA.get(name, (name, STATE_SPACE.get(name, {})))
    if model_type in ARCHITECTURES:
        return build(model_type, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = AutoConfig.for_model(model_type, **settings)
        return AutoModelForCausalLM.from_config(config).eval()


def prompts_of(lengths: list[int], seed: int = 0) -> tuple[Prompt, ...]:
    generator = torch.Generator().manual_seed(seed)
    return PromptBatch(
        tuple(
            tuple(torch.randint(2, NUM_IDS, (length,), generator=generator).tolist())
            for length in lengths
        ),
        tuple(range(len(lengths))),
        (0,) * len(lengths),
    )


def distribution(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """[vocab] float64 probabilities, in plain steps."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    probs = (logits.double() / sampling.temperature).softmax(-1)
    order = probs.argsort(descending=True)
    kept = order[: sampling.top_k or len(order)]
    shares = probs[kept] / probs[kept].sum()
    kept = kept[(shares.cumsum(0) - shares) < sampling.top_p]
    found = torch.zeros_like(probs)
    found[kept] = probs[kept] / probs[kept].sum()
    return found


@torch.no_grad()
def slowly(model, prompt, noise, sampling, eos_ids=EOS_IDS):
    """Generate one row by a pass over the whole row for every token: no batch, no cache."""
    ids, logprobs = [], []
    for uniform in noise.tolist():
        logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, -1, :NUM_IDS]
        probs = distribution(logits, sampling)
        cdf = probs.cumsum(0)
        ids.append(int((cdf <= uniform * cdf[-1]).sum()))
        logprobs.append(float(probs[ids[-1]].log()))
        if ids[-1] in eos_ids:
            break
    return tuple(ids), logprobs


def write(model, prompts, sampling=None, max_new_tokens=10, eos_ids=EOS_IDS, **settings) -> Rollout:
    engine = TransformersEngine(model, Vocabulary(NUM_IDS), eos_ids, **settings)
    noise = NoiseStream(3, 1)
    return engine.respond(Request(prompts, sampling or Sampling(), noise, max_new_tokens))


def check(model, prompts, sampling=None, max_new_tokens=10, eos_ids=EOS_IDS, **settings) -> Rollout:
    sampling = sampling or Sampling()
    rollout = write(model, prompts, sampling, max_new_tokens, eos_ids, **settings)
    noise = NoiseStream(3, 1).uniform(
        [p.index for p in prompts], [p.sample for p in prompts], max_new_tokens
    )
    for i, prompt in enumerate(p.ids for p in prompts):
        ids, logprobs = slowly(model, prompt, noise[i], sampling, eos_ids)
        assert rollout.response_ids[i] == ids
        assert rollout[i].logprobs == pytest.approx(logprobs, abs=1e-4)
        assert rollout[i].stop_reason == ("eos" if ids[-1] in eos_ids else "length")
    return rollout


LENGTHS = [3, 1, 9, 3, 6, 2, 3, 12, 1]
ALL = [*ARCHITECTURES, *EXTRA, *STATE_SPACE]


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_generates_what_it_generates_alone(name):
    model = model_of(name)
    rollout = check(model, prompts_of(LENGTHS), token_budget=70)
    assert len({len(ids) for ids in rollout.response_ids}) > 1
    assert rollout.num_tokens <= rollout.num_row_steps


def test_which_memories_can_be_rearranged():
    refused = {name for name in ALL if not kv_cache.is_rearrangeable(model_of(name))}
    assert refused == {"recurrent_gemma", "falcon_h1", "mamba", "mamba2"}


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("token_budget", [1, 45, 10_000])
def test_every_sampling_at_every_budget(sampling, token_budget):
    prompts = prompts_of(LENGTHS * 2, seed=4)
    check(model_of("llama"), prompts, sampling, token_budget=token_budget)


def test_a_long_prompt_among_short_ones():
    lengths = [1, 40, 2, 1, 3, 1, 2, 39, 1, 1]
    model = model_of("qwen3")
    for token_budget in (60, 110, 1000):
        check(model, prompts_of(lengths), max_new_tokens=12, token_budget=token_budget)


def test_positions_stay_within_the_models_own():
    """A row that has ended stays in the batch, and must not exceed the limit."""
    model = build("gpt2", n_positions=20)
    lengths = [10, 10, 1, 1, 1, 1, 1, 1, 1, 1]
    rollout = check(model, prompts_of(lengths), max_new_tokens=10, eos_ids=(), token_budget=400)
    assert all(len(ids) == 10 for ids in rollout.response_ids)


@pytest.mark.parametrize("token_budget", [1, 40, 1000])
def test_one_token_and_ends_at_once(token_budget):
    model, prompts = model_of("llama"), prompts_of(LENGTHS)
    check(model, prompts, max_new_tokens=1, token_budget=token_budget)
    every_id = tuple(range(NUM_IDS))
    rollout = check(model, prompts, eos_ids=every_id, token_budget=token_budget)
    assert rollout.num_tokens == rollout.num_row_steps == len(prompts)  # reading wrote them all


def test_nothing_to_write():
    model = model_of("llama")
    nobody = write(model, PromptBatch((), (), ()))
    assert len(nobody) == nobody.num_row_steps == 0
    no_tokens = write(model, prompts_of([2, 3]), max_new_tokens=0)
    assert no_tokens.response_ids == ((), ())
    assert [response.stop_reason for response in no_tokens] == ["length", "length"]


def test_prompts_are_read_in_pieces(monkeypatch):
    monkeypatch.setattr(engine_module, "_PREFILL_TOKENS", 10)
    check(model_of("gemma2, window 4"), prompts_of(LENGTHS))


def test_equal_prompts_are_read_once():
    model = model_of("llama")
    prompts = PromptBatch(((5, 6, 4),) * 6 + ((8, 9),) * 2, (0,) * 6 + (1,) * 2, (*range(6), 0, 1))
    check(model, prompts)
    read = Counter()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.update([kwargs["input_ids"].shape]), with_kwargs=True
    )
    rollout = write(model, prompts)
    assert read[torch.Size((2, 3))] == 1
    assert len(set(rollout.response_ids)) > 4


def test_looking_seldom_who_has_ended_changes_nothing(monkeypatch):
    model, prompts = model_of("llama"), prompts_of(LENGTHS)
    often = write(model, prompts, token_budget=45)
    monkeypatch.setattr(engine_module, "_steps_per_check", lambda device: 4)
    seldom = write(model, prompts, token_budget=45)
    assert seldom.response_ids == often.response_ids
    assert seldom.num_row_steps > often.num_row_steps


def test_finished_rows_make_room():
    """The limit is what a batch takes that nobody leaves: the longest response for every row."""
    model, prompts = model_of("llama"), prompts_of([4] * 64)
    rollout = write(model, prompts, max_new_tokens=40, token_budget=44 * 16)
    lengths = sorted(len(ids) for ids in rollout.response_ids)
    whole_batches = sum(16 * max(lengths[i : i + 16]) for i in range(0, 64, 16))
    assert rollout.num_row_steps < 0.9 * whole_batches
    assert rollout.num_tokens > 0.75 * rollout.num_row_steps


def test_bfloat16_is_near_and_leaves_the_weights():
    model, prompts = model_of("llama"), prompts_of([4] * 40)
    rollout = write(model, prompts, max_new_tokens=1, dtype=torch.bfloat16)
    exact = write(model, prompts, max_new_tokens=1)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same = [(a.logprobs, b.logprobs) for a, b in zip(rollout, exact, strict=True) if a.ids == b.ids]
    assert len(same) > 25
    assert any(a != b for a, b in same)
    for a, b in same:
        assert a == pytest.approx(b, abs=0.3)


@pytest.mark.skipif(not cpu_linear.has_fast_linear(), reason="MKL is faster on this processor")
def test_wide_layers_run_on_other_kernels_and_only_meanwhile(monkeypatch):
    model = tiny.make_llama(1, hidden_size=256, intermediate_size=512)
    rows = torch.randn(5, 256)
    layer = model.model.layers[0].mlp.up_proj
    own = layer(rows)
    with cpu_linear.fast_linears(model), torch.no_grad():
        assert "forward" in vars(layer)
        assert "forward" not in vars(model.lm_head)  # small
        torch.testing.assert_close(layer(rows), own, rtol=1e-5, atol=1e-5)
        with torch.enable_grad():
            assert layer(rows).requires_grad
    assert "forward" not in vars(layer)
    prompts = prompts_of(LENGTHS)
    fast = write(model, prompts)
    monkeypatch.setattr(cpu_linear, "onednn_layers", lambda: "none")
    slow = write(model, prompts)
    assert fast.response_ids == slow.response_ids


def test_utilisation_is_the_share_of_row_steps_that_wrote():
    rollout = write(model_of("llama"), prompts_of(LENGTHS))
    metrics = rollout_metrics([(rollout, 2.0), (rollout, 3.0)])
    assert metrics["rollout/utilisation"] == rollout.num_tokens / rollout.num_row_steps < 1
    assert metrics["rollout/tokens_per_second"] == pytest.approx(2 * rollout.num_tokens / 5)
    silent = replace(rollout, num_row_steps=0)
    assert "rollout/utilisation" not in rollout_metrics([(silent, 1.0)])


class Mixture:
    """Reference of a mixture: a model whose logits are the mixture's log-probabilities."""

    def __init__(self, first, second, share):
        self.models, self.share = (first, second), share

    def __call__(self, ids, use_cache):
        p, q = (
            model(ids, use_cache=use_cache).logits[..., :NUM_IDS].double().softmax(-1)
            for model in self.models
        )
        return SimpleNamespace(logits=((1 - self.share) * p + self.share * q).log())


@pytest.mark.parametrize("second", ["gpt2", "gemma2, window 4", "mamba"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=5)])
def test_a_second_model_is_mixed_into_every_draw(second, sampling):
    """Rows leave and join in both memories, of other sizes; one cannot be rearranged at all."""
    first, second = model_of("llama"), model_of(second)
    prompts, share = prompts_of(LENGTHS), 0.35
    settings = {"blend": Blend(second, share), "token_budget": 70}
    rollout = write(first, prompts, sampling, **settings)
    noise = NoiseStream(3, 1).uniform([p.index for p in prompts], [p.sample for p in prompts], 10)
    mixture = Mixture(first, second, share)
    for i, prompt in enumerate(p.ids for p in prompts):
        ids, logprobs = slowly(mixture, prompt, noise[i], sampling)
        assert rollout.response_ids[i] == ids
        assert rollout[i].logprobs == pytest.approx(logprobs, abs=1e-4)
    assert rollout.response_ids != write(first, prompts, sampling).response_ids
    assert rollout.response_ids != write(second, prompts, sampling).response_ids
