"""A run whose teacher has another tokenizer.

Frozen here: with one-to-one tokens, sampled methods train like with the same tokenizer; shares of
tokens are logged; OKD's cross-entropy is a mean over the teacher's tokens; excluded tokens count in
the divisor of samples and not in that of dataset rows; chats are rendered by each model's own
template; whole texts begin without the space of a sentencepiece; the data's own ends are one
outcome; a run resumes with the same loss.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from foreign_pairs import ROWS, foreign, make, train
from pair_tokenizers import merging

from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    OPD,
    SFT,
    LastCheckpoint,
    OPDPlus,
    Reward,
)
from okd_lightning.data.columns import Columns
from okd_lightning.data.examples import build_examples
from okd_lightning.divergences import ForwardKL, JensenShannon
from okd_lightning.errors import CheckpointError
from okd_lightning.losses import DrawnLogProb, WeightedTerm
from okd_lightning.records.collation import collate, sampled_rows
from okd_lightning.records.requests import Response
from okd_lightning.teachers import ForeignTeacher


def sampled_batch(module):
    """Responses of letters with their end, as from a sampler of other probabilities."""
    tokenizer = module.tokenizer
    examples = build_examples(
        ROWS,
        tokenizer,
        eos_id=1,
        columns=Columns(),
        max_prompt_length=9,
        max_response_length=9,
        on_overlong="skip",
        needs_response=True,
        where="rows",
        teacher_tokenizer=module.pair.teacher.tokenizer,
    ).examples
    torch.manual_seed(0)
    responses = [
        Response(
            e.response_ids,
            tuple((torch.rand(len(e.response_ids)) - 2).tolist()),
            "eos",
            merges_ends=True,
        )
        for e in examples
    ]
    return collate(module.pair.teacher.retokenized(sampled_rows(examples, "student", responses)))


@pytest.mark.parametrize(
    "method",
    [
        OPD(),
        OPDPlus(JensenShannon(), "centred"),
        OPDPlus(ForwardKL(), "as_published", max_ratio=1.5),
    ],
)
def test_one_to_one_tokens_train_like_the_same_tokenizer(method, root):
    found = []
    for module in (make(root, str(root / "teacher")), foreign(root, "other")):
        module.configure_model()
        batch = sampled_batch(module)
        loss = module.pair.loss_of(batch, [WeightedTerm(method.term, 0.1)])
        loss.total.backward()
        found.append((loss, {n: p.grad for n, p in module.student.named_parameters()}))
    assert int((batch.chunks.student < 0).sum()) == 0
    (one, expected), (two, gradients) = found
    torch.testing.assert_close(two.total, one.total)
    assert int(one.outputs[0].count) == int(two.outputs[0].count) == len(batch.chunks.student)
    assert tiny.distance(gradients, expected) < 1e-9
    for name, value in one.outputs[0].metrics.items():
        torch.testing.assert_close(two.outputs[0].metrics[name], value)


def test_shares_of_tokens_are_logged_and_dataset_rows_count_aligned_tokens(root, tmp_path):
    rows = [{"prompt": "a", "response": "abcde"}, {"prompt": "b", "response": "aoabc" * 3}]
    recorder = train(tmp_path, foreign(root), [KD()], rows, max_steps=1, data={"batch_size": 2})
    (batch,) = recorder.steps[0]
    # abcde<eos> is ab cd e <eos>; the second response is cut at 8 tokens, in its third chunk
    assert batch.step_counts[0] == int(batch.mask.sum()) == 6 + 7
    assert batch.teacher_tokens[0] == len(batch.chunks.teacher)
    assert recorder.losses[0]["train/unaligned_tokens"] == pytest.approx(1 / 14)
    assert recorder.losses[0]["train/noncanonical_tokens"] == 0


def test_excluded_samples_count_in_the_divisor(root, tmp_path):
    recorder = train(tmp_path, foreign(root), [OPDPlus()], max_steps=1)
    (batch,) = recorder.steps[0]
    assert batch.step_counts[1] == int(batch.mask[:, 1:].sum()) == len(batch.chunks.student)
    assert (batch.chunks.student < 0).any()
    assert batch.sampled.rollouts == len(batch)


def test_the_teachers_cross_entropy_is_over_its_own_tokens(root, tmp_path):
    module = foreign(root)
    recorder = train(tmp_path, module, [OKD(alpha=0.0)], max_steps=1)
    start = foreign(root)
    start.configure_model()
    (batch,) = recorder.steps[0]
    with torch.no_grad():
        measured = start.measure(batch, (DrawnLogProb("teacher"),))
        logits = start.teacher(batch.teacher_input_ids).logits.log_softmax(-1)
    reads = batch.teacher_reads
    own = logits[reads.places.row, reads.places.column - 1].gather(-1, reads.targets[:, None])
    assert measured[DrawnLogProb("teacher")].sum() == pytest.approx(
        float(own.sum() * (batch.step_counts[0] / len(own))), rel=1e-6
    )
    logged = recorder.losses[0]["train/teacher_cross_entropy"]
    assert logged == pytest.approx(-float(own.mean()), rel=1e-5)
    assert any("lora" in name for name in recorder.gradients[0])


def test_rewards_and_cross_entropy_run_with_it(root, tmp_path):
    methods = [OPDPlus(), Reward(lambda prompt, response, reference: float(len(response)))]
    assert train(tmp_path, foreign(root), methods).losses[-1]["train/reward"] != 0
    both = [KD(cross_entropy_weight=0.5, temperature=2.0), SFT()]
    assert train(tmp_path, foreign(root), both).losses[-1]["train/kd"] > 0


def test_the_start_says_how_both_share_a_text(root, tmp_path, caplog):
    rows = [{"prompt": "a", "response": "abcde"}]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        train(tmp_path, foreign(root), [KD()], rows, max_steps=1)
    # abcde<eos> is ab cd e <eos>
    assert "33% of the student's response tokens are one token of the teacher, 0.0%" in caplog.text
    assert "the longest chunk has 2 tokens" in caplog.text


@pytest.mark.parametrize("loss", ["text", "next_byte", "shared_tokens"])
@pytest.mark.parametrize("method", [KD, lambda: GKD(on_policy_fraction=1.0), OKD])
def test_distributions_over_texts_train(loss, method, root, tmp_path):
    module = make(root, ForeignTeacher(str(root / "pairs"), loss=loss))
    recorder = train(tmp_path, module, [method()], val=ROWS[:4], data={"val_rollouts": 2})
    assert all(math.isfinite(losses["train/grad_norm"]) for losses in recorder.losses)
    assert recorder.losses[0]["train/loss"] > 0
    plain = train(tmp_path, foreign(root), [method()], max_steps=1)
    assert recorder.losses[0]["train/loss"] != plain.losses[0]["train/loss"]


TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{{ '<eos>' if m.role == 'assistant' }}{% endfor %}"
)


def test_each_model_renders_a_chat_by_its_own_template():
    own, other = tiny.make_tokenizer(), merging("ab")
    own.chat_template = TEMPLATE + "{% if add_generation_prompt %}p{% endif %}"
    other.chat_template = "<bos>" + TEMPLATE + "{% if add_generation_prompt %}on{% endif %}"
    own.chat_template = (
        "{% for m in messages %}{{ 'p' if m.role == 'assistant' }}{{ m.content }}"
        + ("{{ '<eos>' if m.role == 'assistant' }}{% endfor %}{{ 'p' if add_generation_prompt }}")
    )
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (example,) = build_examples(
        [{"messages": chat}],
        own,
        eos_id=1,
        columns=Columns(),
        max_prompt_length=9,
        max_response_length=9,
        on_overlong="skip",
        needs_response=True,
        where="rows",
        teacher_tokenizer=other,
    ).examples
    assert own.decode(example.prompt_ids) == "abp"
    assert own.decode(example.response_ids) == "cd<eos>"
    assert other.decode(example.teacher_prompt_ids) == "<bos>abon"


def test_whole_texts_have_a_teachers_prompt_without_text():
    own, other = tiny.make_tokenizer(), merging("ab")
    columns = Columns(prompt=None, response="response")
    (example,) = build_examples(
        [{"response": "abcd"}],
        own,
        eos_id=1,
        columns=columns,
        max_prompt_length=9,
        max_response_length=9,
        on_overlong="skip",
        needs_response=True,
        where="rows",
        teacher_tokenizer=other,
    ).examples
    assert (own.decode(example.prompt_ids), other.decode(example.teacher_prompt_ids)) == ("a", "a")


def test_ends_of_the_data_are_one_outcome(root):
    module = foreign(root)
    module.pair.add_eos_ids([2])
    assert module.pair.vocabulary.end_ids == (1, 2)
    same = make(root, str(root / "teacher"))
    same.pair.add_eos_ids([2])
    assert same.pair.vocabulary.end_ids == (1,)


@pytest.mark.parametrize("method", [KD, OKD, lambda: GKD(on_policy_fraction=0.5), OPDPlus])
def test_one_tokenizer_passes_through(method, root, tmp_path, caplog):
    """Bit by bit, with the text of the start."""
    found = []
    for teacher in (str(root / "teacher"), ForeignTeacher(str(root / "teacher"), loss="text")):
        module = make(root, teacher)
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            recorder = train(tmp_path, module, [method()], val=ROWS[:4], data={"val_rollouts": 2})
        found.append((recorder.losses, tiny.weights(module)))
    (losses, weights), (others, same) = found
    assert losses == others
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert "the student's tokenizer, so that ids are compared one by one" in caplog.text


def test_it_resumes_with_the_same_loss(root, tmp_path):
    train(tmp_path, foreign(root), [KD()], max_steps=1, callbacks=[LastCheckpoint(1)])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    other = make(root, ForeignTeacher(str(root / "pairs"), loss="text"))
    with pytest.raises(CheckpointError, match=r"ForeignTeacher \(chunk\), this .* \(text\)"):
        train(tmp_path, other, [KD()], ckpt_path=last)
