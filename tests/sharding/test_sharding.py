"""Sharding of models, and refused settings (one process; test_fsdp2 has two).

Frozen here: the units of many architectures are their own blocks, none inside another, and a
sharded model's hidden states, head and gradients are the whole one's; a setting that cannot work is
one readable line; rows of a weight are the file's.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning
import pytest
import tiny
import torch
import torch.distributed as dist
from architectures import ARCHITECTURES, build
from peft import LoraConfig, PromptEncoderConfig
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from okd_lightning.callbacks import KD, OKD, LastCheckpoint
from okd_lightning.checkpoints.files import newest_checkpoint, read_checkpoint
from okd_lightning.checkpoints.folders import REST, beside, make_room, put_in_place
from okd_lightning.checkpoints.io import DurableCheckpointIO
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.models import head_inputs, load_causal_lm, load_model_config
from okd_lightning.models.adapters import add_adapter
from okd_lightning.models.blocks import blocks_of
from okd_lightning.models.deferred import deferred_weights
from okd_lightning.sharding import (
    FSDP2Strategy,
    ShardedModels,
    ShardSettings,
    shard,
    whole,
)
from okd_lightning.teachers.online_module import attach_online_module
from okd_lightning.training.module import DistillationModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


@pytest.fixture(scope="module")
def mesh():
    """Return a mesh over a process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # OPT, Phi: views, unharmed
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sharded_architecture_is_the_whole_one(name, mesh):
    model = build(name).eval()
    own = copy.deepcopy(model)
    assert len(blocks_of(own)) == model.config.num_hidden_layers
    shard(own, mesh, ShardSettings(), "--model.student")
    results = []
    for each in (model, own):
        hidden = head_inputs(each, IDS, torch.ones_like(IDS))
        logits = each.get_output_embeddings()(hidden)
        logits.logsumexp(-1).sum().backward()
        gradients = {n: whole(p.grad) for n, p in each.named_parameters() if p.grad is not None}
        results.append((logits.detach(), gradients))
    (expected, gradients), (found, own_gradients) = results
    torch.testing.assert_close(found, expected)
    assert own_gradients.keys() == gradients.keys()
    assert tiny.distance(own_gradients, gradients) < 1e-6


def test_an_architecture_without_blocks_is_refused(mesh):
    with pytest.raises(ConfigError, match=r"--model\.teacher: Linear names no blocks"):
        shard(nn.Linear(2, 2), mesh, ShardSettings(), "--model.teacher")


@pytest.mark.parametrize(
    "setting",
    [{"checkpoint_form": "file"}, {"rollouts": "whole"}, {"loading": "lazy"}, {"param_dtype": "f"}],
)
def test_an_unknown_setting_is_refused(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"fsdp2: {name} is .* expected one of"):
        FSDP2Strategy(**setting)


def fit(root, module, strategy, method) -> None:
    trainer = tiny.make_trainer(root, [method], strategy=strategy, max_steps=1)
    rows = RolloutDataModule(tiny.make_rows(4), batch_size=4, max_response_length=6)
    trainer.fit(module, rows)


def test_offload_to_where_the_shards_are_is_refused(make_module, tmp_path, mesh):
    with pytest.raises(ConfigError, match=r"cpu_offload on --trainer\.accelerator cpu"):
        fit(tmp_path, make_module(), FSDP2Strategy(cpu_offload=True), KD())


def test_offload_and_layerwise_rollouts_exclude_each_other():
    with pytest.raises(ConfigError, match="rollouts: gathered, or leave cpu_offload out"):
        FSDP2Strategy(cpu_offload=True, rollouts="layerwise")


def test_a_wrapped_teachers_base_may_run_before_the_wrapper(mesh):
    """Otherwise FSDP makes the base's blocks roots, and then refuses the whole model."""
    config = PromptEncoderConfig(num_virtual_tokens=2)
    wrapped = attach_online_module(tiny.make_llama(2), config, "--method.online_module")
    with torch.no_grad():
        expected = wrapped(input_ids=IDS).logits
        base = wrapped.get_base_model()(input_ids=IDS).logits
    shard(wrapped, mesh, ShardSettings(), "--model.teacher")
    models = ShardedModels("gathered", True, torch.device("cpu"))
    with torch.no_grad():
        with models.alone(wrapped):
            torch.testing.assert_close(wrapped.get_base_model()(input_ids=IDS).logits, base)
        torch.testing.assert_close(wrapped(input_ids=IDS).logits, expected)
    layerwise = ShardedModels("layerwise", True, torch.device("cpu"))
    with pytest.raises(ConfigError, match="prompt-learning module"), layerwise.alone(wrapped):
        pass


def write_checkpoint(path, step, kind):
    """Write a checkpoint of either kind, as the strategy and DurableCheckpointIO do."""
    content = {"okd_lightning": {}, "global_step": step}
    if kind == "file":
        DurableCheckpointIO().save_checkpoint(content, path)
        return
    new = make_room(path)
    torch.save(content, new / REST)
    put_in_place(new, path)


