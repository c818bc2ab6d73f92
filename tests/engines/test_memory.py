"""Cache of a model during generation, tested on the model before it is used.

Frozen here: a model that ignores the cache it is handed (rwkv), names none (OpenAI GPT), brings its
own (MiniMax) or counts positions by the cache's columns (Pegasus) generates what whole passes do,
greedy and sampled, alone and mixed with another model; which way each architecture takes; a model
that keeps its cache only in part is found out, untrained ones and 16 bits too; slow generation is
said once; the trial leaves no trace.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from architectures import ARCHITECTURES
from test_engine_reference import (
    EXTRA,
    LENGTHS,
    STATE_SPACE,
    Mixture,
    check,
    model_of,
    prompts_of,
    slowly,
    write,
)
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from okd_lightning.engines import Blend, NoiseStream, Sampling
from okd_lightning.engines.memory import memory_of

SMALL_DECODER = {
    "vocab_size": 23,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "pad_token_id": 0,
}
MORE = {
    "rwkv": {
        "vocab_size": 23,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "attention_hidden_size": 32,
        "context_length": 64,
    },
    "openai-gpt": {"vocab_size": 23, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "minimax": {
        "vocab_size": 23,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "initializer_range": 0.3,
    },
    "pegasus": SMALL_DECODER,
    "bart": SMALL_DECODER,
    "bloom": {"vocab_size": 23, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "jamba": {
        "vocab_size": 23,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_expand": 1,
        "initializer_range": 0.3,
    },
}
WAYS = {
    **dict.fromkeys([*ARCHITECTURES, *EXTRA, "bloom"], "rows"),
    **dict.fromkeys(["recurrent_gemma", "falcon_h1", *STATE_SPACE], "batch"),
    **dict.fromkeys(["pegasus", "bart", "jamba"], "batch"),
    **dict.fromkeys(["rwkv", "openai-gpt", "minimax"], "none"),
}


def make(name: str):
    if name not in MORE:
        return model_of(name)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = AutoConfig.for_model(name, **MORE[name])
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", WAYS)
def test_the_way_of_each_architecture(name):
    assert memory_of(make(name)) == WAYS[name]


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.8, top_k=7)])
def test_generation_is_that_of_whole_passes(name, sampling):
    rollout = check(make(name), prompts_of(LENGTHS), sampling, token_budget=70)
    assert len(set(rollout.response_ids)) > 1


def test_whole_passes_in_pieces_and_with_limits(monkeypatch):
    model, prompts = make("openai-gpt"), prompts_of(LENGTHS)
    monkeypatch.setattr("okd_lightning.engines.whole_passes._PASS_TOKENS", 11)
    rollout = check(model, prompts)
    assert rollout.num_row_steps == rollout.num_tokens
    limits = tuple(replace(prompt, limit=2) for prompt in prompts)
    short = write(model, limits)
    assert short.response_ids == tuple(ids[:2] for ids in rollout.response_ids)


@pytest.mark.parametrize("pair", [("llama", "rwkv"), ("openai-gpt", "gpt2")])
def test_a_mixture_takes_the_slower_way(pair):
    first, second = (make(name) for name in pair)
    prompts = prompts_of(LENGTHS)
    rollout = write(first, prompts, blend=Blend(second, 0.4), token_budget=70)
    noise = NoiseStream(3, 1).uniform([p.index for p in prompts], [p.sample for p in prompts], 10)
    for i, prompt in enumerate(p.ids for p in prompts):
        ids, logprobs = slowly(Mixture(first, second, 0.4), prompt, noise[i], Sampling())
        assert rollout.response_ids[i] == ids
        assert rollout[i].logprobs == pytest.approx(logprobs, abs=1e-4)


class Forgetful(LlamaForCausalLM):
    """Model that ignores the content of the given cache."""

    def forward(self, input_ids=None, past_key_values=None, position_ids=None, **kwargs):
        kwargs.pop("attention_mask", None)
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


class LosesTheFirst(LlamaForCausalLM):
    """Model that loses the first token of the cache."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        if attention_mask is not None and past_key_values is not None:
            attention_mask = attention_mask.clone()
            attention_mask[:, 0] = 0
        elif past_key_values is not None:
            seen = past_key_values.get_seq_length() + input_ids.shape[1]
            attention_mask = torch.ones(len(input_ids), seen).long()
            attention_mask[:, 0] = 0
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("kind", [Forgetful, LosesTheFirst])
def test_a_broken_cache_is_found_out(kind, std, dtype):
    model = tiny.make_llama(1, initializer_range=std)
    assert memory_of(model.to(dtype)) == "rows"
    broken = kind(model.config).to(dtype).eval()
    broken.load_state_dict(model.state_dict())
    assert memory_of(broken) == "none"
    if dtype == torch.float32:
        check(broken, prompts_of([3, 1, 5]), max_new_tokens=4)


def test_the_trial_leaves_no_trace_and_is_made_once(caplog):
    model = make("rwkv").train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert memory_of(model) == memory_of(model) == "none"
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert len(passes) <= 1
    said = [r.getMessage() for r in caplog.records if "whole row" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("RwkvForCausalLM does not continue from the cache")
