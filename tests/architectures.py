"""Tiny random models of many architectures, with their heads' specialities switched on."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
        **{k: v for k, v in SMALL.items() if k != "head_dim"},
        "num_key_value_heads": 4,
        "dim_model_base": 8,
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


def build(model_type: str, **overrides) -> PreTrainedModel:
    """Build a model in eval mode, always with the same weights."""
    config = AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(config).eval()
