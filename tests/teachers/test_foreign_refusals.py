"""Refusals of a teacher with another tokenizer, and ``diagnose`` on its pair.

Frozen here: methods, tools and further models that are not offered; rows and teachers that cannot
be aligned; the advice of the error about tokenizers leads to training.
"""

from __future__ import annotations

import json
import re

import pytest
import tiny
from foreign_pairs import ALL, ROWS, foreign, make, read_rows, train
from pair_tokenizers import merging
from process_state import unchanged_process
from transformers import AutoModelForCausalLM

from okd_lightning.__main__ import main
from okd_lightning.callbacks import (
    KD,
    OPDPlus,
    PaperMeasures,
)
from okd_lightning.errors import ConfigError, VocabularyError
from okd_lightning.teachers import CachedTeacher, ForeignTeacher, FrozenSelf
from okd_lightning.tools import Calculator


def test_a_teacher_that_lacks_most_characters_is_refused(root, tmp_path):
    other = merging(letters="abc")
    other.save_pretrained(tmp_path / "few")
    teacher = ForeignTeacher(str(root / "pairs"), str(tmp_path / "few"))
    rows = [{"prompt": "a", "response": "adddd"}]
    with pytest.raises(
        VocabularyError, match="4 of 6 response tokens of the first 1 rows are not text"
    ):
        train(tmp_path, make(root, teacher), [KD()], rows)


def test_an_unknown_loss_is_refused(root):
    with pytest.raises(ConfigError, match=r"model\.teacher\.loss is 'uld'; expected one of chunk"):
        ForeignTeacher(str(root / "pairs"), loss="uld")


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (
            lambda: OPDPlus(discount=0.5),
            "has discount 0.5, and with --model.teacher ForeignTeacher",
        ),
        (lambda: KD(seq_kd=True), "has the teacher generate responses; give --model.teacher a"),
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
            "model.teacher.end_tokens has no effect: the teacher has the student's",
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


def test_tools_are_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=r"leave data\.tools out"):
        train(tmp_path, foreign(root), [OPDPlus()], data={"tools": [Calculator()]})


def test_a_third_model_is_refused(root):
    with pytest.raises(ConfigError, match="would be compared with a teacher of another tokenizer"):
        foreign(root).pair.add_teacher_base(str(root / "teacher"), "--method.teacher_base")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("of", ["pairs", "teacher"])
def test_diagnose_says_how_both_share_a_text(of, root, tmp_path, monkeypatch, capsys):
    """With the student's own tokenizer ``diagnose`` gives the ordinary diagnosis."""
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
    assert "Alignment of both tokenizers" in shown
    assert "text (this run)" in shown
    page = (tmp_path / "diagnose-out" / "diagnosis.html").read_text()
    assert "50% of the student&#39;s tokens are one token of the teacher" in page
    for one in found["losses"]:
        assert f"<td>{one['forward_kl']:.4f}</td>" in page
    assert f"<td>{found['biases'][0]['log_ratio']:.4f}</td>" in page
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
