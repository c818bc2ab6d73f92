"""A teacher that reads prompts of its own (OPSD, arXiv 2601.18734).

Frozen here: the teacher's numbers are those of the teacher alone on its own sequence, whatever
other rows a batch has; rows with and without a teacher prompt may be in one batch; the cut into
micro-batches does not matter; each model generates after its own prompt; validation reads the same
prompts; a resumed run is the uninterrupted one, and other teacher prompts are refused.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch

from okd_lightning.callbacks import GKD, KD, OKD, SFT, LastCheckpoint, OPDPlus, Stage
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ForwardKL
from okd_lightning.engines import Sampling
from okd_lightning.errors import ConfigError
from okd_lightning.losses import DrawnLogProb, ExactDivergence
from okd_lightning.records.batches import Example
from okd_lightning.records.collation import collate, dataset_row, fully_masked, sampled_row
from okd_lightning.records.requests import Response

TEMPLATE = {"teacher_prompt_template": "{reference}p{prompt}"}
KL, TEACHER, STUDENT = (
    ExactDivergence(ForwardKL()),
    DrawnLogProb("teacher"),
    DrawnLogProb("student"),
)


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def make_example(index: int, prompt: int, teacher_prompt: int, response: int) -> Example:
    """Return an example of letters that depend on the index."""

    def ids(length: int, step: int) -> tuple[int, ...]:
        return tuple(3 + (index + step * i) % 16 for i in range(length))

    return Example(
        index=index,
        prompt_ids=ids(prompt, 3),
        prompt_mask=(False,) * prompt,
        response_ids=(*ids(response, 5), tiny.EOS),
        prompt="",
        response="",
        teacher_prompt_ids=ids(teacher_prompt, 7),
    )


EXAMPLES = [
    make_example(0, 2, 9, 4),
    make_example(1, 7, 3, 1),
    make_example(2, 4, 0, 6),  # reads what the student reads
    make_example(3, 1, 12, 2),
]


@torch.no_grad()
def logprobs_alone(model, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    """[response, vocab] of one unpadded sequence."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, :, : tiny.NUM_IDS]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize("batch", [EXAMPLES, EXAMPLES[::-1], EXAMPLES[:1], EXAMPLES[2:3]])
@pytest.mark.parametrize("row", ["given", "written"])
def test_each_side_measures_its_own_sequence(batch, row, make_module):
    module = make_module()
    module.configure_model()
    module.eval()
    rows = [
        dataset_row(e)
        if row == "given"
        else sampled_row(e, "student", Response(e.response_ids, (), ""))
        for e in batch
    ]
    measured = module.measure(collate(rows, pad_id=11), (KL, TEACHER, STUDENT))
    for i, example in enumerate(batch):
        response = example.response_ids
        own = example.teacher_prompt_ids or example.prompt_ids
        q = logprobs_alone(module.teacher, own, response)
        p = logprobs_alone(module.student, example.prompt_ids, response)
        here = measured.row == i
        drawn = torch.tensor(response)[:, None]
        expected = {TEACHER: q.gather(1, drawn)[:, 0], STUDENT: p.gather(1, drawn)[:, 0]}
        expected[KL] = (q.exp() * (q - p)).sum(-1)
        for quantity, values in expected.items():
            torch.testing.assert_close(measured[quantity][here], values, atol=2e-5, rtol=1e-5)


def test_padding_of_either_side_is_never_read(make_module):
    module = make_module()
    module.configure_model()
    module.eval()
    batch = collate([dataset_row(e) for e in EXAMPLES])
    narrow = module.measure(batch, (KL, TEACHER))

    def widened(ids, mask, amount):
        ids = torch.cat([ids, torch.full((len(ids), amount), 7)], 1)
        return ids, torch.cat([mask, torch.zeros(len(mask), amount, dtype=torch.bool)], 1)

    ids, mask = widened(batch.input_ids, batch.mask, 3)
    own_ids, own_mask = widened(batch.teacher_input_ids, batch.teacher_mask, 9)
    for i, length in enumerate(batch.teacher_lengths.tolist()):
        own_ids[i, length:] = 13
    wide = replace(
        batch,
        input_ids=ids,
        mask=mask,
        sampler_logprobs=torch.zeros(ids.shape),
        teacher_input_ids=own_ids,
        teacher_mask=own_mask,
    )
    for quantity, values in module.measure(wide, (KL, TEACHER)).values.items():
        torch.testing.assert_close(values, narrow[quantity], atol=2e-5, rtol=1e-5)


