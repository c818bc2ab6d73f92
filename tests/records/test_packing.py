"""Packed rows (METHODS.md, section 5, test 6).

Frozen here: the plan places every token once, evenly and with less than padding; a packed row's
hidden states, and their gradients, are the padded one's for every architecture and attention that
is offered; models that would let rows leak into each other are found out and not packed; a run's
losses, gradients and weights are the same with packing and without; what is derived of a batch
follows it when it changes; the wasted share is what a count says.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from architectures import ARCHITECTURES, build
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig

from okd_lightning.callbacks import GKD, KD, OKD, OPDPlus, Throughput
from okd_lightning.models import add_adapter, hidden_at_loss, reading, reads_packed_rows
from okd_lightning.models.reading import packed_states
from okd_lightning.records import sequences
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.collation import collate
from okd_lightning.records.sequences import Sequences, pack
from okd_lightning.teachers import CachedTeacher, attach_online_module

pytestmark = pytest.mark.filterwarnings(  # PEFT's use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

DO_NOT_PACK = {
    "opt": "makes an attention mask of its own",
    "recurrent_gemma": "carries a state along",
    "falcon_h1": "carries a state along",
}
LENGTHS = ([7], [4, 4, 4, 4], [9, 1, 1, 1], [12, 7, 5, 5, 3, 2, 2, 1], [3, 11, 2, 10, 9])


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def rows_of(lengths, vocab_size=19, seed=0) -> Sequences:
    """Return rows of random ids, garbage after the rows, loss on about two thirds of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(3, vocab_size, shape, generator=generator)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    mask = real & (torch.rand(shape, generator=generator) < 0.67)
    return Sequences(ids, torch.tensor(lengths), mask)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_has_one_place(lengths):
    packing = pack(lengths)
    flat = list(zip(packing.row.flatten().tolist(), packing.column.flatten().tolist(), strict=True))
    taken = set()
    for row, length in enumerate(lengths):
        for column in range(length):
            place = int(packing.start[row]) + column
            assert flat[place] == (row, column)
            assert int(packing.position_ids.flatten()[place]) == column
            taken.add(place)
    assert len(taken) == sum(lengths)
    assert packing.row.numel() <= len(lengths) * max(lengths)
    starts = packing.position_ids == 0  # what follows on no row is a row of its own
    steps = packing.position_ids[:, 1:] - packing.position_ids[:, :-1]
    assert bool(starts[:, 0].all())
    assert bool(((steps == 1) | starts[:, 1:]).all())


def test_a_spread_of_lengths_costs_little():
    generator = random.Random(0)
    shares, worst = [], 0.0
    for _ in range(200):
        lengths = [generator.randint(51, 256) for _ in range(8)]
        packing = pack(lengths)
        shares.append(1 - sum(lengths) / packing.row.numel())
        worst = max(worst, packing.row.shape[1] / max(lengths))
    assert sum(shares) / len(shares) < 0.07  # padding: 0.34
    assert worst < 2.5  # attention does not grow with the batch


def test_a_large_micro_batch_is_planned_with_few_trials(monkeypatch):
    """The number of trial plans is small, and a model that does not pack gets no plan."""
    trials = []
    spread = sequences._spread
    monkeypatch.setattr(sequences, "_spread", lambda *call: trials.append(call) or spread(*call))
    generator = random.Random(0)
    lengths = [generator.randint(20, 512) for _ in range(512)]
    read = Sequences(torch.zeros(512, 512), torch.tensor(lengths), torch.ones(512, 512) > 0)
    moved = read.to("cpu")
    assert moved.num_tokens == sum(lengths)
    assert moved.num_positions(False) == 512 * 512
    assert not trials
    assert moved.num_positions(True) == moved.packing.row.numel() < 1.05 * sum(lengths)
    assert len(trials) < 20


def check_architecture(model_type, attention):
    model = build(model_type).double()
    try:
        model.set_attn_implementation(attention)
    except ValueError as error:
        assert "does not support an attention implementation" in str(error)  # noqa: PT017
        return
    assert reads_packed_rows(model) == (model_type not in DO_NOT_PACK)
    assert model.config._attn_implementation == attention
    if model_type in DO_NOT_PACK:
        return
    for lengths in LENGTHS:
        read = rows_of(lengths)
        with torch.no_grad():
            alone, packed = (hidden_at_loss(model, read, packs) for packs in (False, True))
        # eager attention takes its softmax in float32
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_architectures(model_type, attention):
    check_architecture(model_type, attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch in torch
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_flex_attention(model_type):
    with torch.compiler.set_stance("force_eager"):  # the same masks, without a compiler
        check_architecture(model_type, "flex_attention")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("std", [0.02, 0.3])
def test_leaks_are_found_in_untrained_and_16_bit_models(std, dtype):
    for model_type in ("llama", "opt", "falcon_h1"):
        name = "init_std" if model_type == "opt" else "initializer_range"
        model = build(model_type, **{name: std}).to(dtype)
        assert reads_packed_rows(model) == (model_type == "llama")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_gradients(model_type, attention):
    model = build(model_type).double()
    model.set_attn_implementation(attention)
    read = rows_of([3, 11, 2, 10, 9])
    gradients = []
    for packs in (False, True):
        model.zero_grad()
        (hidden_at_loss(model, read, packs).cos() * torch.arange(1, 33).log()).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    norms = 2e-6 if model_type == "gemma3_text" else 1e-12  # Gemma's norms are float32 always
    assert tiny.distance(gradients[1], gradients[0]) < norms


def test_flash_attention_gets_one_packed_row():
    model, read = build("llama"), rows_of([3, 11, 2, 10, 9])
    assert packed_states(model, read).shape[:2] == read.packing.row.shape
    taken = []

    def take(module, args, kwargs):
        taken.append(kwargs)
        raise StopIteration

    model.register_forward_pre_hook(take, with_kwargs=True)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(StopIteration):
        hidden_at_loss(model, read, packs=True)
    (passed,) = taken
    assert (
        passed["input_ids"].shape == passed["position_ids"].shape == (1, read.packing.row.numel())
    )
    assert "attention_mask" not in passed
    assert passed["use_cache"] is False


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptEncoderConfig])
def test_prompt_learning_is_not_packed(config):
    teacher = attach_online_module(build("llama"), config(num_virtual_tokens=3), "online_module")
    assert not reads_packed_rows(teacher)


