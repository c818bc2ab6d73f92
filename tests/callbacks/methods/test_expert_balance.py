"""The balancing loss of a mixture-of-experts student.

Frozen here: its value against a slow reference on raw router logits over real tokens, for several
architectures; that transformers' own takes a softmax of a softmax where a router returns a softmax,
and ours does not; 1 for equal shares and E for one expert; the cut of a step, packing and
recomputation change nothing; routers get a gradient; students without such routers are refused.
Runs are in float32, as transformers' grouped products of experts have no float64.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from okd_lightning.callbacks import KD, SFT, ExpertBalance
from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.losses import RouterBalance
from okd_lightning.models.routers import routers_of
from okd_lightning.records.states import Routing, States
from okd_lightning.teachers import CachedTeacher

SMALL = {
    "vocab_size": tiny.STUDENT_ROWS,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": tiny.PAD,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.EOS,
    "num_experts_per_tok": 2,
}
KINDS = {
    "mixtral": {**SMALL, "num_local_experts": 4},
    "qwen2_moe": {
        **{**SMALL, "num_experts": 5, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    },
    "qwen3_moe": {
        **{**SMALL, "num_experts": 4, "moe_intermediate_size": 16},
        **{"decoder_sparse_step": 1, "mlp_only_layers": [0]},
    },
    "olmoe": {**SMALL, "num_experts": 4},
    "gpt_oss": {**SMALL, "num_local_experts": 4, "sliding_window": 64},
    "granitemoe": {**SMALL, "num_local_experts": 4},
}


def make(kind: str, seed: int = 3):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
        for router in routers_of(model):  # far from balanced
            torch.nn.init.normal_(router.weight, std=0.5)
    return model.eval()


@pytest.fixture
def make_module(make_module, tmp_path, tiny_tokenizer):
    def build(kind: str = "mixtral", **settings):
        folder = tmp_path / f"{kind}_folder"
        if not folder.exists():
            make(kind).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
        return make_module(student=str(folder), **settings)

    return build


def reference(model, ids: torch.Tensor, top_k: int = 2) -> float:
    """E Σ f P of one row, from each router's input, token by token."""
    inputs: list[torch.Tensor] = []
    routers = routers_of(model)
    handles = [r.register_forward_pre_hook(lambda m, a: inputs.append(a[0])) for r in routers]
    with torch.no_grad():
        model(ids[None])
    for handle in handles:
        handle.remove()
    found = []
    for router, hidden in zip(routers, inputs, strict=True):
        logits = hidden.reshape(-1, hidden.shape[-1]) @ router.weight.detach().T
        logits = logits + (router.bias.detach() if hasattr(router, "bias") else 0)
        num = logits.shape[-1]
        counts, mass = [0.0] * num, [0.0] * num
        for row in logits:
            chosen = row.argsort(descending=True)[:top_k].tolist()
            for expert in range(num):
                counts[expert] += (expert in chosen) / (top_k * len(logits))
                mass[expert] += float(row.softmax(-1)[expert]) / len(logits)
        found.append(num * sum(f * p for f, p in zip(counts, mass, strict=True)))
    return sum(found) / len(found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_that_of_raw_logits_over_real_tokens(kind, tmp_path, make_module):
    module = make_module(kind, learning_rate=0.0)
    methods = [SFT(), ExpertBalance(weight=0.1)]
    recorder = tiny.fit(tmp_path, module, methods, tiny.make_rows(6), max_steps=1)
    (batch,) = recorder.steps[0]
    total = count = 0.0
    for row, length in enumerate(batch.lengths.tolist()):
        tokens = int(batch.mask[row, 1:].sum())
        total += tokens * reference(module.student, batch.input_ids[row, :length])
        count += tokens
    assert recorder.losses[0]["train/expert_balance"] == pytest.approx(total / count, rel=1e-4)
    gradients = recorder.gradients[0]
    routers = [name for name in gradients if name.rpartition(".")[0].endswith(("gate", "router"))]
    assert routers
    assert all(gradients[name].any() for name in routers)


def of_logits(logits: torch.Tensor, top_k: int, rows: list[int]) -> list[float]:
    chosen = logits.topk(top_k, dim=-1).indices
    routing = Routing(logits, chosen, torch.tensor(rows), max(rows) + 1)
    own = torch.arange(max(rows) + 1)
    return RouterBalance().measure_states(States({}, [routing]), None, own, None).tolist()


def test_equal_shares_are_one_and_one_expert_is_the_number_of_experts():
    equal = 50.0 * torch.eye(4).double()
    assert of_logits(equal, 1, [0, 0, 0, 0]) == pytest.approx([1.0])
    assert of_logits(equal[:1].repeat(3, 1), 1, [0, 0, 0]) == pytest.approx([4.0])
    assert of_logits(torch.cat([equal, equal[:2]]), 1, [0, 0, 0, 0, 1, 1]) == pytest.approx([1, 2])


def test_transformers_own_is_top_k_times_ours_on_raw_logits():
    torch.manual_seed(0)
    logits = torch.randn(50, 4).double()
    own = load_balancing_loss_func((logits,), 4, 2)
    assert of_logits(logits, 2, [0] * 50) == pytest.approx([float(own) / 2], rel=1e-6)


def test_a_router_that_returns_a_softmax_is_not_softmaxed_again(tmp_path, make_module, monkeypatch):
    """Mixtral's router does so in some releases of transformers, whose own loss is then near 1."""
    module = make_module(learning_rate=0.0)
    methods = [SFT(), ExpertBalance()]
    rows = tiny.make_rows(6)
    raw = tiny.fit(tmp_path / "1", module, methods, rows, max_steps=1)
    kind = type(routers_of(module.student)[0])
    forward = kind.forward

    def soft(router, hidden):
        logits, *rest = forward(router, hidden)
        return logits.softmax(-1), *rest

    monkeypatch.setattr(kind, "forward", soft)
    softmax = tiny.fit(tmp_path / "2", make_module(learning_rate=0.0), methods, rows, max_steps=1)
    assert softmax.losses[0] == pytest.approx(raw.losses[0], rel=1e-4)
    assert tiny.distance(softmax.gradients[0], raw.gradients[0]) < 1e-4
    logits = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    twice = load_balancing_loss_func((logits.softmax(-1),), 4, 2)
    once = load_balancing_loss_func((logits,), 4, 2)
    gap = [abs(float(value) / 2 - 1) for value in (twice, once)]
    assert gap[0] < 0.5 * gap[1]  # the defect hides most of the imbalance


def test_the_cut_of_a_step_changes_nothing(tmp_path, make_module):
    found = []
    for name, size, settings in (
        ("whole", 12, {}),
        ("cut", 3, {}),
        ("padded", 12, {"packing": False}),
        ("recomputed", 12, {"gradient_checkpointing": True}),
    ):
        module = make_module(
            optimizer=lambda p: torch.optim.SGD(p, lr=0.05), learning_rate=None, **settings
        )
        recorder = tiny.fit(
            tmp_path / name,
            module,
            [KD(), ExpertBalance(weight=0.5)],
            tiny.make_rows(12),
            data={"batch_size": size},
            accumulate_grad_batches=12 // size,
            max_epochs=2,
        )
        found.append((recorder.gradients, recorder.losses))
    for gradients, losses in found[1:]:
        for own, expected in zip(gradients, found[0][0], strict=True):
            assert tiny.distance(own, expected) < 1e-3
        for own, expected in zip(losses, found[0][1], strict=True):
            assert own == pytest.approx(expected, rel=1e-3)


def test_it_balances(tmp_path, make_module):
    """At a high weight the experts' shares come closer to equal in 30 steps."""
    module = make_module(learning_rate=3e-3)
    methods = [SFT(weight=1e-6), ExpertBalance(weight=1.0)]
    recorder = tiny.fit(tmp_path, module, methods, tiny.make_rows(12), max_epochs=10)
    values = [losses["train/expert_balance"] for losses in recorder.losses]
    assert values[0] > 1.2
    assert values[-1] < 0.5 * values[0] + 0.5


def test_a_cached_teacher_serves_the_method_with_it(tmp_path, make_module, teacher_folder):
    teacher = CachedTeacher(model=str(teacher_folder), folder=str(tmp_path / "cache"), k=8)
    module = make_module(teacher=teacher)
    recorder = tiny.fit(tmp_path, module, [KD(), ExpertBalance()], tiny.make_rows(8), max_steps=2)
    assert recorder.losses[0]["train/expert_balance"] >= 1.0


def test_students_that_are_refused(tmp_path, make_module, student_folder):
    module = make_module().__class__(str(student_folder), str(student_folder))
    with pytest.raises(ModelError, match="LlamaForCausalLM has no routers"):
        tiny.fit(tmp_path, module, [KD(), ExpertBalance()], tiny.make_rows(4))
    assert module.student is None  # before anything is loaded
    with pytest.raises(ConfigError, match="ExpertBalance: weight must be a number above 0"):
        ExpertBalance(weight=0)


def test_a_router_that_is_balanced_by_a_bias_is_refused(tmp_path, make_module):
    module = make_module()
    module.configure_model()
    router = routers_of(module.student)[0]
    forward = router.forward

    def biased(hidden):
        logits, scores, _ = forward(hidden)
        return logits, scores, (-logits).topk(2, dim=-1).indices

    router.forward = biased
    with pytest.raises(ModelError, match="does not choose the experts with the largest logits"):
        tiny.fit(tmp_path, module, [SFT(), ExpertBalance()], tiny.make_rows(4))
