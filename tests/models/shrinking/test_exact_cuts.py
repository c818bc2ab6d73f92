"""Frozen here: units that contribute nothing are cut away without a change of the output.

* neurons and heads of zeros, key groups and queries within groups, at scattered places: exact;
* channels of zeros under RMSNorm to 1e-4, with the norms', eps' and Gemma's scales undone;
* layers that return their input;
* fused experts keep neurons of their own.
"""

from __future__ import annotations

import architectures
import pytest
import torch
from padding import (
    VOCAB,
    logits,
    places_of,
    rows,
    spread,
    widened,
    with_more_channels,
    with_more_neurons,
)
from transformers import PreTrainedModel

from okd_lightning.models import Vocabulary
from okd_lightning.models.shrinking import (
    Calibration,
    Widths,
    choose_layers,
    choose_widths,
    cut_model,
)


def calibrated(model: PreTrainedModel) -> Calibration:
    return Calibration(model, rows(), Vocabulary(VOCAB))


def narrowed(model: PreTrainedModel, widths: Widths) -> PreTrainedModel:
    calibration = calibrated(model)
    cut = choose_widths(calibration, widths, lambda *_: None)
    return cut_model(model, calibration.layers, (), cut.sizes, cut.selection)


def is_equal(found: PreTrainedModel, wanted: PreTrainedModel, tolerance: float = 1e-6) -> bool:
    expected = logits(wanted)
    return bool((logits(found) - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi", "gemma3_text", "cohere"])
def test_neurons_of_zeros(model_type):
    small = architectures.build(model_type)
    found = narrowed(with_more_neurons(small), Widths(intermediate=48))
    assert found.config.intermediate_size == 48
    own, expected = found.state_dict(), small.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], expected[name]) for name in own)


def with_more_heads(small: PreTrainedModel, groups: list[int], queries: list[int], per_group: int):
    """Key groups and queries at these places of a model with 3 groups of ``per_group``."""
    width = small.config.head_dim
    entries = torch.arange(width)

    def places(units: list[int]) -> torch.Tensor:
        return (torch.tensor(units)[:, None] * width + entries).flatten()

    of_queries, of_keys = places(queries), places(groups)
    num_queries, num_keys = 3 * per_group * width, 3 * width
    axes = {"o_proj.weight": [(1, of_queries, num_queries)]}
    for kind in ("weight", "bias"):
        axes |= {f"q_proj.{kind}": [(0, of_queries, num_queries)]}
        axes |= {f"{k}_proj.{kind}": [(0, of_keys, num_keys)] for k in ("k", "v")}
    sizes = {"num_attention_heads": 3 * per_group, "num_key_value_heads": 3}
    return widened(small, sizes, axes)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize(
    ("queries", "per_group"),
    [([0, 1, 4, 5], 2), ([0, 3, 9, 10], 4)],  # a whole group; two queries of each group as well
    ids=["groups", "queries"],
)
def test_heads_of_zeros(model_type, queries, per_group):
    small = architectures.build(model_type, num_attention_heads=4, num_key_value_heads=2)
    wide = with_more_heads(small, [0, 2], queries, per_group)
    assert is_equal(wide, small)
    found = narrowed(wide, Widths(heads=4))
    assert (found.config.num_attention_heads, found.config.num_key_value_heads) == (4, 2)
    assert found.config.head_dim == 8
    assert is_equal(found, small)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize(
    ("model_type", "offset"),
    [("llama", 0.0), ("qwen3", 0.0), ("gemma2", 1.0), ("gemma3_text", 1.0)],
)
def test_channels_of_zeros(model_type, offset, is_tied):
    small = architectures.build(model_type, tie_word_embeddings=is_tied)
    wide = with_more_channels(small, 48, offset)
    assert is_equal(wide, small, 1e-4)
    found = narrowed(wide, Widths(hidden=32))
    assert found.config.hidden_size == 32
    assert found.config.rms_norm_eps == pytest.approx(small.config.rms_norm_eps)
    assert is_equal(found, small, 1e-4)


def test_everything_at_once():
    small = architectures.build("llama")
    wide = with_more_channels(with_more_neurons(small), 48)
    found = narrowed(wide, Widths(intermediate=48, hidden=32))
    assert is_equal(found, small, 1e-4)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "cohere"])
def test_layers_that_return_their_input(model_type):
    field = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    model = architectures.build(model_type, **{field: 4})
    calibration = calibrated(model)
    with torch.no_grad():
        for number in (1, 2):
            for name, weight in calibration.layers.modules[number].named_parameters():
                if any(last in name for last in LAST):
                    weight.zero_()
    calibration = calibrated(model)
    before = logits(model)
    told = []
    chosen = choose_layers(calibration, 2, 4, lambda candidate, _: told.append(candidate))
    assert chosen.dropped == (1, 2)
    assert chosen.loss.forward_kl == pytest.approx(0, abs=1e-9)
    assert max(candidate.loss.forward_kl for candidate in told) > 1e-3
    found = cut_model(model, calibration.layers, chosen.dropped, {}, no_selection())
    assert found.config.num_hidden_layers == 2
    assert torch.allclose(logits(found), before, atol=1e-5)


LAST = (
    *("o_proj", "down_proj", "out_proj", "c_proj"),
    *("post_attention_layernorm.weight_", "post_feedforward_layernorm.weight_"),
)
"""Projections into the residual stream; what is zero after them stays zero under every norm."""


def no_selection():
    return choose_widths(
        calibrated(architectures.build("llama")), Widths(), lambda *_: None
    ).selection


def test_fused_experts_keep_neurons_of_their_own():
    architectures.ARCHITECTURES.setdefault(
        "mixtral", {**architectures.SMALL, "num_local_experts": 3, "num_experts_per_tok": 2}
    )
    small = architectures.build("mixtral", intermediate_size=16)
    wide = architectures.build("mixtral", intermediate_size=24)
    kept = [places_of(16, 24, seed) for seed in range(3)]
    state = wide.state_dict()
    for name, weight in small.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            parts = [
                torch.cat([spread(half, 0, own, 24) for half in expert.chunk(2)])
                for expert, own in zip(weight, kept, strict=True)
            ]
        elif name.endswith("experts.down_proj"):
            parts = [spread(e, 1, own, 24) for e, own in zip(weight, kept, strict=True)]
        else:
            parts = None
        state[name] = weight if parts is None else torch.stack(parts)
    wide.load_state_dict(state)
    found = narrowed(wide, Widths(intermediate=16))
    own, expected = found.state_dict(), small.state_dict()
    assert all(torch.equal(own[name], expected[name]) for name in own)
