"""Arguments of a forward pass are looked up in its signature.

Frozen here: what is needed and not named is an error, also where ``**kwargs`` would swallow it;
what is wanted is left out; arguments that a head hands on to its backbone are named; wrappers do
not hide them; packed rows are not given to a model without position ids; a model that refuses to be
run is refused by its name.
"""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from okd_lightning.errors import ModelError
from okd_lightning.models import check_causal, head_inputs, reads_packed_rows
from okd_lightning.models.causal_lm import forward_arguments, named_arguments

pytestmark = pytest.mark.filterwarnings(  # PEFT's use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
IDS = torch.tensor([[3, 4, 5]])


def make(model_type: str, **fields):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(model_type, vocab_size=23, **fields)
        return AutoModelForCausalLM.from_config(config).eval()


def pegasus():
    small = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2}
    return make("pegasus", decoder_ffn_dim=16, max_position_embeddings=16, **small)


class Swallows(LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        del kwargs
        return super().forward(input_ids=input_ids)

    @property
    def base_model(self):
        return self


class Wrapped(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_needed_is_named_or_an_error():
    swallows = Swallows(tiny.make_llama(1).config)
    for model in (pegasus(), swallows):
        with pytest.raises(ModelError, match=f"{type(model).__name__} has no argument position_id"):
            head_inputs(model, IDS, None, torch.arange(3)[None])
        assert not reads_packed_rows(model)
    assert forward_arguments(swallows, {"input_ids": 1}, {"use_cache": False}) == {"input_ids": 1}
    with pytest.raises(ModelError, match="no argument past_key_values"):
        forward_arguments(swallows, {"past_key_values": 1}, {})


def test_none_is_not_passed():
    model = tiny.make_llama(1)
    needed, wanted = {"input_ids": 1, "position_ids": None}, {"attention_mask": None}
    assert forward_arguments(model, needed, wanted) == {"input_ids": 1}


def test_names_after_wrappers():
    names = named_arguments(tiny.make_llama(1))
    assert {"input_ids", "attention_mask", "position_ids", "past_key_values"} <= names
    adapted = get_peft_model(tiny.make_llama(1), LoraConfig(r=2))
    wrapped = Wrapped(tiny.make_llama(1).config)
    patched = tiny.make_llama(1)
    patched.forward = functools.partial(patched.forward)
    for model in (adapted, wrapped, patched):
        assert names <= named_arguments(model)
        assert reads_packed_rows(model)


def test_a_head_names_what_its_backbone_names():
    fields = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = make("granitemoehybrid", layer_types=["attention"], **fields, **sizes)
    assert "use_cache" in named_arguments(model)


def test_a_model_that_refuses_is_named():
    shape = {"hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 8}
    layers = {"attn_layers": ["local"], "axial_pos_embds": False, "is_decoder": True}
    with pytest.raises(
        ModelError, match=r"--model.student: ReformerModelWithLMHead cannot be used"
    ):
        check_causal(make("reformer", **shape, **layers), "--model.student")
