"""The online module sits on queries and values, by role.

Frozen: the key rows of every fused layout are those that a gradient probe finds in the model
itself; an adapter on a fused layer leaves the keys bit-identical and trains the rest; names are
chosen by role where projections are separate; a user's own targets are left alone.
"""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from okd_lightning.models.projection_targets import FUSED_NAMES, fused_layout, key_rows
from okd_lightning.teachers.online_module import attach_online_module

COMMON = {
    "vocab_size": 23,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
FUSED = {
    "gpt2": {},
    "mpt": {},
    "bloom": {},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "persimmon": {"intermediate_size": 48},
    "codegen": {"rotary_dim": 4},
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "falcon (each head its own)": {"multi_query": False, "new_decoder_architecture": False},
    "falcon (groups)": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gpt_bigcode": {"multi_query": True},
    "gpt_bigcode (each head its own)": {"multi_query": False},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
}


def build(case: str):
    model_type = case.partition(" ")[0]
    fields = dict(COMMON)
    if model_type == "dbrx":
        fields = {"vocab_size": 23, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
    config = AutoConfig.for_model(model_type, **fields, **FUSED.get(case, {}))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def fused_layers(model):
    return [m for n, m in model.named_modules() if n.rpartition(".")[2] in FUSED_NAMES]


def probed_key_rows(model):
    """Rows that move the second position's output through the first position, and not the first's.

    The first position attends to itself alone: its output depends on its own values, never on its
    queries or keys. The second one's output depends on the first one's keys and values.
    """
    layer, kept = fused_layers(model)[0], []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    handle = layer.register_forward_hook(keep)
    states = model(torch.tensor([[3, 7]]), use_cache=False, output_hidden_states=True)
    handle.remove()
    weights = torch.randn(states.logits.shape[-1], dtype=torch.float64)
    found = []
    for position in (0, 1):
        kept[0].grad = None
        (states.logits[0, position] @ weights).backward(retain_graph=True)
        found.append(kept[0].grad.reshape(2, -1)[0] != 0)
    return found[1] & ~found[0]


@pytest.mark.parametrize("case", FUSED)
def test_key_rows_are_those_that_a_gradient_finds(case):
    model = build(case)
    is_key = key_rows(fused_layout(model.config))
    assert is_key.sum() > 0
    assert torch.equal(is_key, probed_key_rows(model))


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("is_zero_at_first", [True, False])
def test_a_fused_layer_keeps_its_keys(case, is_zero_at_first):
    teacher = build(case).float()
    ids = torch.tensor([[3, 7, 5, 9]])
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=is_zero_at_first)
    teacher = attach_online_module(teacher, config, "--method.online_module")
    is_key = key_rows(fused_layout(teacher.config))
    layer = fused_layers(teacher)[0]
    trained = [p for p in teacher.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    kept = []
    layer.register_forward_hook(lambda m, i, o: kept.append((i[0].detach(), o.detach())))
    for _ in range(3):
        loss = teacher(ids, use_cache=False).logits.float().log_softmax(-1)[..., 4].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    teacher(ids, use_cache=False)
    inputs, outputs = kept[-1]
    base = layer.base_layer(inputs)
    assert torch.equal(outputs[..., is_key], base[..., is_key])
    assert not torch.allclose(outputs[..., ~is_key], base[..., ~is_key])
    assert not layer.lora_B["default"].weight[is_key].any()  # what merging would add


@pytest.mark.parametrize(
    ("model_type", "fields", "wanted"),
    [
        ("llama", {"intermediate_size": 48}, {"q_proj", "v_proj"}),
        ("phi", {"intermediate_size": 48}, {"q_proj", "v_proj"}),
        ("gpt_neo", {"attention_types": [[["global"], 2]]}, {"q_proj", "v_proj"}),
        ("gpt2", {}, {"c_attn"}),
    ],
)
def test_targets_are_chosen_by_role(model_type, fields, wanted):
    FUSED.setdefault(model_type, fields)
    teacher = build(model_type).float()
    attach_online_module(teacher, LoraConfig(r=2, lora_alpha=2), "--method.online_module")
    adapted = {n.rpartition(".")[2] for n, m in teacher.named_modules() if hasattr(m, "base_layer")}
    assert adapted == wanted


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (LoraConfig(r=2, lora_alpha=2, target_modules=["c_proj"]), {"c_proj"}),
        (IA3Config(task_type="CAUSAL_LM"), {"c_attn", "c_proj"}),
    ],
)
def test_named_targets_and_other_roles_are_left_alone(config, wanted):
    teacher = build("gpt2").float()
    attach_online_module(teacher, config, "--method.online_module")
    adapted = {n.rpartition(".")[2] for n, m in teacher.named_modules() if hasattr(m, "base_layer")}
    assert adapted == wanted


def test_a_fused_layer_that_the_user_names_is_adapted_whole():
    teacher = build("gpt2").float()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["c_attn"], init_lora_weights=False)
    teacher = attach_online_module(teacher, config, "--method.online_module")
    is_key = key_rows(fused_layout(teacher.config))
    assert fused_layers(teacher)[0].lora_B["default"].weight[is_key].any()


def test_the_layers_are_said_when_the_module_is_put_on(caplog):
    with caplog.at_level("INFO"):
        attach_online_module(
            build("gpt2").float(), LoraConfig(r=2, lora_alpha=2), "--method.online_module"
        )
    wanted = "LoraConfig on c_attn (2 layers); in c_attn the rows of queries and values alone"
    assert wanted in caplog.text
