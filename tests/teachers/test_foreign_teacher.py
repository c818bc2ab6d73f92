"""A run whose teacher has another tokenizer.

Frozen here: with one-to-one tokens, sampled methods train like with the same tokenizer; shares of
tokens are logged; OKD's cross-entropy is a mean over the teacher's tokens; excluded tokens count in
the divisor of samples and not in that of dataset rows; chats are rendered by each model's own
template; whole texts begin without the space of a sentencepiece; the data's own ends are one
outcome; a run resumes with the same loss; what is not offered is refused by name; the advice of the
error about tokenizers is true.
"""

from __future__ import annotations

import json
import math
import re

import pytest
import tiny
import torch
from pair_tokenizers import merging
from process_state import unchanged_process
from transformers import AutoModelForCausalLM

from okd_lightning.__main__ import main
from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    OPD,
    SFT,
    LastCheckpoint,
    OPDPlus,
    PaperMeasures,
    Reward,
)
from okd_lightning.data.columns import Columns
from okd_lightning.data.examples import build_examples
from okd_lightning.divergences import ForwardKL, JensenShannon
from okd_lightning.errors import CheckpointError, ConfigError, VocabularyError
from okd_lightning.losses import DrawnLogProb, WeightedTerm
from okd_lightning.records.collation import collate
from okd_lightning.records.requests import Response
from okd_lightning.records.rows import sampled_rows
from okd_lightning.teachers import CachedTeacher, ForeignTeacher, FrozenSelf
from okd_lightning.tools import Calculator
from okd_lightning.training.module import DistillationModule

ROWS = tiny.make_rows(16)
NUM = tiny.NUM_IDS
ALL = {"batch_size": 8, "max_response_length": 6}


def read_rows(lines):
    return [dict(zip(("prompt", "response"), line.split(","), strict=True)) for line in lines]