def test_records_carry_both_sequences():
    batch = collate([dataset_row(e) for e in EXAMPLES])
    assert batch.mask.sum(1).tolist() == batch.teacher_mask.sum(1).tolist()
    assert batch.teacher_lengths.tolist() == [14, 5, 11, 15]
    moved = batch.to("meta")
    assert moved.teacher_input_ids.device.type == moved.teacher_mask.device.type == "meta"
    silent = collate([fully_masked(dataset_row(e)) for e in EXAMPLES])
    assert torch.equal(silent.teacher_input_ids, batch.teacher_input_ids)
    assert not silent.teacher_mask.any()
    without = collate([dataset_row(EXAMPLES[2])])
    assert without.teacher_input_ids is None
    assert without.teacher_reads.input_ids is without.input_ids


METHODS = {
    "KD": lambda: [KD()],
    "on-policy": lambda: [GKD(1.0, on_policy_fraction=1.0)],
    "the teacher writes": lambda: [KD(seq_kd=True)],
    "OKD": lambda: [OKD(on_policy_fraction=0.5)],
    "OPD+": lambda: [OPDPlus()],
}


def run(root, module, methods, cut=(12, 1), data=(), callbacks=(), ckpt_path=None, **settings):
    batch_size, accumulate = cut
    return tiny.fit(
        root,
        module,
        methods,
        tiny.make_rows(19),
        data={"batch_size": batch_size, **TEMPLATE, **dict(data)},
        callbacks=callbacks,
        accumulate_grad_batches=accumulate,
        ckpt_path=ckpt_path,
        **{"max_epochs": 2, **settings},
    )


@pytest.mark.parametrize("name", METHODS)
def test_cuts_into_micro_batches(name, tmp_path, make_module):
    def trained(cut):
        torch.manual_seed(0)
        module = make_module(optimizer=lambda p: torch.optim.SGD(p, lr=0.05))
        return run(tmp_path, module, METHODS[name](), cut), tiny.weights(module)

    (whole, weights), (cut, cut_weights) = trained((12, 1)), trained((4, 3))
    assert all(batch.teacher_input_ids is not None for step in cut.steps for batch in step)
    for found, truth in zip(cut.gradients, whole.gradients, strict=True):
        assert tiny.distance(found, truth) < 2e-5
    assert tiny.distance(cut_weights, weights) < 2e-6
    assert tiny.distance(weights, tiny.weights(fresh(make_module))) > 1e-3


def fresh(make_module):
    module = make_module()
    module.configure_model()
    return module


def test_teacher_prompts_change_what_is_learned(tmp_path, make_module):
    own, plain = make_module(), make_module()
    first = run(tmp_path, own, [KD()], max_epochs=1)
    second = run(tmp_path, plain, [KD()], data={"teacher_prompt_template": None}, max_epochs=1)
    assert first.losses[0]["train/kd"] != pytest.approx(second.losses[0]["train/kd"], rel=1e-3)


@pytest.mark.parametrize("author", ["student", "teacher"])
def test_each_generates_after_its_own_prompt(author, tmp_path, make_module):
    """Greedy, so that the teacher's answer is what it says to its own prompt alone."""
    module = make_module(learning_rate=0.0)
    method = KD(seq_kd=True) if author == "teacher" else GKD(on_policy_fraction=1.0)
    greedy = {"sampling": Sampling(temperature=0)}
    recorder = run(tmp_path, module, [method], data=greedy, max_epochs=1)
    model = module.teacher if author == "teacher" else module.student
    rows = tiny.make_rows(19)
    for batch in recorder.steps[0]:
        read = batch.teacher_reads if author == "teacher" else batch
        for i in range(len(batch)):
            prompt = batch.input_ids[i, : batch.prompt_lengths[i]]
            row = rows[int(batch.index[i])]
            own = module.tokenizer(f"{row['response']}p{row['prompt']}").input_ids
            response = read.input_ids[i][read.mask[i]]
            teacher_ids = batch.teacher_input_ids[i, : batch.teacher_lengths[i]].tolist()
            assert teacher_ids == own + response.tolist()
            start = tuple(own if author == "teacher" else prompt.tolist())
            likeliest = logprobs_alone(model, start, tuple(response.tolist())).argmax(-1)
            assert torch.equal(likeliest, response)


