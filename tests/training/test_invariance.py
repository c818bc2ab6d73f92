"""Invariance to the division of an optimizer step (METHODS.md, section 5, tests 6 and 8).

Frozen here: the gradients of every step, the weights after the run and the logged losses are the
same for any cut of a step's rows into micro-batches, any padding and any tile, at any temperature,
under LoRA, with rows of several sources; where pad = eos; with rows that have no loss at all.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from peft import LoraConfig

from okd_lightning.callbacks import GKD, KD, SFT
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ReverseKL
from okd_lightning.losses import projection
from okd_lightning.rollouts import RolloutLoader
from okd_lightning.training.module import DistillationModule

RUNS = {
    "SFT": lambda: [SFT()],
    "KD": lambda: [KD()],
    "tempered KD + CE": lambda: [KD(temperature=3.0, cross_entropy_weight=0.4)],
    "on-policy": lambda: [GKD(1.0, on_policy_fraction=1.0)],
    "the teacher writes": lambda: [KD(ReverseKL(), temperature=0.7, seq_kd=True)],
    "mixed sources": lambda: [KD(weight=0.3), GKD(0.5, on_policy_fraction=1.0, temperature=2.0)],
    "mixed, all authors": lambda: [
        SFT(seq_kd=True),
        GKD(0.25, on_policy_fraction=0.5, seq_kd=True),
    ],
}

CUTS = [(12, 1), (6, 2), (4, 3), (2, 6), (1, 12)]


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def run(root, make_module, methods, batch_size=12, accumulate=1, **overrides):
    """Two epochs of two steps, the second of 7 rows."""
    module = make_module(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), **overrides
    )
    recorder = tiny.fit(
        root,
        module,
        methods,
        tiny.make_rows(19),
        data={"batch_size": batch_size},
        accumulate_grad_batches=accumulate,
        max_epochs=2,
    )
    assert len(recorder.gradients) == 4
    return recorder, tiny.weights(module)


def check_same(found, expected, tolerance=1e-10) -> None:
    (recorder, weights), (true_recorder, true_weights) = found, expected
    for gradients, truth in zip(recorder.gradients, true_recorder.gradients, strict=True):
        assert tiny.distance(gradients, truth) < 10 * tolerance
    assert tiny.distance(weights, true_weights) < tolerance
    for losses, truth in zip(recorder.losses, true_recorder.losses, strict=True):
        assert losses == pytest.approx(truth, rel=1e-6, abs=1e-7)
    assert recorder.sources() == true_recorder.sources()
    for i in range(4):
        with_loss, truly = (
            sorted(row for row in r.rows(i) if any(row[1])) for r in (recorder, true_recorder)
        )
        assert with_loss == truly


@pytest.mark.parametrize("name", RUNS)
def test_cuts_into_micro_batches(name, tmp_path, make_module):
    truth = run(tmp_path, make_module, RUNS[name]())
    moved = [float(g.norm()) for step in truth[0].gradients for g in step.values()]
    assert max(moved) > 1e-3
    for batch_size, accumulate in CUTS[1:] if name == "tempered KD + CE" else CUTS[2:3]:
        check_same(run(tmp_path, make_module, RUNS[name](), batch_size, accumulate), truth)


@pytest.mark.parametrize("name", ["tempered KD + CE", "mixed sources"])
def test_cuts_under_lora(name, tmp_path, make_module):
    def settings():
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return {"student_adapter": adapter}

    truth = run(tmp_path, make_module, RUNS[name](), **settings())
    assert all("lora_" in n for n in truth[0].gradients[0])
    check_same(run(tmp_path, make_module, RUNS[name](), 3, 4, **settings()), truth)


@pytest.mark.parametrize("name", ["tempered KD + CE", "mixed sources"])
def test_amount_and_kind_of_padding(name, tmp_path, make_module, monkeypatch):
    truth = run(tmp_path, make_module, RUNS[name](), 4, 3)
    yields = RolloutLoader.__iter__

    def padded(loader):
        for batch in yields(loader):
            wide = batch.input_ids.shape[1] + 7
            ids = torch.full((len(batch), wide), 11)
            mask = torch.zeros(len(batch), wide, dtype=torch.bool)
            logprobs = torch.zeros(len(batch), wide)
            for i, length in enumerate(batch.lengths.tolist()):
                ids[i, :length] = batch.input_ids[i, :length]
                mask[i, :length] = batch.mask[i, :length]
                logprobs[i, :length] = batch.sampler_logprobs[i, :length]
            yield replace(batch, input_ids=ids, mask=mask, sampler_logprobs=logprobs)

    monkeypatch.setattr(RolloutLoader, "__iter__", padded)
    found = run(tmp_path, make_module, RUNS[name](), 4, 3)
    assert found[0].steps[0][0].input_ids.shape[1] > truth[0].steps[0][0].input_ids.shape[1]
    check_same(found, truth)


@pytest.mark.parametrize("name", ["tempered KD + CE", "mixed sources"])
def test_many_tiles(name, tmp_path, make_module, monkeypatch):
    truth = run(tmp_path, make_module, RUNS[name]())
    monkeypatch.setattr(projection, "_TILE_ELEMENTS", {"cpu": 3 * tiny.NUM_IDS})
    monkeypatch.setattr(projection, "_BLOCK_ELEMENTS", {"cpu": 2 * tiny.NUM_IDS})
    check_same(run(tmp_path, make_module, RUNS[name]()), truth)


def test_gradient_checkpointing_changes_nothing(tmp_path, make_module, dropout_folder):
    for folder in ({}, {"student": str(dropout_folder)}):
        torch.manual_seed(0)
        truth = run(tmp_path, make_module, RUNS["mixed sources"](), **folder)
        torch.manual_seed(0)
        settings = {"gradient_checkpointing": True, **folder}
        check_same(run(tmp_path, make_module, RUNS["mixed sources"](), **settings), truth)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_the_end_of_sequence_counts_also_where_it_is_the_pad(pad_is_eos, tmp_path, tiny_pair):
    module = DistillationModule(
        *tiny_pair, tokenizer=tiny.make_tokenizer(pad_is_eos=pad_is_eos), learning_rate=0.0
    )
    rows = [{"prompt": "ab", "response": "cdefg"}, {"prompt": "a", "response": "b"}]
    recorder = tiny.fit(tmp_path, module, [KD()], rows)
    found = sorted(recorder.rows(0))
    assert [ids for ids, _, _ in found] == [[3, 4, tiny.EOS], [3, 4, 5, 6, 7, 8, 9, tiny.EOS]]
    assert [mask for _, mask, _ in found] == [[False, True, True], [False] * 2 + [True] * 6]
    assert recorder.steps[0][0].step_counts == (8, 0, 0)


def test_rows_without_loss_contribute_nothing(tmp_path, make_module):
    """Batches with a fully masked row, and a step in which no row has loss."""

    class WithBlanks(RolloutDataModule):
        def examples(self, part, needs_response=False):
            return super().examples(part, needs_response=False)

    def losses(rows, blanks):
        module = make_module()
        recorder = tiny.Recorder()
        trainer = tiny.make_trainer(tmp_path, [KD(cross_entropy_weight=0.5), recorder])
        options = {"batch_size": 8, "max_response_length": 8, "seed": 7}
        trainer.fit(module, WithBlanks(rows + blanks, **options))
        return recorder, tiny.weights(module)

    blanks = [{"prompt": text, "response": ""} for text in ("abc", "d")]
    rows = tiny.make_rows(5)
    plain, spoilt = losses(rows, []), losses(rows, blanks)
    assert spoilt[0].losses[0] == pytest.approx(plain[0].losses[0], rel=1e-6)
    assert tiny.distance(spoilt[0].gradients[0], plain[0].gradients[0]) < 1e-5
    nothing, before = losses([], blanks), make_module()
    before.configure_model()
    assert all(g.count_nonzero() == 0 for g in nothing[0].gradients[0].values())
    assert tiny.distance(nothing[1], tiny.weights(before)) == 0
