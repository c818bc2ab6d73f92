"""Hostile model folders: settings of wrong types and sizes, broken tokenizers and weights, code."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_program import Bench, Case
from safetensors.torch import load_file, save_file

_CODE = "open('RAN', 'w')\n"
_CONFIG: dict[str, dict[str, Any]] = {
    "many layers": {"num_hidden_layers": 10**9},
    "more layers": {"num_hidden_layers": 5},
    "no layers": {"num_hidden_layers": 0},
    "negative layers": {"num_hidden_layers": -3},
    "layers as text": {"num_hidden_layers": "two"},
    "layers as a list": {"num_hidden_layers": [2]},
    "wide": {"hidden_size": 10**9},
    "no width": {"hidden_size": 0},
    "no heads": {"num_attention_heads": 0},
    "many heads": {"num_attention_heads": 10**8},
    "odd heads": {"num_attention_heads": 5},
    "key heads": {"num_key_value_heads": 3},
    "large vocabulary": {"vocab_size": 10**10},
    "small vocabulary": {"vocab_size": 3},
    "negative vocabulary": {"vocab_size": -1},
    "large layers": {"intermediate_size": 10**10},
    "many positions": {"max_position_embeddings": 10**12},
    "no positions": {"max_position_embeddings": 0},
    "unknown type": {"model_type": "nothing"},
    "type of a number": {"model_type": 7},
    "no type": {"model_type": None},
    "other type": {"model_type": "bert"},
    "unknown class": {"architectures": ["Nothing"]},
    "class as text": {"architectures": "LlamaForCausalLM"},
    "code": {"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}},
    "code elsewhere": {"auto_map": {"AutoConfig": "../../x--code.C"}, "model_type": "x"},
    "dtype": {"dtype": "float7"},
    "dtype of a number": {"dtype": 7},
    "activation": {"hidden_act": "__import__('os').system('touch RAN')"},
    "rope": {"rope_parameters": {"rope_type": "nothing"}},
    "rope of a number": {"rope_parameters": 7},
    "quantised": {"quantization_config": {"quant_method": "nothing"}},
    "quantised code": {"quantization_config": {"quant_method": 7, "code": "RAN"}},
    "ids": {"eos_token_id": 10**12, "pad_token_id": "x"},
    "pad id": {"pad_token_id": 10**6},
    "attention": {"attn_implementation": "../../../x", "_attn_implementation": "a/b:code"},
    "norm": {"rms_norm_eps": "x"},
    "NaN": {"initializer_range": float("nan")},
    "deep": {"x": json.loads("[" * 400 + "]" * 400)},
    "escapes": {"model_type": "\x1b[2J\u202e"},
    "named weights": {"transformers_weights": "../../../etc/passwd"},
}
_JSON_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "adapter_config.json"),
)
_BROKEN = {
    "empty": b"",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "zeros": b"\0" * 1000,
    "bytes": b'{"a": "\xff"}',
    "twice": b'{"model_type": "llama"} {}',
}
_RAW: dict[str, tuple[str, bytes]] = {
    **{
        f"{name}: {what}": (name, content)
        for name in _JSON_FILES
        for what, content in _BROKEN.items()
    },
    "generation: ids": ("generation_config.json", b'{"eos_token_id": "x"}'),
    "generation: float": ("generation_config.json", b'{"eos_token_id": [1.5, null]}'),
    "tokenizer: object": ("tokenizer.json", b"{}"),
    "tokenizer: deep objects": ("tokenizer.json", b'{"model":' * 50_000),
    "tokenizer: type": ("tokenizer.json", b'{"version":"1.0","model":{"type":"Nothing"}}'),
    "tokenizer settings: class": ("tokenizer_config.json", b'{"tokenizer_class": "os.system"}'),
    "tokenizer settings: number": ("tokenizer_config.json", b'{"tokenizer_class": 7}'),
    "tokenizer settings: eos": ("tokenizer_config.json", b'{"eos_token": {"a": 1}}'),
    "tokenizer settings: code": (
        "tokenizer_config.json",
        b'{"auto_map": {"AutoTokenizer": ["code.T", null]}, "tokenizer_class": "T"}',
    ),
    "special tokens: number": ("special_tokens_map.json", b'{"eos_token": 7}'),
    "weights: empty": ("model.safetensors", b""),
    "weights: header": ("model.safetensors", b"\xff" * 16),
    "weights: length": ("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "weights: pointer": ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
    "weights: object": ("model.safetensors", (2).to_bytes(8, "little") + b"{}"),
    "added tokens": ("added_tokens.json", b'{"a": -1, "b": 99999999999}'),
    "template: folder": ("chat_template.jinja/x", b""),
    "adapter beside a model": ("adapter_config.json", b'{"peft_type": "os.system"}'),
}


def _with_config(changes: dict[str, Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        (folder / "code.py").write_text(_CODE)

    return change


def _with_file(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / "code.py").write_text(_CODE)

    return change


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch RAN'\ntR.")


def _index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "../../../../etc/passwd"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _deep_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)


def _pipe(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def _device(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return change


def _sparse(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(50 << 30)

    return change


def _with_weights(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def _spoil(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"][0, 0] = value

    return edit


def _drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def _turn(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()


def _adapter(**changes: Any) -> Callable[[Path], None]:
    """Convert the folder to an adapter on its model."""

    def change(folder: Path) -> None:
        base = folder.rename(folder.with_name("base"))
        name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
        shapes = {"A": (2, 32), "B": (32, 2)}
        folder.mkdir()
        save_file(
            {name.format(side): torch.ones(shape) for side, shape in shapes.items()},
            folder / "adapter_model.safetensors",
        )
        config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 2}
        config |= {"target_modules": r"model\.layers\.0\.self_attn\.q_proj", **changes}
        (folder / "adapter_config.json").write_text(json.dumps(config))

    return change


_ADAPTERS: dict[str, dict[str, Any]] = {
    "good": {},
    "huge rank": {"r": 10**9},
    "enormous rank": {"r": 10**30},
    "no rank": {"r": 0},
    "negative rank": {"r": -5},
    "rank of text": {"r": "x"},
    "rank of a list": {"r": [2]},
    "huge pattern": {"rank_pattern": {"q_proj": 10**9}},
    "targets": {"target_modules": 7},
    "slow targets": {"target_modules": "(m+)+$" + "x" * 40},
    "everything": {"target_modules": ".*"},
    "scale": {"lora_alpha": "x"},
    "initialisation": {"init_lora_weights": "../x"},
    "saved": {"modules_to_save": ["nothing"]},
    "base of itself": {"base_model_name_or_path": "."},
    "base outside": {"base_model_name_or_path": "/etc"},
    "base of a number": {"base_model_name_or_path": 7},
    "class": {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
    "runtime": {"runtime_config": 7},
    "kind": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**9},
}


def _mutate(seed: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rng = random.Random(seed)
        names = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
        path = folder / rng.choice(names)
        content = bytearray(path.read_bytes())
        for _ in range(3):
            content[rng.randrange(min(len(content), 2000))] = rng.choice(b'{}[]",:\x00\x1b9')
        path.write_bytes(bytes(content))

    return change


def _case(name: str, change: Callable[[Path], None]) -> Case:
    def act(bench: Bench) -> None:
        folder = bench.folder / "student"
        shutil.copytree(bench.student, folder)
        change(folder)
        bench.train(student=folder)

    return Case(name, act)


def cases(seed: int) -> list[Case]:
    """Yield all cases."""
    special = {
        "pickled weights": _pickled,
        "index outside": _index,
        "deep index": _deep_index,
        "config is a pipe": _pipe("config.json"),
        "tokenizer is a pipe": _pipe("tokenizer.json"),
        "weights are a pipe": _pipe("model.safetensors"),
        "config is a device": _device("config.json"),
        "weights are a device": _device("model.safetensors"),
        "config of 50 GiB": _sparse("config.json"),
        "tokenizer of 50 GiB": _sparse("tokenizer.json"),
        "weights NaN": _with_weights(_spoil(float("nan"))),
        "weights infinite": _with_weights(_spoil(float("inf"))),
        "weights missing": _with_weights(_drop),
        "weights turned": _with_weights(_turn),
    }
    return [
        *(_case(f"config: {name}", _with_config(changes)) for name, changes in _CONFIG.items()),
        *(_case(name, _with_file(*given)) for name, given in _RAW.items()),
        *(_case(name, change) for name, change in special.items()),
        *(_case(f"adapter: {name}", _adapter(**how)) for name, how in _ADAPTERS.items()),
        *(_case(f"mutated {i}", _mutate(seed * 1000 + i)) for i in range(10)),
    ]
