"""Quantised copies of tiny models: GGUF files as llama.cpp writes them, bitsandbytes folders."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(
    path: Path, model, is_quantised: bool, left_out: str = "nothing", split: str = "default"
) -> None:
    """A tiny Llama as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(len(model.lm_head.weight))
    tokens = ["<pad>", "<eos>", "<bos>", *tiny.LETTERS, "ab", "[PAD20]", "[PAD21]"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 17 + [5, 5])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(tiny.BOS)
    writer.add_eos_token_id(tiny.EOS)
    writer.add_pad_token_id(tiny.PAD)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, value in model.state_dict().items():
        plain, array = name.removesuffix(".weight"), value.numpy()
        block = plain.split(".", 3) if plain.startswith("model.layers") else None
        own = NAMES[block[3] if block else plain]
        own = f"blk.{block[2]}.{own}.weight" if block else f"{own}.weight"
        if left_out in own:
            continue
        for part, heads in (("attn_q", 4), ("attn_k", 2)):  # llama.cpp's order of rotated halves
            if part in own:
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        if is_quantised and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(own, gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(own, array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def save_nf4(full: Path, folder: Path) -> None:
    """The model of a folder in 4 bits, by bitsandbytes."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        full, quantization_config=config, dtype=torch.float32
    )
    model.save_pretrained(folder)
