"""Hidden states and experts' balance on the command line.

Frozen here: layers are typed as a mapping; a run resumes from its own checkpoint with the weights
of an uninterrupted one; validation, test and export work from that checkpoint, and the exported
model has no projectors; layers that do not exist are refused in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from cli_workbench import STUDENT_FIELDS, Result, save_model
from safetensors.torch import load_file

Type = Callable[..., Result]
LAST = Path("run/checkpoints/last.ckpt")
STATES = ["--method", "KD", "--trainer.callbacks+", "HiddenStates"]
LAYERS = "--trainer.callbacks.layers"


def weights() -> dict[str, torch.Tensor]:
    return torch.load(LAST, weights_only=True)["state_dict"]


def test_hidden_states(okd: Type, fit: Type, here: Path) -> None:
    save_model(here / "wide", seed=5, fields={**STUDENT_FIELDS, "hidden_size": 48})
    words = [*STATES, LAYERS, "{1: 2, -1: -1}", "--model.teacher", "wide"]
    fit(words, "--trainer.max_steps", "4", "--trainer.val_check_interval", "2")
    whole = weights()
    assert sum(name.startswith("projectors.") for name in whole) == 2
    header = Path("run/metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/kd", "train/hidden_states", "val/forward_kl"} <= set(header)
    Path("run").rename("whole")
    fit(words, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    result = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "4")
    assert result.status == 0, result.err
    assert weights().keys() == whole.keys()
    different = [name for name, value in weights().items() if not torch.equal(value, whole[name])]
    assert not different
    for command in (["validate"], ["test"], ["export", "--out", "out"]):
        result = okd(*command, "--ckpt_path", str(LAST))
        assert result.status == 0, result.err
    assert not [name for name in load_file("out/model.safetensors") if "projector" in name]
    result = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "5", LAYERS, "{1: 3}")
    assert result.status == 1
    assert "the teacher has no layer 3; it has 0 (embeddings), 1 to 2" in result.err
    assert len(result.err.strip().splitlines()) == 1
    result = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "5", LAYERS, "{2: 2}")
    assert result.status == 1
    assert "no projectors for these layers of HiddenStates" in result.err


def test_experts_balance(okd: Type, fit: Type, here: Path) -> None:
    experts = (
        "{model_type: mixtral, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, "
        "num_attention_heads: 2, num_key_value_heads: 1, num_local_experts: 4, eos_token_id: 1}"
    )
    words = ["--method", "KD", "--trainer.callbacks+", "ExpertBalance"]
    words += ["--trainer.callbacks.weight", "0.01", "--trainer.max_steps", "2"]
    fit(words, "--model.student", experts)
    header, *rows = Path("run/metrics.csv").read_text().splitlines()
    place = header.split(",").index("train/expert_balance")
    assert all(1 <= float(row.split(",")[place]) <= 4 for row in rows if row.split(",")[place])
    words[words.index("2")] = "4"
    assert okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "4").status == 0