def test_adapters_are_packed():
    model = build("llama")
    add_adapter(model, LoraConfig(r=2, init_lora_weights=False), "--model.student_adapter")
    assert reads_packed_rows(model)


def test_the_trial_leaves_no_trace():
    model = tiny.make_gpt2(1).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    with torch.no_grad():
        assert reads_packed_rows(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


RUNS = {
    "KD": (lambda: [KD(temperature=2.0, cross_entropy_weight=0.2)], {}),
    "GKD": (lambda: [GKD(0.5, on_policy_fraction=0.5)], {}),
    "OKD": (lambda: [OKD(learning_rate=0.5, online_module=LoraConfig(r=2))], {}),
    "OPD+ with a discount": (lambda: [OPDPlus(discount=0.5)], {}),
    "a teacher's own prompts": (
        lambda: [GKD(1.0, on_policy_fraction=0.5)],
        {"teacher_prompt_template": "{reference}p{prompt}"},
    ),
}


def train(root, make_module, methods, data, **settings):
    module = make_module(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), **settings
    )
    more = {"data": {"batch_size": 6, **data}, "accumulate_grad_batches": 2, "max_epochs": 2}
    recorder = tiny.fit(root, module, methods(), tiny.make_rows(19), **more)
    return recorder, tiny.weights(module), module


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_the_same_packed_and_padded(name, tmp_path, make_module):
    methods, data = RUNS[name]
    padded = train(tmp_path, make_module, methods, data, packing=False)
    packed = train(tmp_path, make_module, methods, data)
    assert packed[2].pair.packs_student
    assert packed[2].pair.teacher.packs
    assert not padded[2].pair.packs_student
    for gradients, truth in zip(packed[0].gradients, padded[0].gradients, strict=True):
        assert tiny.distance(gradients, truth) < 1e-9
    assert tiny.distance(packed[1], padded[1]) < 1e-9
    for losses, truth in zip(packed[0].losses, padded[0].losses, strict=True):
        assert losses == pytest.approx(truth, rel=1e-6, abs=1e-7)


def batch_of(lengths):
    rows = [
        TrainingRow(i, "dataset", (5,) * n, (False,) + (True,) * (n - 1), 1)
        for i, n in enumerate(lengths)
    ]
    return collate(rows)


def test_what_is_derived_follows_a_changed_batch():
    batch = batch_of([3, 5, 2]).to("cpu")
    assert len(batch.student_reads.targets) == 7
    muted = replace(batch, mask=torch.zeros_like(batch.mask))
    assert len(muted.student_reads.targets) == 0
    assert muted.to("cpu").student_reads.places.row.numel() == 0
    shorter = replace(batch, lengths=torch.tensor([3, 4, 2]))
    assert shorter.student_reads.num_tokens == 9
    assert shorter.student_reads.packing.row.numel() < 12


def test_a_model_that_cannot_pack_says_so_once(make_module, caplog):
    module = make_module(student=build("falcon_h1", vocab_size=tiny.STUDENT_ROWS))
    module.configure_model()
    assert not module.pair.packs_student
    said = [
        r.getMessage()
        for r in caplog.records
        if "does not keep packed rows apart" in r.getMessage()
    ]
    assert said == [
        "student: rows are padded, sorted by length, and not packed: FalconH1ForCausalLM does not "
        "keep packed rows apart"
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_wasted_positions(packing, tmp_path, make_module):
    recorder = tiny.fit(
        tmp_path,
        make_module(packing=packing),
        [KD(), Throughput()],
        tiny.make_rows(12),
        data={"batch_size": 6},
        accumulate_grad_batches=2,
        max_epochs=1,
    )
    (step,) = recorder.steps
    read = [batch.student_reads for batch in step]
    computed = sum((r.packing.row if packing else r.input_ids).numel() for r in read)
    tokens = sum(int(r.lengths.sum()) for r in read)
    (logged,) = recorder.losses
    assert logged["train/wasted_positions"] == pytest.approx(1 - tokens / computed)
    assert computed < 114 if packing else computed == 114


def test_a_cache_is_written_of_packed_rows(tmp_path, make_module, monkeypatch):
    """A teacher's packing is known only once it is loaded."""
    packed = []
    read = reading.hidden_at_loss
    monkeypatch.setattr(
        reading,
        "hidden_at_loss",
        lambda m, r, packs, *more: packed.append(packs) or read(m, r, packs, *more),
    )
    module = make_module(kind=lambda teacher: CachedTeacher(teacher, str(tmp_path / "cache")))
    tiny.fit(tmp_path, module, [KD()], tiny.make_rows(8), max_steps=1)
    assert packed == [True] * len(packed)
    assert len(packed) > 1
