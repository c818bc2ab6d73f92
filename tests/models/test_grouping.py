"""Rows whose rotary embedding depends on the longest row of a pass (longrope, dynamic).

Frozen here: where the sides of the switch are, found by trial on each kind of rotary embedding and
in every number format, and that nothing is tried without a scaled one; a row's hidden states and
gradients are those of the row alone, on a model that has read nothing else, packed and padded,
through recomputed layers and prompt learning; training, measuring, generation (sampled, greedy,
across the switch, mixed) and teachers of all kinds alike; a model that does not forget is refused.
"""

from __future__ import annotations

from copy import deepcopy

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig
from transformers import AutoConfig, AutoModelForCausalLM

from okd_lightning.callbacks import KD, OKD
from okd_lightning.engines import Blend, NoiseStream, Sampling, TransformersEngine
from okd_lightning.errors import ModelError
from okd_lightning.models import Vocabulary, hidden_at_loss, recompute_activations, row_groups
from okd_lightning.models.reading import ANY_ROWS, RowGroups
from okd_lightning.records.requests import Prompt, PromptBatch, Request
from okd_lightning.records.sequences import Sequences
from okd_lightning.teachers import attach_online_module, base_teacher

pytestmark = pytest.mark.filterwarnings(  # PEFT's use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 12,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FIELDS = {
    "vocab_size": tiny.STUDENT_ROWS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
KINDS = {
    "phi3": (
        "phi3",
        {
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 12,
            "max_position_embeddings": 64,
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "rope_parameters": {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.2},
            "max_position_embeddings": 64,
            "num_local_experts": 4,
        },
    ),
    "longrope llama": ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 64}),
    "dynamic llama": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12}),
    "dynamic qwen3": (
        "qwen3",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 12, "head_dim": 8},
    ),
}
LENGTHS = [3, 20, 12, 13, 9, 20, 17]


def make(kind: str, seed: int = 1, **overrides):
    """Return a new model that has run no forward pass."""
    model_type, fields = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(model_type, **deepcopy({**FIELDS, **fields, **overrides}))
        return AutoModelForCausalLM.from_config(config).eval()


def rows_of(lengths, seed=0) -> Sequences:
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(3, tiny.NUM_IDS, shape, generator=generator)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    mask = real & (torch.rand(shape, generator=generator) < 0.67)
    return Sequences(ids, torch.tensor(lengths), mask)


