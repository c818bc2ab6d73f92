"""Refusal of models that attend to later tokens.

Frozen here: encoders are refused in one line that names the option, untrained or not, in every
number format; every causal architecture passes; the probe leaves mode, weights, gradients and
random streams as they were; a run with an encoder ends before it begins.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, build
from transformers import AutoModelForCausalLM, BertConfig

from okd_lightning.errors import ModelError
from okd_lightning.models import check_causal
from okd_lightning.training.module import DistillationModule


def make_bert(is_decoder: bool = False, std: float = 0.02):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(
            BertConfig(
                vocab_size=tiny.STUDENT_ROWS,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                is_decoder=is_decoder,
                initializer_range=std,
                eos_token_id=tiny.EOS,
            )
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_an_encoder_is_refused(std, dtype):
    with pytest.raises(ModelError, match=r"--model.student: BertLMHeadModel is bidirectional"):
        check_causal(make_bert(std=std).to(dtype), "--model.student")
    check_causal(make_bert(is_decoder=True, std=std).to(dtype), "--model.student")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_causal_architectures_pass(model_type):
    check_causal(build(model_type), "--model.student")


def test_the_probe_leaves_no_trace():
    model = tiny.make_gpt2(1).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():
        check_causal(model, "--model.student")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not model.get_input_embeddings()._forward_hooks


def test_a_run_with_an_encoder_ends_before_it_begins():
    for pair in ((make_bert(), tiny.make_llama(1)), (tiny.make_llama(1), make_bert())):
        module = DistillationModule(*pair, tokenizer=tiny.make_tokenizer())
        with pytest.raises(ModelError, match="is bidirectional"):
            module.configure_model()
