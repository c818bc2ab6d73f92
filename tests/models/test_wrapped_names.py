"""Weights that were saved from a wrapper around the model, and checkpoints given as models.

Frozen here: the error names the added part of the names and its maker; what it advises for DDP,
torch.compile and FSDP leads to the whole model; another architecture is not blamed on a wrapper.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from okd_lightning.errors import ModelError, ModelNotFoundError
from okd_lightning.models import load_causal_lm, load_model_config
from okd_lightning.models.deferred import deferred_weights
from okd_lightning.models.sources import locate
from okd_lightning.models.wrapped_names import wrapper_advice
from okd_lightning.sharding.loading import fill_from_files

OPTION, WEIGHTS = "--model.student", "model.safetensors"


def rename(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({change(n): v for n, v in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def load_whole(folder: Path):
    return load_causal_lm(str(folder), load_model_config(str(folder), OPTION, 0), OPTION)


def load_by_shard(folder: Path):
    with deferred_weights():
        model = load_whole(folder)
    fill_from_files(model, torch.device("cpu"))
    return model


def refusal(load, folder: Path) -> str:
    with pytest.raises(ModelError, match=rf"^{OPTION}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("load", [load_whole, load_by_shard])
@pytest.mark.parametrize("make", [tiny.make_llama, tiny.make_gpt2])
@pytest.mark.parametrize(
    ("added", "maker"),
    [
        ("module.", "DistributedDataParallel"),
        ("_orig_mod.", "torch.compile"),
        ("module._orig_mod.", "DistributedDataParallel and torch.compile"),
        ("_fsdp_wrapped_module.", "FullyShardedDataParallel"),
    ],
)
def test_names_of_a_wrapper_are_explained_by_a_true_advice(added, maker, make, load, tmp_path):
    make(1).save_pretrained(tmp_path)
    rename(tmp_path, lambda name: added + name)
    message = refusal(load, tmp_path)
    assert re.search(rf"{maker}: remove (it|them) from the names", message)
    assert "another architecture" not in message
    for part in re.findall(r"'(\w+\.)'", message):
        rename(tmp_path, lambda name, part=part: name.removeprefix(part))
    load(tmp_path)


@pytest.mark.parametrize("load", [load_whole, load_by_shard])
@pytest.mark.parametrize(
    ("part", "maker"),
    [
        ("_orig_mod.", "torch.compile"),
        ("_fsdp_wrapped_module.", "FullyShardedDataParallel"),
        ("_checkpoint_wrapped_module.", "activation checkpointing"),
    ],
)
def test_parts_within_names_are_explained(part, maker, load, tmp_path):
    tiny.make_llama(1).save_pretrained(tmp_path)
    rename(tmp_path, lambda name: name.replace("layers.0.", f"layers.0.{part}"))
    message = refusal(load, tmp_path)
    assert f"'{part}' is of" in message
    assert maker in message
    rename(tmp_path, lambda name: name.replace(part, ""))
    load(tmp_path)


@pytest.mark.parametrize("load", [load_whole, load_by_shard])
@pytest.mark.parametrize("part", ["student.", "model.student.", "base_model.model."])
def test_names_of_a_module_around_the_model_are_explained(part, load, tmp_path):
    tiny.make_llama(1).save_pretrained(tmp_path)
    rename(tmp_path, lambda name: part + name)
    owner = "a PEFT model" if "base_model" in part else "a module"
    assert f" of {owner} around " in refusal(load, tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
def test_a_peft_model_saved_whole_is_explained(tmp_path):
    own = get_peft_model(tiny.make_llama(1), LoraConfig(target_modules=["q_proj"]))
    own.get_base_model().save_pretrained(tmp_path)
    assert "peft_model.merge_and_unload()" in refusal(load_whole, tmp_path)
    own.merge_and_unload().save_pretrained(tmp_path)
    load_whole(tmp_path)


def test_other_names_are_of_no_wrapper():
    missing = ["transformer.h.0.ln_1.weight", "lm_head.weight"]
    assert wrapper_advice([], missing) is None
    assert wrapper_advice(["model.norm.weight"], missing) is None
    assert wrapper_advice(["a.weight", "b.weight", "x.lm_head.weight"], missing * 2) is not None
    assert wrapper_advice(["a", "b", "c", "x.lm_head.weight"], ["lm_head.weight", "d", "e"]) is None


def test_a_checkpoint_given_as_a_model_is_exported_first(tmp_path):
    run = tmp_path / "a run"
    (run / "checkpoints" / "sharded.ckpt").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    last = run / "checkpoints" / "last.ckpt"
    with pytest.raises(ModelNotFoundError, match=r"is a checkpoint; okd-lightning export") as found:
        locate(str(last), OPTION)
    assert f"--ckpt_path '{last}' --out FOLDER" in str(found.value)
    for folder in (run, run / "checkpoints", run / "checkpoints" / "sharded.ckpt"):
        with pytest.raises(ModelNotFoundError, match=r"holds no model.*okd-lightning export"):
            load_model_config(str(folder), OPTION, 0)
