"""Contents of a checkpoint, and refused checkpoints.

Frozen here: trained weights, methods and measures are saved, frozen weights are not; checkpoints of
another method, another model, other rules for text or another divisor are refused.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import LoraConfig

from okd_lightning.callbacks import GKD, KD, SFT, LastCheckpoint
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import CheckpointError
from okd_lightning.models.text_ids import RULES_VERSION
from okd_lightning.training.module import DistillationModule

SHORT = {"max_response_length": 8, "val_rollouts": 0}


def test_what_a_checkpoint_holds(tmp_path, make_module):
    module = make_module()
    path = save(tmp_path, module, [GKD(0.5)], val=tiny.make_rows(3))
    checkpoint = torch.load(path, weights_only=True)
    names = set(checkpoint["state_dict"])
    student = {f"student.{name}" for name in module.student.state_dict()}
    assert student <= names
    assert not any("teacher" in name for name in names)
    assert all(name in student or name.startswith("evaluation.") for name in names)
    assert checkpoint["okd_lightning"]["methods"] == ["GKD"]
    assert {"val/forward_kl", "val/agreement"} <= set(checkpoint["okd_lightning"]["metrics"])


def save(root, module, methods, val=None) -> str:
    trainer = tiny.make_trainer(root, [*methods, LastCheckpoint()], max_steps=1)
    trainer.fit(module, RolloutDataModule(tiny.make_rows(4), val, batch_size=4, seed=7, **SHORT))
    return str(root / "checkpoints" / "last.ckpt")


def test_loaded_models_are_saved_once_and_the_teacher_not(tmp_path, tiny_pair, tiny_tokenizer):
    module = DistillationModule(*tiny_pair, tokenizer=tiny_tokenizer)
    path = save(tmp_path, module, [KD()])
    names = torch.load(path, weights_only=True)["state_dict"]
    wanted = {f"student.{name}" for name in tiny_pair[0].state_dict()}
    assert {name for name in names if not name.startswith("evaluation.")} == wanted


def test_under_an_adapter_only_the_adapter_is_saved(tmp_path, make_module):
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    names = torch.load(save(tmp_path, make_module(student_adapter=adapter), [KD()]))["state_dict"]
    saved = [name for name in names if not name.startswith("evaluation.")]
    assert saved
    assert all("lora_" in name for name in saved)


def test_random_bases_are_saved_whole(tmp_path, teacher_folder):
    student = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    module = DistillationModule(dict(student), str(teacher_folder), student_adapter=adapter)
    path = save(tmp_path, module, [KD()])
    torch.manual_seed(5)
    other = DistillationModule(
        dict(student),
        str(teacher_folder),
        student_adapter=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    trainer = tiny.make_trainer(tmp_path)
    data = RolloutDataModule(val=tiny.make_rows(3), **SHORT)
    trainer.validate(other, data, ckpt_path=path, verbose=False)
    assert tiny.distance(tiny.weights(other), tiny.weights(module)) == 0


def resume(root, path, module, methods) -> None:
    trainer = tiny.make_trainer(root, methods, max_steps=2)
    data = RolloutDataModule(tiny.make_rows(4), batch_size=4, seed=7, **SHORT)
    trainer.fit(module, data, ckpt_path=path)


def test_another_methods_checkpoint_is_refused(tmp_path, make_module):
    path = save(tmp_path, make_module(), [KD()])
    with pytest.raises(CheckpointError, match=r"is of KD.*configured for SFT"):
        resume(tmp_path, path, make_module(), [SFT()])
    resume(tmp_path, path, make_module(), [KD()])


def test_responses_that_became_ids_by_other_rules_are_refused(tmp_path, make_module):
    """A run goes on with the rows it began with; with on-policy rollouts they have no effect."""
    for method, is_refused in ((KD(), True), (GKD(on_policy_fraction=1.0), False)):
        path = save(tmp_path / method.__class__.__name__, make_module(), [method])
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint["RolloutDataModule"].pop("text_rules") == RULES_VERSION
        torch.save(checkpoint, path)
        if is_refused:
            with pytest.raises(CheckpointError, match=r"by rules 1, this version has rules 2"):
                resume(tmp_path, path, make_module(), [method])
        else:
            resume(tmp_path, path, make_module(), [method])


def test_another_divisor_of_samples_is_refused(tmp_path, make_module):
    """Checkpoints from before there was a choice go on with token_mean, as the message says."""
    method = GKD(on_policy_fraction=1.0)
    path = save(tmp_path, make_module(), [method])
    with pytest.raises(CheckpointError, match=r"by running_mean, this run by constant"):
        resume(tmp_path, path, make_module(normalization="constant"), [method])
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["okd_lightning"].pop("normalization") == "running_mean"
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match=r"resume with --model.normalization token_mean"):
        resume(tmp_path, path, make_module(), [method])
    resume(tmp_path, path, make_module(normalization="token_mean"), [method])


OTHERS = {
    "wider": {"hidden_size": 64},
    "another architecture": None,
    "more layers": {"num_hidden_layers": 3},
    "fewer layers": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_checkpoint_is_refused(name, tmp_path, make_module, tiny_tokenizer):
    path = save(tmp_path, make_module(), [KD()])
    fields = OTHERS[name]
    other = tiny.make_gpt2(1) if fields is None else tiny.make_llama(1, **fields)
    module = make_module(student=other, tokenizer=tiny_tokenizer)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        resume(tmp_path, path, module, [KD()])
    with pytest.raises(CheckpointError, match="belongs to another model"):
        tiny.make_trainer(tmp_path).validate(
            make_module(student=other, tokenizer=tiny_tokenizer),
            RolloutDataModule(val=tiny.make_rows(3), **SHORT),
            ckpt_path=path,
            verbose=False,
        )


def test_a_foreign_checkpoint_is_refused(tmp_path, make_module):
    path = save(tmp_path, make_module(), [KD()])
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["okd_lightning"]
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="not written by okd-lightning"):
        resume(tmp_path, path, make_module(), [KD()])