def test_validation_reads_the_teachers_prompts(tmp_path, make_module):
    module = make_module(learning_rate=0.0)
    rows = tiny.make_rows(6, seed=3)
    trainer = tiny.make_trainer(tmp_path, [KD()])
    settings = {"batch_size": 4, "max_prompt_length": 16, "max_response_length": 8, "seed": 7}
    trainer.fit(module, RolloutDataModule(rows, rows, val_rollouts=2, **settings, **TEMPLATE))
    values = []
    for row in rows:
        prompt, response = (tuple(module.tokenizer(row[k]).input_ids) for k in row)
        own = tuple(module.tokenizer(f"{row['response']}p{row['prompt']}").input_ids)
        q = logprobs_alone(module.teacher, own, (*response, tiny.EOS))
        p = logprobs_alone(module.student, prompt, (*response, tiny.EOS))
        values.append((q.exp() * (q - p)).sum(-1))
    expected = float(torch.cat(values).mean())
    assert float(trainer.callback_metrics["val/forward_kl"]) == pytest.approx(expected, rel=1e-4)
    assert "val/on_policy_reverse_kl" in trainer.callback_metrics


def test_predict_reads_no_teacher_prompts(tmp_path, make_module):
    prompts = [{"prompt": "abc"}, {"prompt": "de"}]
    data = RolloutDataModule(predict=prompts, max_response_length=4, seed=7, **TEMPLATE)
    (records,) = tiny.make_trainer(tmp_path).predict(make_module(), data)
    assert {record["index"] for record in records} <= {0, 1}


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, dropout_folder, make_module):
    def trained(root, max_steps, ckpt_path=None):
        torch.manual_seed(3 if ckpt_path is None else 99)
        module = make_module(student=str(dropout_folder))
        callbacks = [LastCheckpoint(every_n_steps=1)]
        methods = [GKD(on_policy_fraction=0.5)]
        settings = {"max_steps": max_steps, "ckpt_path": ckpt_path, "callbacks": callbacks}
        run(root, module, methods, (2, 2), {"prompts_per_rollout": 8}, **settings)
        return tiny.weights(module)

    whole = trained(tmp_path / "a", 7)
    trained(tmp_path / "b", 3)
    last = str(tmp_path / "b" / "checkpoints" / "last.ckpt")
    assert tiny.distance(trained(tmp_path / "b", 7, last), whole) == 0
    other = {"teacher_prompt_template": "{reference}{prompt}", "prompts_per_rollout": 8}
    module = make_module(student=str(dropout_folder))
    with pytest.raises(ConfigError, match=r"teacher prompts.*differ from the checkpoint's"):
        run(tmp_path, module, [GKD()], (2, 2), other, ckpt_path=last)


class Privileged(KD):
    needs_teacher_prompt = True


def test_who_needs_prompts_gets_them_or_one_line(tmp_path, make_module):
    for method in (Privileged(), Stage(Privileged())):
        with pytest.raises(ConfigError, match=r"privileged needs prompts.*teacher_prompt_template"):
            run(tmp_path, make_module(), [method], data={"teacher_prompt_template": None})
    run(tmp_path, make_module(), [Privileged()], max_steps=1)
    with pytest.raises(ConfigError, match="no teacher to read"):
        run(tmp_path, make_module(teacher=None), [SFT()])


def test_the_teachers_longer_sequence_has_to_fit(tmp_path, make_module):
    long = {"teacher_prompt_template": "{prompt}" + "a" * 60, "max_teacher_prompt_length": 90}
    with pytest.raises(
        ConfigError, match=r"teacher prompt and response.*context of the teacher is 64"
    ):
        run(tmp_path, make_module(), [KD()], data=long)


def test_the_length_of_the_longer_side_sorts():
    """Micro-batches of like lengths count the teacher's sequence too."""
    loader_rows = [dataset_row(e) for e in EXAMPLES]
    assert [row.num_tokens for row in loader_rows] == [14, 9, 11, 15]