def permuted(model, tokenizer, other):
    """The model with its letters at another tokenizer's ids."""
    ids = [
        tokenizer.get_vocab()[token]
        for token in sorted(other.get_vocab(), key=other.get_vocab().get)
    ]
    made = tiny.make_llama(0, NUM)
    made.load_state_dict(model.state_dict())
    with torch.no_grad():
        for table in (made.get_input_embeddings(), made.get_output_embeddings()):
            table.weight.copy_(table.weight[ids])
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of a student, a teacher, that teacher with other ids, and one with pairs."""
    root = tmp_path_factory.mktemp("foreign")
    own, other = tiny.make_tokenizer(), tiny.make_tokenizer(tiny.LETTERS[::-1])
    teacher = tiny.make_llama(2, NUM)
    pairs = merging("ab", "cd", "ef")
    for name, model, tokenizer in (
        ("student", tiny.make_llama(1), own),
        ("teacher", teacher, own),
        ("other", permuted(teacher, own, other), other),
        ("pairs", tiny.make_llama(3, len(pairs)), pairs),
    ):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def make(root, teacher, **settings) -> DistillationModule:
    torch.manual_seed(3)
    sgd = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05)}
    return DistillationModule(str(root / "student"), teacher, dtype="float64", **sgd, **settings)


def foreign(root, name="pairs", **settings) -> DistillationModule:
    return make(root, ForeignTeacher(str(root / name), loss="chunk"), **settings)


def train(where, module, methods, rows=ROWS, **settings):
    return tiny.fit(where, module, methods, rows, **{"max_steps": 3, **settings})


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


def test_rewards_and_cross_entropy_run_beside_it(root, tmp_path):
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


def test_a_teacher_that_lacks_most_characters_is_refused(root, tmp_path):
    other = merging(letters="abc")
    other.save_pretrained(tmp_path / "few")
    teacher = ForeignTeacher(str(root / "pairs"), str(tmp_path / "few"))
    rows = [{"prompt": "a", "response": "adddd"}]
    with pytest.raises(
        VocabularyError, match="4 of 6 response tokens of the first 1 rows are no text"
    ):
        train(tmp_path, make(root, teacher), [KD()], rows)


@pytest.mark.parametrize("loss", ["text", "next_byte", "shared_tokens"])
@pytest.mark.parametrize("method", [KD, lambda: GKD(on_policy_fraction=1.0), OKD])
def test_laws_over_texts_train(loss, method, root, tmp_path):
    module = make(root, ForeignTeacher(str(root / "pairs"), loss=loss))
    recorder = train(tmp_path, module, [method()], val=ROWS[:4], data={"val_rollouts": 2})
    assert all(math.isfinite(losses["train/grad_norm"]) for losses in recorder.losses)
    assert recorder.losses[0]["train/loss"] > 0
    plain = train(tmp_path, foreign(root), [method()], max_steps=1)
    assert recorder.losses[0]["train/loss"] != plain.losses[0]["train/loss"]


def test_an_unknown_loss_is_refused(root):
    with pytest.raises(ConfigError, match=r"model\.teacher\.loss is 'uld'; expected one of chunk"):
        ForeignTeacher(str(root / "pairs"), loss="uld")


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


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            lambda: OPDPlus(discount=0.5),
            "has discount 0.5, and with --model.teacher ForeignTeacher",
        ),
        (lambda: KD(seq_kd=True), "has the teacher write responses; give --model.teacher a"),
        (
            lambda: PaperMeasures(),
            "ForeignTeacher generates no responses: give --model.teacher a folder or hub id of a "
            "model with the student's tokenizer, or leave PaperMeasures out",
        ),
    ],
)
def test_methods_that_it_cannot_serve(method, words, root, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(words)):
        train(tmp_path, foreign(root), [method()])


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (
            lambda at: ForeignTeacher(at["teacher"], end_tokens=[1]),
            "model.teacher.end_tokens has nothing to act on: the teacher has the student's",
        ),
        (lambda at: ForeignTeacher(FrozenSelf()), "model is a FrozenSelf"),
        (lambda at: ForeignTeacher(CachedTeacher(at["pairs"], "x")), "model is a CachedTeacher"),
        (
            lambda at: ForeignTeacher(at["pairs"], end_tokens=["?"]),
            "model.teacher.end_tokens holds",
        ),
        (lambda at: ForeignTeacher(tiny.make_llama(1)), "give --model.teacher.tokenizer a folder"),
    ],
)
def test_teachers_that_are_not_offered(teacher, words, root):
    at = {name: str(root / name) for name in ("teacher", "pairs")}
    with pytest.raises(ConfigError, match=re.escape(words)):
        make(root, teacher(at))


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


def test_tools_are_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=r"leave data\.tools out"):
        train(tmp_path, foreign(root), [OPDPlus()], data={"tools": [Calculator()]})


def test_a_third_model_is_refused(root):
    with pytest.raises(ConfigError, match="would be compared with a teacher of another tokenizer"):
        foreign(root).pair.add_teacher_base(str(root / "teacher"), "--method.teacher_base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("of", ["pairs", "teacher"])
def test_diagnose_says_how_both_share_a_text(of, root, tmp_path, monkeypatch, capsys):
    """With the student's own tokenizer it is the ordinary diagnosis."""
    monkeypatch.chdir(tmp_path)
    rows = [f"{a},{b}" for a, b in zip("abcdefgh", ["abc", "cdab", "efe", "kl"] * 2, strict=True)]
    (tmp_path / "rows.csv").write_text("prompt,response\n" + "\n".join(rows))
    words = ["--model.student", str(root / "student"), "--model.teacher", "ForeignTeacher"]
    words += ["--model.teacher.model", str(root / of), "--data.train", "rows.csv"]
    words += ["--data.max_response_length", "6", "--trainer.accelerator", "cpu", "--rows", "8"]
    with unchanged_process():
        assert main(["diagnose", "--method", "KD", "--batches", "3", *words]) == 0
    found = json.loads((tmp_path / "diagnose-out" / "diagnosis.json").read_text())
    if of == "teacher":
        assert found["gradients"]
        return
    given, student = found["shared"]
    shown = capsys.readouterr().out
    with unchanged_process():
        assert main(["diagnose", "--method", "KD", "--skip", "trials", *words]) == 1
    assert "--skip trials: the teacher has another tokenizer" in capsys.readouterr().err
    # abc<eos> is ab c <eos>; cdab: cd ab; efe: ef e; kl: k l
    assert (given["source"], given["tokens"], given["chunks"]) == ("given", 32, 24)
    assert given["teacher_tokens"] == 24
    assert given["one_to_one"] == pytest.approx(16 / 32)
    assert (given["longest"], given["unaligned"], student["source"]) == (2, 0, "student")
    losses = {(one["loss"], one["source"]): one for one in found["losses"]}
    assert {loss for loss, _ in losses} == {"chunk", "text", "next_byte", "shared_tokens"}
    assert all(one["forward_kl"] > 0 < one["reverse_kl"] for one in losses.values())
    off = [losses[name, "given"]["forward_kl"] for name in ("chunk", "text")]
    assert found["biases"][0]["forward_kl"] == pytest.approx(off[0] - off[1])
    assert found["biases"][0]["log_ratio"] > 0
    assert "How both tokenizers share a text" in shown
    assert "text (this run)" in shown
    recorder = train(tmp_path, foreign(root), [KD()], read_rows(rows), max_steps=1, data=ALL)
    assert recorder.losses[0]["train/kd"] == pytest.approx(off[0], rel=1e-5)


def test_rows_without_the_teachers_ids_are_refused(root, tmp_path):
    module = foreign(root)
    module.configure_model()
    recorder = train(tmp_path, make(root, str(root / "teacher")), [KD()], max_steps=1)
    with pytest.raises(ConfigError, match="these rows have no text in its ids"):
        module.measure(recorder.steps[0][0], KD().quantities)


def test_the_advice_about_other_tokenizers_leads_to_training(root, tmp_path, capsys, monkeypatch):
    with pytest.raises(VocabularyError) as error:
        make(root, str(root / "pairs"))
    advice = re.search(
        r"--model\.teacher ForeignTeacher --model\.teacher\.model \S+", str(error.value)
    )
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,response\n" + "\n".join(f"{r['prompt']},{r['response']}" for r in ROWS))
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--method", "KD", "--model.student", str(root / "student"), *advice[0].split()]
    words += ["--data.train", str(rows), "--data.val", str(rows), "--trainer.max_steps", "4"]
    words += [
        "--data.max_response_length",
        "12",
        "--trainer.accelerator",
        "cpu",
        "--data.batch_size",
        "4",
        "--data.val_rollouts",
        "2",
    ]
    with unchanged_process():
        assert main(words) == 0, capsys.readouterr().err
    (run,) = (tmp_path / "runs").rglob("checkpoints")
    assert "val/chunk_forward_kl" in (run.parent / "metrics.csv").read_text()
    words = ["export", "--ckpt_path", str(next(run.glob("*.ckpt"))), "--out", str(tmp_path / "out")]
    with unchanged_process():
        assert main(words) == 0, capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
