"""Shrunken copies of the pairs in configs/pairs, and rows as their tasks have them.

A copy keeps what makes its architecture special: how many queries share a key, tied embeddings,
rows of the table that no token has, soft caps and sliding windows that are small enough to act.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import vision
from byte_tokenizer import make_byte_tokenizer
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from okd_lightning.models.multimodal import auto_class

ROOT = Path(__file__).parents[1]
RUNS = {  # pair and task, with what the run logs
    ("qwen3", "gsm8k"): "train/opd_plus",
    ("qwen3", "toolalpaca"): "train/opd_plus",
    ("qwen2_5", "gsm8k"): "train/gkd",
    ("llama3_2", "dolly"): "train/kd",
    ("gemma2", "gsm8k"): "train/gkd",
    ("gpt2_dolly", None): "train/okd",
    ("smolvlm", None): "train/gkd",
}
CONFIGS = {f"pairs/{pair}" for pair, _ in RUNS} | {f"tasks/{task}" for _, task in RUNS if task}

_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ quiet }}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ quiet }}{% endif %}"
)
_QUIET = "{% set quiet = '<quiet>' if enable_thinking is defined and not enable_thinking else '' %}"


def benchmark(name: str) -> ModuleType:
    """A module of benchmarks/, which import each other by their bare names."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def shrunken(entry: Mapping[str, Any], groups: int, num_ids: int) -> dict[str, Any]:
    """A config with the same specialities and next to no weights.

    Args:
        entry: Of benchmarks/pair_models.json.
        groups: Heads of keys; models that have more are wider.
        num_ids: Tokens of the tokenizer that the copy gets.
    """
    fields = copy.deepcopy(dict(entry["config"]))
    fields["vocab_size"] = num_ids + fields["vocab_size"] - entry["tokens"]
    fields |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    if fields["model_type"] == "gpt2":
        return {**fields, "n_layer": 2, "n_head": 2 * groups, "n_embd": 16 * groups}
    heads = groups * fields["num_attention_heads"] // fields["num_key_value_heads"]
    small = {"num_hidden_layers": 2, "num_key_value_heads": groups, "num_attention_heads": heads}
    small |= {"hidden_size": 4 * heads, "intermediate_size": 8 * heads, "head_dim": 4}
    if "head_dim" not in fields:
        del small["head_dim"]
    acting = {
        "sliding_window": 8,
        "query_pre_attn_scalar": 4,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    }
    small |= {name: value for name, value in acting.items() if fields.get(name) is not None}
    return {**fields, **small}


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of one id per byte, and a template with Qwen3's ``enable_thinking``."""
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = _QUIET + _TEMPLATE
    return tokenizer


def save_pair(pair: str, folder: Path) -> list[str]:
    """Both copies with their tokenizer, and the flags that put them in a pair's place."""
    tables = benchmark("recipe_tables")
    model = tables.load_config(f"pairs/{pair}")["model"]
    flags = []
    for groups, side in enumerate(("student", "teacher"), 1):
        entry = tables.MODELS[tables.LOCAL.get(model[side], model[side])]
        if "vision_config" in entry["config"]:
            save_vision(entry, groups, folder / side)
            flags += [f"--model.{side}", str(folder / side)]
            continue
        tokenizer = make_tokenizer()
        made = make(shrunken(entry, groups, len(tokenizer)), seed=groups)
        ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
        made.generation_config = GenerationConfig(eos_token_id=ends)
        made.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
        flags += [f"--model.{side}", str(folder / side)]
    return flags


def save_vision(entry: Mapping[str, Any], groups: int, folder: Path) -> None:
    """A copy with its processor: crops of 64 patches are 4 tokens (student), of 36 (teacher)."""
    tokenizer = vision.make_tokenizer("idefics3")
    fields = copy.deepcopy(dict(entry["config"]))
    text = {**entry, "config": fields["text_config"]}
    fields |= {"text_config": shrunken(text, groups, len(tokenizer)), "image_token_id": 3}
    fields |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    fields["text_config"] |= {"bos_token_id": 2, "pad_token_id": 0}
    size = 4 * fields["scale_factor"]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "image_size": size, "patch_size": 2}
    made = make({**fields, "vision_config": {**fields["vision_config"], **small}}, seed=groups)
    made.generation_config = GenerationConfig(eos_token_id=1)
    made.save_pretrained(folder)
    sizes = {"size": {"longest_edge": 2 * size}, "max_image_size": {"longest_edge": size}}
    if fields["model_type"] == "idefics3":
        images = vision.Idefics3ImageProcessorPil(**sizes)
        vision.Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)
        return
    tokenizer.save_pretrained(folder)
    vision.SmolVLMImageProcessorPil(**sizes).save_pretrained(folder)
    about = {"image_seq_len": 4, "processor_class": "SmolVLMProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(about))


def make(fields: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """Return a model with random weights from a fixed seed."""
    config = AutoConfig.for_model(**fields)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return auto_class(config).from_config(config).eval()


def rows_of(task: str | None, pair: str = "", folder: Path = Path()) -> list[dict[str, Any]]:
    """Rows with the columns that the task's data has; images are written into the folder."""
    if pair == "smolvlm":
        return vision.image_rows(folder, 8)
    if task == "gsm8k":
        return [{"question": f"What is {i}+1?", "answer": f"#### {i + 1}"} for i in range(8)]
    if task == "toolalpaca":
        return benchmark("toolalpaca").rows_of([TOOLALPACA])
    return [
        {
            "instruction": f"Name {i} colours",
            "context": "of the sky" if i % 2 else "",
            "response": "blue",
            "category": "brainstorming",
        }
        for i in range(8)
    ]


TOOLALPACA = {  # the shape of train_data.json, as ToolAlpaca's README gives it
    "Name": "Colours",
    "Function_Description": {
        "list": 'Lists colours.\nParameters: {"n": "Required. Integer. How many."}\nOutput: names.',
        "components": "",
    },
    "Function_Projection": {"list": ["/list", "get"]},
    "Instances": [
        {
            "input": f"Name {i} colours\nHint: none",
            "output": "blue",
            "intermediate_steps": [
                [["getDetails", '{"Question": "Which?"}', "..."], "any"],
                [["list", json.dumps({"n": i}), "..."], "blue"],
            ],
        }
        for i in range(8)
    ],
}
