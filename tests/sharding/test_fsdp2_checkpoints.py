"""Checkpoints of FSDP2 on two gloo processes, and the runs that can resume from them.

Frozen here: a killed run resumes bit for bit from a folder of shards and from a single file,
dropout included, in the middle of an epoch and of a rollout chunk; files go both ways between one
process and shards, folders to another number of ranks; a checkpoint holds student, online module
and optimizer and not one byte of a frozen weight; what is exported from either form has the
student's logits in plain transformers; another model's checkpoint is refused by name.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from parallel_runs import Killer, Snapshot, run, spawn
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

from okd_lightning.callbacks import GKD, KD, OKD, LastCheckpoint
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.checkpoints.folders import tensors_in
from okd_lightning.commands.export import export_online_module, export_student
from okd_lightning.errors import CheckpointError
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.teachers import AveragedSelf
from okd_lightning.training.module import DistillationModule

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]
FORMS = ("sharded", "single_file")
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])
ADAMW = partial(torch.optim.AdamW, lr=3e-3)
RANDOM = {
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 22},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3},
    **{"eos_token_id": tiny.EOS, "tie_word_embeddings": True},
}


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "lm_head"])


def okd() -> OKD:
    return OKD(0.5, online_module=lora(), on_policy_fraction=0.5, learning_rate=0.02)


RUNS = {
    "dropout": {
        "methods": lambda: [GKD(0.5, on_policy_fraction=0.5)],
        "student": "dropout",
        "data": {"prompts_per_rollout": 16},
        "accumulate": 2,
    },
    "OKD": {"methods": lambda: [okd()], "accumulate": 2},
    "LoRA on a random base": {"methods": lambda: [KD()], "student": RANDOM, "adapter": lora()},
    "moving average": {
        "methods": lambda: [GKD(0.5, on_policy_fraction=0.5)],
        "model": {"teacher": AveragedSelf()},
        "data": {"teacher_prompt_template": "{reference}p{prompt}"},
    },
}
STEPS, KILLED_AT = 5, 3


def train(root: Path, name: str, strategy, out: Path, **more) -> dict:
    """A run that saves after every step, in the middle of an epoch of 4 or 7 steps."""
    settings = {"model": {}, **RUNS[name], **more.pop("settings", {})}
    student = settings.pop("student", "student")
    settings["model"] = {
        "student": str(root / student) if isinstance(student, str) else student,
        **settings["model"],
    }
    return run(
        root,
        strategy,
        settings.pop("methods"),
        optimizer=ADAMW,
        callbacks=[LastCheckpoint(every_n_steps=1), *more.pop("callbacks", [])],
        settings={"max_steps": STEPS, "default_root_dir": out},
        **settings,
        **more,
    )


def last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def both_ranks(rank: int, root: Path) -> None:
    results = {}
    for name in RUNS:
        for form in FORMS:
            here = root / form / name.replace(" ", "_")
            sharded = partial(FSDP2Strategy, checkpoint_form=form)
            snapshot = Snapshot(KILLED_AT, here / "killed")
            whole = train(root, name, sharded(), here / "whole", callbacks=[snapshot])
            resumed = train(root, name, sharded(), here / "again", ckpt_path=last(here / "killed"))
            results[name, form] = whole, resumed
    results["from one process"] = train(
        root, "OKD", "fsdp2", root / "resumed", ckpt_path=last(root / "alone")
    )
    for name, student in (("LoRA on a random base", "student"), ("dropout", "student")):
        try:
            here = root / "sharded" / name.replace(" ", "_")
            train(
                root,
                name,
                "fsdp2",
                root / "foreign",
                ckpt_path=last(here / "killed"),
                settings={"student": student},
            )
        except CheckpointError as error:
            results["foreign", name] = str(error)
    torch.save(results, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("fsdp2")
    models = {
        "student": tiny.make_llama(1, tie_word_embeddings=True),
        "dropout": tiny.make_gpt2(3),
        "teacher": tiny.make_llama(2, tiny.TEACHER_ROWS, num_hidden_layers=6),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    train(root, "OKD", None, root / "alone", callbacks=[Killer(KILLED_AT)])
    return root


@pytest.fixture(scope="module")
def ranks(folder):
    spawn(both_ranks, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_exactly(name, form, ranks):
    for rank in ranks:
        whole, resumed = rank[name, form]
        assert (whole["steps"], resumed["steps"]) == (STEPS, STEPS)
        assert tiny.distance(resumed["weights"], whole["weights"]) == 0
        assert resumed["losses"] == whole["losses"][KILLED_AT:]
        assert whole["losses"][KILLED_AT - 1] != whole["losses"][KILLED_AT]


def test_shards_go_on_from_one_process(folder, ranks):
    alone = train(folder, "OKD", None, folder / "whole")
    for rank in ranks:
        found = rank["from one process"]
        assert found["steps"] == STEPS
        assert len(found["losses"]) == STEPS - KILLED_AT
        assert tiny.distance(found["weights"], alone["weights"]) < 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("ranks")
def test_one_process_continues_from_what_ranks_saved(form, folder, ranks):
    whole, _ = ranks[0]["OKD", form]
    path = last(folder / form / "OKD" / "killed")
    found = train(folder, "OKD", None, folder / f"one_{form}", ckpt_path=path)
    assert found["steps"] == STEPS
    assert tiny.distance(found["weights"], whole["weights"]) < 1e-9


@pytest.mark.usefixtures("ranks")
def test_a_checkpoint_holds_what_is_trained_and_no_more(folder):
    path = last(folder / "sharded" / "OKD" / "killed")
    models = str(folder / "student"), str(folder / "teacher")
    module = DistillationModule(*models, dtype="float64")  # as the runs are
    okd_method = okd()
    module.add_online_module(okd_method.settings)
    module.configure_model()
    trained = [p for p in module.parameters() if p.requires_grad]
    tensors = tensors_in(path)
    num_bytes = sum(t.numel() * t.itemsize for t in tensors.values())
    adam_bytes = 3 * sum(p.numel() * p.itemsize for p in trained)  # weights, two moments
    assert num_bytes == adam_bytes + 4 * len(trained)  # and a step's count each
    parts = list(path.rglob("*.distcp"))
    written = sum(file.stat().st_size for file in parts)
    assert len(parts) == 2
    assert written < num_bytes + 2048 * len(parts) * len(tensors)  # a zip archive for each tensor
    single = read_checkpoint(str(last(folder / "single_file" / "OKD" / "killed")))
    moments = single["optimizer_states"][0]["state"].values()
    found = [*single["state_dict"].values(), *(t for state in moments for t in state.values())]
    own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    assert sum(own.values()) == num_bytes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["OKD", "LoRA on a random base"])
def test_what_is_exported_has_the_students_logits(name, form, folder, ranks, tmp_path):
    whole, _ = ranks[0][name, form]
    path = last(folder / form / name.replace(" ", "_") / "whole")
    student = RANDOM if "random" in name else str(folder / "student")
    adapter = RUNS[name].get("adapter")

    def make() -> DistillationModule:
        return DistillationModule(
            dict(student) if isinstance(student, dict) else student,
            str(folder / "teacher"),
            tokenizer=str(folder / "teacher"),
            student_adapter=adapter,
        )

    torch.manual_seed(99)  # a random base comes from the checkpoint
    reference = make()
    if name == "OKD":
        reference.add_online_module(okd().settings)
    reference.configure_model()
    reference.load_state_dict(whole["weights"])
    export_student(make(), read_checkpoint(str(path), with_weights=True), tmp_path / "student")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        expected = reference.student.eval()(input_ids=IDS).logits
        torch.testing.assert_close(found(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    if name == "OKD":
        read = read_checkpoint(str(path), with_weights=True)
        export_online_module(make(), read, tmp_path / "module")
        base = AutoModelForCausalLM.from_pretrained(folder / "teacher")
        adapted = PeftModel.from_pretrained(base, tmp_path / "module")
        with torch.no_grad():
            expected = reference.teacher(input_ids=IDS).logits
            torch.testing.assert_close(adapted(input_ids=IDS).logits, expected)
    else:
        read = read_checkpoint(str(path), with_weights=True)
        export_student(make(), read, tmp_path / "apart", "apart")
        assert (tmp_path / "apart" / "adapter_model.safetensors").is_file()


def test_another_models_checkpoint_is_refused(ranks):
    for rank in ranks:
        assert "belongs to another model" in rank["foreign", "dropout"]
        assert "belongs to another model" in rank["foreign", "LoRA on a random base"]