def alone(model, read: Sequences, row: int):
    """[positions, hidden] of one row by a copy that has read nothing, without this library."""
    fresh = deepcopy(model)
    ids = read.input_ids[row : row + 1, : read.row_lengths[row]]
    hidden = fresh.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    return hidden[read.mask[row, 1 : read.row_lengths[row]].nonzero().squeeze(-1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.02, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_sides_are_found(kind, std, dtype):
    model = make(kind, initializer_range=std).to(dtype)
    if kind == "phimoe" and dtype == torch.bfloat16 and std == 0.02:
        pytest.skip("a change below the rounding of its experts")
    assert row_groups(model) == RowGroups(12, by_length=kind.startswith("dynamic"))


SAME_EVERYWHERE = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


@pytest.mark.parametrize("rope", SAME_EVERYWHERE)
def test_other_scalings_have_no_sides(rope):
    model = tiny.make_llama(1, rope_parameters=SAME_EVERYWHERE[rope])
    passes = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    assert row_groups(model) == row_groups(model) == ANY_ROWS
    assert len(passes) == (0 if rope == "default" else 3)


def test_rows_of_each_pass():
    assert ANY_ROWS.split([3, 9, 1]) == [[0, 1, 2]]
    assert RowGroups(4).split([3, 9, 4, 5]) == [[0, 2], [1, 3]]
    assert RowGroups(4, by_length=True).split([3, 9, 4, 5, 9]) == [[0, 2], [3], [1, 4]]
    virtual = RowGroups(4, virtual_tokens=2)
    assert virtual.split([2, 3, 4, 5, 9]) == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_is_what_it_is_alone(kind, packs):
    dtype = torch.float32 if kind == "phimoe" else torch.float64  # its experts know no float64
    model, fresh = make(kind).to(dtype), make(kind).to(dtype)
    for lengths in (LENGTHS, [20, 19], [12, 12], [13], [3, 3, 4]):  # in this order, one by one
        read = rows_of(lengths)
        found = hidden_at_loss(model, read, packs)
        truth = torch.cat([alone(fresh, read, row) for row in range(len(lengths))])
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4 if kind == "phimoe" else 1e-6)


@pytest.mark.parametrize("kind", ["phi3", "dynamic llama"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_gradients(kind, recomputes):
    read, model = rows_of(LENGTHS), make(kind).double()
    if recomputes:
        recompute_activations(model, "--model.student")
    direction = torch.arange(1, 33).log()
    (hidden_at_loss(model, read, True).cos() * direction).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    truth: dict[str, torch.Tensor] = {}
    for row in range(len(LENGTHS)):
        fresh, one = make(kind).double(), rows_of(LENGTHS)
        ids = one.input_ids[row : row + 1, : LENGTHS[row]]
        hidden = fresh.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        (hidden[one.mask[row, 1 : LENGTHS[row]].nonzero()].cos() * direction).sum().backward()
        for name, p in fresh.named_parameters():
            if p.grad is not None:
                truth[name] = truth.get(name, 0) + p.grad
    assert tiny.distance(found, truth) < 1e-6


def test_virtual_tokens_count():
    """A prefix moves every row by its own length, and is absent from the base teacher."""
    teacher = attach_online_module(make("phi3"), PrefixTuningConfig(num_virtual_tokens=3), "online")
    read = rows_of(LENGTHS[:5])
    for is_base in (False, True):
        with torch.no_grad(), base_teacher(teacher) if is_base else torch.no_grad():
            found = hidden_at_loss(teacher, read, False)
            parts = [
                hidden_at_loss(teacher, read.of_rows([row]), False)
                for row in range(len(read.row_lengths))
            ]
        torch.testing.assert_close(found, torch.cat(parts), rtol=1e-4, atol=1e-4)


def loss_of(root, make_module, kind, lengths, **settings):
    """Sum of the forward KL over all loss tokens."""
    rows = [
        {"prompt": tiny.LETTERS[: n // 2], "response": tiny.LETTERS[: n - n // 2 - 1]}
        for n in lengths
    ]
    module = make_module(**settings)
    trainer = tiny.make_trainer(root)
    data = {"batch_size": 8, "max_prompt_length": 24, "max_response_length": 24}
    data = tiny.RolloutDataModule(rows, rows, val_rollouts=0, **data)
    (found,) = trainer.validate(module, data, verbose=False)
    return found["val/forward_kl"] * sum(n - n // 2 for n in lengths)


@pytest.mark.parametrize("kind", ["phi3"])
def test_a_runs_loss_is_the_sum_over_rows(kind, tmp_path, make_module):
    lengths = [4, 20, 12, 13]

    def pair():
        tokenizer = tiny.make_tokenizer()
        return {"student": make(kind), "teacher": make(kind, seed=2), "tokenizer": tokenizer}

    both = loss_of(tmp_path, make_module, kind, lengths, **pair())
    each = [loss_of(tmp_path, make_module, kind, [n], **pair()) for n in lengths]
    assert both == pytest.approx(sum(each), rel=1e-4)


def okd():
    return OKD(learning_rate=0.5, online_module=LoraConfig(r=2, target_modules=["qkv_proj"]))


@pytest.mark.parametrize("method", [KD, okd])
def test_training_does_not_depend_on_the_micro_batch(method, tmp_path, make_module):
    rows = [
        {"prompt": tiny.LETTERS[:n], "response": tiny.LETTERS[-n:]} for n in (2, 9, 4, 11, 7, 6)
    ]
    found = []
    for batch_size, accumulate in ((6, 1), (1, 6)):
        module = make_module(
            student=make("phi3"),
            teacher=make("phi3", seed=2),
            tokenizer=tiny.make_tokenizer(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        )
        recorder = tiny.fit(
            tmp_path,
            module,
            [method()],
            rows,
            data={"batch_size": batch_size, "max_prompt_length": 24, "max_response_length": 24},
            accumulate_grad_batches=accumulate,
            max_epochs=2,
        )
        found.append((recorder, tiny.weights(module)))
    assert tiny.distance(found[0][1], found[1][1]) < 1e-5
    for whole, parts in zip(found[0][0].losses, found[1][0].losses, strict=True):
        assert whole["train/loss"] == pytest.approx(parts["train/loss"], rel=1e-4)


@torch.no_grad()
def slowly(models, share, prompt, num_tokens):
    """Greedy ids, each from whole passes of models that have read nothing."""
    ids = []
    for _ in range(num_tokens):
        text = torch.tensor([[*prompt, *ids]])
        each = [deepcopy(m)(text, use_cache=False).logits[0, -1, : tiny.NUM_IDS] for m in models]
        probs = [logits.double().softmax(-1) for logits in each]
        ids.append(int(((1 - share) * probs[0] + share * probs[-1]).argmax()))
        if ids[-1] == 1:
            break
    return tuple(ids)


def prompts_of(lengths, limits=()) -> tuple[Prompt, ...]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, tiny.NUM_IDS, (n,), generator=generator).tolist() for n in lengths]
    rows = tuple(map(tuple, ids))
    return PromptBatch(rows, tuple(range(len(rows))), (0,) * len(rows), limits=limits)


@pytest.mark.parametrize("token_budget", [40, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_across_the_switch(kind, token_budget):
    prompts = prompts_of([3, 11, 12, 13, 8, 18, 5], limits=(9, 9, 9, 9, 4, 9, 7))
    told = []
    engine = TransformersEngine(make(kind), Vocabulary(tiny.NUM_IDS), (1,), token_budget)
    rollout = engine.respond(
        Request(
            prompts,
            Sampling(temperature=0),
            NoiseStream(0, 0),
            9,
            progress=lambda rows, tokens=0: told.append(rows),
        )
    )
    fresh = make(kind)
    for prompt, response in zip(prompts, rollout, strict=True):
        ids, limit = response.ids, prompt.limit
        assert ids == slowly([fresh], 0.0, prompt.ids, limit)
    assert sum(told) == len(prompts)
    assert min(told) >= 0


def test_samples_across_the_switch_are_drawn_with_their_own_noise():
    """The noise of a place is that of the place, whichever round it is written in."""
    prompts, noise = prompts_of([3, 10, 13]), NoiseStream(0, 0)
    engine = TransformersEngine(make("phi3"), Vocabulary(tiny.NUM_IDS), ())
    rollout = engine.respond(Request(prompts, Sampling(), noise, 14))
    uniform = noise.uniform([p.index for p in prompts], [p.sample for p in prompts], 14)
    model = make("phi3")
    for i, ids in enumerate(rollout.response_ids):
        for place, token in enumerate(ids):
            text = torch.tensor([[*prompts[i].ids, *ids[:place]]])
            with torch.no_grad():
                logits = model(text, use_cache=False).logits[0, -1, : tiny.NUM_IDS].double()
            cdf = logits.softmax(-1).cumsum(0)
            assert token == int((cdf <= uniform[i, place]).sum())
            assert rollout[i].logprobs[place] == pytest.approx(
                float(logits.log_softmax(-1)[token]), abs=1e-4
            )


@pytest.mark.parametrize("second", ["dynamic llama", "longrope llama"])
def test_a_mixture_across_both_switches(second):
    models = [make("phi3"), make(second, seed=2)]
    prompts = prompts_of([3, 11, 15])
    vocabulary = Vocabulary(tiny.NUM_IDS)
    engine = TransformersEngine(models[0], vocabulary, (1,), blend=Blend(models[1], 0.5))
    rollout = engine.respond(Request(prompts, Sampling(temperature=0), NoiseStream(0, 0), 8))
    fresh = [make("phi3"), make(second, seed=2)]
    for prompt, ids in ((p.ids, r.ids) for p, r in zip(prompts, rollout, strict=True)):
        assert ids == slowly(fresh, 0.5, prompt, 8)


def test_a_switch_that_no_field_names_is_found(monkeypatch):
    model = make("phi3", original_max_position_embeddings=21, max_position_embeddings=64)
    monkeypatch.setattr("okd_lightning.models.grouping.switches", lambda config: [16, 64])
    assert row_groups(model) == RowGroups(21)


def test_a_model_that_does_not_forget_is_refused():
    model = make("dynamic llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward

    def remember(x, position_ids):
        rotary.original_max_seq_len = 0  # never back to the original frequencies
        return forward(x, position_ids)

    rotary.forward = remember
    with pytest.raises(ModelError, match="depends on the rows of earlier passes"):
        row_groups(model)