@pytest.mark.parametrize("left", ["new", "old", "path"])
def test_a_folder_is_found_where_a_process_ended_between_two_renames(left, tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    there = path if left == "path" else beside(path, left)
    there.mkdir(parents=True)
    torch.save({"okd_lightning": {}, "global_step": 3}, there / REST)
    if left != "new":
        beside(path, "new").mkdir()  # not whole
    assert read_checkpoint(str(path))["global_step"] == 3
    assert newest_checkpoint(tmp_path) == str(path)


def test_half_of_a_first_checkpoint_is_none(tmp_path):
    beside(tmp_path / "checkpoints" / "last.ckpt", "new").mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("before", ["file", "folder"])
@pytest.mark.parametrize("behind", ["file", "folder"])
def test_one_kind_of_checkpoint_takes_the_place_of_another(before, behind, tmp_path, monkeypatch):
    """A kill around any rename or removal leaves one whole checkpoint; the next is saved."""

    class Killed(BaseException):
        pass

    path = tmp_path / "checkpoints" / "last.ckpt"
    calls = []

    def killed(function, at, is_behind):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == at and not is_behind:
                raise Killed
            result = function(*args, **kwargs)
            if len(calls) == at:
                raise Killed
            return result

        return call

    moments = ((at, is_behind) for at in range(1, 20) for is_behind in (False, True))
    for moment in moments:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        write_checkpoint(path, 1, before)
        calls.clear()
        with monkeypatch.context() as patched:
            for owner, name in ((shutil, "rmtree"), (os, "replace"), (Path, "rename")):
                patched.setattr(owner, name, killed(getattr(owner, name), *moment))
            try:
                write_checkpoint(path, 2, behind)
                has_ended = True
            except Killed:
                has_ended = False
        step = read_checkpoint(newest_checkpoint(tmp_path))["global_step"]
        assert step in ((2,) if has_ended else (1, 2))
        write_checkpoint(path, 3, before)
        assert read_checkpoint(str(path))["global_step"] == 3
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert has_ended


def test_a_run_continues_in_its_folder_with_and_without_shards(
    tmp_path, mesh, make_module, monkeypatch
):
    """Runs continue, and replaced checkpoints have been flushed to the disk."""
    flushed = set()
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    last = tmp_path / "checkpoints" / "last.ckpt"
    for steps, strategy in enumerate(("fsdp2", "auto", "fsdp2"), start=1):
        tiny.fit(
            *(tmp_path, make_module(), [KD()], tiny.make_rows(16)),
            callbacks=[LastCheckpoint()],
            ckpt_path=last if last.exists() else None,
            strategy=strategy,
            max_steps=steps,
        )
        assert last.is_dir() == (strategy == "fsdp2")
        assert {"checkpoints", *({f".{REST}.new"} if last.is_dir() else ())} <= flushed
        flushed.clear()
        assert read_checkpoint(str(last))["global_step"] == steps


def test_another_module_than_ours_is_refused(tmp_path, mesh):
    class Other(lightning.LightningModule):
        def configure_model(self):
            self.layer = nn.Linear(2, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters())

    trainer = tiny.make_trainer(tmp_path, strategy="fsdp2", max_steps=1)
    with pytest.raises(ConfigError, match="of a DistillationModule; got Other"):
        trainer.fit(Other(), torch.utils.data.DataLoader(torch.ones(4, 2)))


def test_an_online_module_after_the_sharding_is_refused(make_module, tmp_path, mesh):
    module = make_module()
    fit(tmp_path, module, "fsdp2", KD())
    fit(tmp_path, module, "fsdp2", KD())  # a second run of the same is fine
    with pytest.raises(ConfigError, match="added after the model had been sharded"):
        fit(tmp_path, module, "fsdp2", OKD(online_module=LoraConfig(r=2)))


@pytest.fixture
def deferred(student_folder):
    """A student whose weights are still on disk."""
    config = load_model_config(str(student_folder), "--model.student", tiny.NUM_IDS)
    with deferred_weights():
        model = load_causal_lm(str(student_folder), config, "--model.student")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    return model


def test_adapters_get_real_weights_on_a_base_without(deferred):
    add_adapter(deferred, LoraConfig(r=2, target_modules=["q_proj"]), "--model.student_adapter")
    for name, parameter in deferred.named_parameters():
        assert parameter.is_meta != ("lora_" in name)
        assert parameter.requires_grad == ("lora_" in name)


@pytest.mark.parametrize("option", ["use_dora", "init_lora_weights", "modules_to_save"])
def test_adapters_made_out_of_weights_on_disk_are_refused(option, deferred):
    value = {"use_dora": True, "init_lora_weights": "pissa", "modules_to_save": ["lm_head"]}[option]
    adapter = LoraConfig(r=2, target_modules=["q_proj"], **{option: value})
    with pytest.raises(ConfigError, match=r"made out of the base's weights.*every_rank"):
        add_adapter(deferred, adapter, "--model.student_adapter")


def test_prompt_learning_on_weights_on_disk_is_refused(deferred):
    with pytest.raises(ConfigError, match="PromptEncoderConfig is made out of the teacher's"):
        attach_online_module(deferred, PromptEncoderConfig(num_virtual_tokens=2), "--method")


def test_a_module_is_its_own_after_a_run_in_shards(make_module, tmp_path, mesh):
    """One device in shards trains as one device without."""
    plain, own = make_module(), make_module()
    for module, strategy in ((plain, "auto"), (own, "fsdp2")):
        torch.manual_seed(1)
        fit(tmp_path, module, strategy, KD())
    assert isinstance(own, DistillationModule)
    trained = {n: whole(p.detach()) for n, p in own.student.named_parameters()}
    assert tiny.distance(trained, tiny.weights(plain)) < 1e-6


def test_the_table_of_the_docs_is_the_formulas():
    root = Path(__file__).parents[2]
    script = root / "benchmarks" / "shard_memory.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (root / "docs" / "scaling.md").read_text(encoding="utf-8")
