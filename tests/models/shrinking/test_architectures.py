"""Frozen here: every architecture is cut consistently, or refused by its name in one line.

* a cut model saved and loaded by transformers computes what the teacher does with the dropped parts
  skipped or set to zero, and the teacher itself is as before;
* LayerNorm models keep their channels; a model whose heads have no width of their own keeps them.
"""

from __future__ import annotations

import architectures
import pytest
import torch
from architectures import ARCHITECTURES, SMALL
from padding import VOCAB, logits, rows
from transformers import AutoModelForCausalLM

from okd_lightning.errors import ModelError
from okd_lightning.models import Vocabulary
from okd_lightning.models.shrinking import (
    Calibration,
    Widths,
    choose_layers,
    choose_widths,
    cut_model,
)
from okd_lightning.models.shrinking.selection import zeroed

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WITHOUT_HEADS = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
MORE = {
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**SMALL, **EXPERTS, "num_experts": 4, "mlp_only_layers": [0]},
    "gpt_oss": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {k: v for k, v in SMALL.items() if k != "head_dim"},
    "olmo2": {k: v for k, v in SMALL.items() if k != "head_dim"},
    "gpt_neox": WITHOUT_HEADS,
}
"""Experts in three layouts, fused projections, norms over all heads."""

LAYER_NORM = {"gpt2", "opt", "phi", "cohere", "cohere2", "gpt_neox"}
HEADS_OF_NO_WIDTH = {"gpt2", "opt", "gpt_neox"}
REFUSED = (
    {("hidden", name): "LayerNorm" for name in LAYER_NORM}
    | {("heads", name): "no field for the width of a head" for name in HEADS_OF_NO_WIDTH}
    | {
        ("hidden", "nanochat"): "no weights",
        ("heads", "recurrent_gemma"): "other units on one axis",
    }
)
CUTS = {
    "layers": Widths(),
    "intermediate": Widths(intermediate=0.5),
    "heads": Widths(heads=2),
    "hidden": Widths(hidden=0.75),
}


@pytest.fixture(autouse=True)
def _more_architectures(monkeypatch):
    for name, fields in MORE.items():
        monkeypatch.setitem(ARCHITECTURES, name, fields)


@pytest.mark.filterwarnings("ignore")  # transformers' about kernels that are not installed
@pytest.mark.parametrize("model_type", [*ARCHITECTURES, *MORE])
def test_every_cut(model_type, tmp_path):
    model = architectures.build(model_type)
    before = logits(model)
    calibration = Calibration(model, rows(3), Vocabulary(VOCAB))
    for name, widths in CUTS.items():
        reason = REFUSED.get((name, model_type))
        if reason is not None:
            with pytest.raises(ModelError, match=f"^--{name}: {model_type} .*{reason}"):
                choose_widths(calibration, widths, lambda *_: None)
            continue
        dropped = ()
        if name == "layers":
            dropped = choose_layers(calibration, 1, 2, lambda *_: None).dropped
        cut = choose_widths(calibration, widths, lambda *_: None, dropped)
        student = cut_model(model, calibration.layers, dropped, cut.sizes, cut.selection)
        student.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with calibration.layers.skipping(dropped), zeroed(model, cut.selection):
            expected = logits(model)
        assert (logits(loaded) - expected).norm() < 1e-4 * expected.norm()
        assert (expected - before).norm() > 1e-3 * before.norm(), "nothing was cut"
        num = sum(p.numel() for p in loaded.parameters())
        assert num < sum(p.numel() for p in model.parameters())
        assert torch.equal(logits(model), before)


def test_per_layer_fields_follow():
    model = architectures.build("gemma3_text", num_hidden_layers=7)
    calibration = Calibration(model, rows(), Vocabulary(VOCAB))
    kinds = model.config.layer_types
    student = cut_model(model, calibration.layers, (0, 2, 3), {}, _nothing(calibration))
    assert student.config.layer_types == [kinds[n] for n in (1, 4, 5, 6)]
    assert "full_attention" in student.config.layer_types


def test_layers_that_differ_by_their_place_are_refused():
    model = architectures.build("gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    calibration = Calibration(model, rows(), Vocabulary(VOCAB))
    with pytest.raises(
        ModelError, match=r"^gpt2 cannot be cut in this way: the cut model does not"
    ):
        cut_model(model, calibration.layers, (0,), {}, _nothing(calibration))


def test_a_number_format_stays():
    model = architectures.build("llama").to(torch.bfloat16)
    calibration = Calibration(model, rows(), Vocabulary(VOCAB))
    cut = choose_widths(calibration, Widths(0.5, 2, 0.5), lambda *_: None)
    student = cut_model(model, calibration.layers, (), cut.sizes, cut.selection)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def _nothing(calibration: Calibration):
    return choose_widths(calibration, Widths(), lambda *_: None).selection
