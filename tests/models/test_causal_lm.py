"""A causal LM as (hidden states, head).

Frozen here: head(head_inputs) equals the model's own logits, for plain, tied, biased, scaled and
soft-capped heads and for adapters, also on the head itself; padding on the right changes no real
position; an architecture that treats its logits in a way that is not known is refused and not
silently mis-measured; the hook leaves nothing behind.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from okd_lightning.models import LMHead, Vocabulary, add_adapter, head_inputs, max_positions

SMALL = {
    "vocab_size": 23,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

ARCHITECTURES = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gpt2": {"vocab_size": 23, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "opt": {
        "vocab_size": 23,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "init_std": 0.3,
    },
    "phi": {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")},
    "gemma2": {**SMALL, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SMALL, "final_logit_softcapping": 1.5},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "cohere2": {**SMALL, "logit_scale": 0.25},
    "granite": {**SMALL, "logits_scaling": 3.0},
    "hyperclovax": {**SMALL, "logits_scaling": 3.0},
    "recurrent_gemma": {
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"},
        "logits_soft_cap": 1.5,
        "num_hidden_layers": 3,
    },
    "minicpm3": {
        **{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")},
        "logits_scaling": 3.0,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
    "falcon_h1": {
        **SMALL,
        "lm_head_multiplier": 0.3,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
    },
    "nanochat": {**SMALL, "final_logit_softcapping": 1.5},
}

INPUT_IDS = torch.tensor([[3, 5, 7, 9, 11], [4, 6, 0, 0, 0]])
LENGTHS = torch.tensor([5, 2])
MASK = torch.arange(5) < LENGTHS[:, None]


def build(model_type: str, **overrides):
    config = AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(config).eval()


def check_equal(model, vocabulary: Vocabulary | None = None) -> None:
    vocabulary = vocabulary or Vocabulary(23)
    with torch.no_grad():
        logits = LMHead.of(model, vocabulary)(head_inputs(model, INPUT_IDS, MASK))
        for i, length in enumerate(LENGTHS.tolist()):
            own = model(input_ids=INPUT_IDS[i : i + 1, :length]).logits[0]
            assert own.std() > 0.1
            torch.testing.assert_close(
                logits[i, :length], own[:, : vocabulary.size], rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_our_logits_are_the_models_own(model_type):
    check_equal(build(model_type))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_and_untied_heads(model_type, is_tied):
    model = build(model_type, tie_word_embeddings=is_tied)
    is_same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_same == is_tied
    check_equal(model)


@pytest.mark.parametrize("target", [["q_proj", "v_proj"], ["q_proj", "lm_head"], "all-linear"])
def test_adapters_take_part(target):
    model = build("llama")
    adapter = LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    with torch.no_grad():
        before = model(input_ids=INPUT_IDS[:1]).logits
    with torch.random.fork_rng():
        torch.manual_seed(6)
        add_adapter(model, adapter, "--model.student_adapter")
    with torch.no_grad():
        assert (model(input_ids=INPUT_IDS[:1]).logits - before).abs().max() > 0.1
    check_equal(model)


def test_what_stands_behind_a_row_is_not_read():
    model = build("llama")
    garbage = torch.where(MASK, INPUT_IDS, torch.full_like(INPUT_IDS, 20))
    with torch.no_grad():
        plain, spoilt = (head_inputs(model, ids, MASK)[MASK] for ids in (INPUT_IDS, garbage))
        wide = torch.cat([garbage, torch.full((2, 9), 21)], dim=1)
        padded = head_inputs(model, wide, torch.arange(14) < LENGTHS[:, None])[:, :5][MASK]
    torch.testing.assert_close(spoilt, plain, rtol=0, atol=0)
    torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_gradients_of_the_split_model_are_the_whole_ones():
    split, whole = build("gemma2").double(), build("gemma2").double()
    logits = LMHead.of(split, Vocabulary(23))(head_inputs(split, INPUT_IDS, MASK))
    logits[:, :-1][MASK[:, 1:]].log_softmax(-1)[:, 3].sum().backward()
    own = whole(input_ids=INPUT_IDS, attention_mask=MASK).logits
    own[:, :-1][MASK[:, 1:]].log_softmax(-1)[:, 3].sum().backward()
    for (name, found), (_, expected) in zip(
        split.named_parameters(), whole.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


def test_the_hook_is_gone_also_after_an_error():
    model = build("llama")
    with pytest.raises(IndexError):
        head_inputs(model, torch.tensor([[99]]), torch.tensor([[True]]))
    head_inputs(model, INPUT_IDS, MASK)
    assert model(input_ids=INPUT_IDS).logits.shape == (2, 5, 23)


def test_invalid_ids_are_minus_infinity_and_rows_behind_the_tokenizer_are_cut():
    model = build("llama")
    with torch.no_grad():
        logits = LMHead.of(model, Vocabulary(20, (4, 7)))(head_inputs(model, INPUT_IDS, MASK))
        own = model(input_ids=INPUT_IDS[:1]).logits[0, :, :20]
    assert logits.shape[-1] == 20
    assert (logits[..., [4, 7]] == -torch.inf).all()
    rest = [i for i in range(20) if i not in (4, 7)]
    torch.testing.assert_close(logits[0][:, rest], own[:, rest], rtol=1e-5, atol=1e-5)


def test_bf16_logits_are_handed_over_in_float32_and_float64_stays():
    vocabulary = Vocabulary(23)
    narrow, wide = build("llama").bfloat16(), build("llama").double()
    for model, dtype in ((narrow, torch.float32), (wide, torch.float64)):
        logits = LMHead.of(model, vocabulary)(head_inputs(model, INPUT_IDS, MASK))
        assert logits.dtype == dtype
    narrow_logits = LMHead.of(narrow, vocabulary)(head_inputs(narrow, INPUT_IDS, MASK))
    assert (narrow_logits[MASK] - logits[MASK]).abs().max() < 0.1 * logits[MASK].abs().max()


def test_max_positions():
    assert max_positions(tiny.make_llama(1).config) == 64
    assert max_positions(tiny.make_gpt2(1).config) == 64
    assert max_positions(AutoConfig.for_model("bloom")) is None
