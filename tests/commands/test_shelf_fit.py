"""Plug-ins of the shelf on the command line, in a folder that holds them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from cli_workbench import metric_names, read_metrics

SHELF = Path(__file__).parents[2] / "callbacks"


@pytest.fixture
def checkout(here: Path) -> Path:
    shutil.copytree(SHELF, here / "callbacks")
    return here


COMMANDS = re.findall(r"`(--method callbacks[^`]*)`", (SHELF / "README.md").read_text())


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split(".")[2].split()[0])
def test_every_command_of_the_table(command, checkout, fit, assets):
    filled = command.replace("…", "{reference}{prompt}").replace("FOLDER", assets.teacher)
    words = filled.split()
    teaches_itself = "FrozenSelf" in words
    models = ["--model.student", assets.student] if teaches_itself else assets.models
    fit(words, models, "--trainer.max_steps", "1", models=False)
    assert "train/loss" in metric_names(checkout / "run" / "metrics.csv")


RESUMED = {
    "topd.TOPD": ("--method.future", "true"),
    "idaopd.IDAOPD": (),
    "lightningopd.LightningOPD": (
        *("--model.teacher", "CachedTeacher", "--model.teacher.folder", "cache"),
        *("--model.teacher.model", "TEACHER"),
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_sampled_methods_resume_and_export(name, checkout, fit, okd, assets):
    """Two steps equal one step and a resumed one; the student is exported as a folder."""
    method = (
        "--method",
        f"callbacks.{name}",
        *(word.replace("TEACHER", assets.teacher) for word in RESUMED[name]),
    )
    last = checkout / "run" / "checkpoints" / "last.ckpt"
    fit(*method, "--trainer.max_steps", "2")
    whole = torch.load(last, weights_only=True)["state_dict"]
    shutil.rmtree(checkout / "run")
    fit(*method, "--trainer.max_steps", "1")
    fit("--ckpt_path", str(last), "--trainer.max_steps", "2")
    resumed = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(whole[name], weight) for name, weight in resumed.items())
    exported = okd("export", "--ckpt_path", str(last), "--out", "student")
    assert exported.status == 0, exported.err
    assert (checkout / "student" / "model.safetensors").is_file()


def test_delta_distillation_reads_its_base_by_path(checkout, fit, okd, assets, tmp_path_factory):
    """Resumed from another folder, too; the base is in no checkpoint and in no export."""
    shutil.copytree(assets.student, checkout / "base")
    method = ("--method", "callbacks.deltaopd.DeltaOPD", "--method.teacher_base", "base")
    last = checkout / "run" / "checkpoints" / "last.ckpt"
    fit(*method, "--trainer.max_steps", "2", "--trainer.val_check_interval", "1")
    content = torch.load(last, weights_only=True)
    whole = content["state_dict"]
    assert all(name.startswith("student.") for name in whole)
    assert last.stat().st_size < 4 * sum(w.numel() * w.element_size() for w in whole.values())
    shutil.rmtree(checkout / "run")
    fit(*method, "--trainer.max_steps", "1")
    resumed = okd("fit", "--ckpt_path", str(last), "--trainer.max_steps", "2")
    assert resumed.status == 0, resumed.err
    found = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(whole[name], weight) for name, weight in found.items())
    exported = okd("export", "--ckpt_path", str(last), "--out", "student")
    assert exported.status == 0, exported.err
    assert (checkout / "student" / "model.safetensors").is_file()


def test_distillm_and_its_resume(checkout, fit):
    """The checkpoint holds the kept responses and the steps at which the share rose."""
    method = ("--method", "callbacks.distillm.DistiLLM", "--method.share", "1.0")
    last = checkout / "run" / "checkpoints" / "last.ckpt"
    fit(*method, "--trainer.max_epochs", "1", "--method.tolerance=-9")
    fit("--ckpt_path", str(last), "--trainer.max_epochs", "3")
    (state,) = (
        own
        for name, own in torch.load(last, weights_only=True)["callbacks"].items()
        if name.startswith("DistiLLM")
    )
    assert len(state["kept"]["prompts"]) == 12
    assert len(state["rises"]) == 2
    assert len(read_metrics(checkout / "run" / "metrics.csv")) > 6
