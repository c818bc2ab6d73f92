"""A teacher with another tokenizer on a server: ForeignTeacher over a ServedTeacher.

Frozen here: losses, weights and validation of the same teacher in memory with ``loss: chunk``, on
dataset responses and on samples, with one end id and with two; rows beyond the server's context
carry loss up to it; what needs all logits, a temperature or a teacher that learns is refused by
name; a server with another tokenizer, or none; the advice of a refusal leads to training;
``diagnose`` measures what is known.
"""

from __future__ import annotations

import json
import re

import pytest
import tiny
from fake_vllm_server import FakeVLLM, serving
from foreign_pairs import ROWS, make, train
from lightning.pytorch.callbacks import Callback
from process_state import unchanged_process
from transformers import AutoModelForCausalLM, AutoTokenizer

from okd_lightning.__main__ import main
from okd_lightning.callbacks import GKD, KD, OKD, OPD, SFT, OPDPlus, PaperMeasures
from okd_lightning.divergences import ForwardKL, JensenShannon, TopK
from okd_lightning.errors import ConfigError, ServerError, VocabularyError
from okd_lightning.teachers import ForeignTeacher, ServedTeacher

VAL = tiny.make_rows(4, seed=2)


@pytest.fixture
def server(root):
    model = AutoModelForCausalLM.from_pretrained(root / "pairs").double()
    with serving(FakeVLLM(model, AutoTokenizer.from_pretrained(root / "pairs"))) as engine:
        engine.name = "teacher"
        yield engine


class Validations(Callback):
    """Callback that keeps the last validation's measures."""

    def on_validation_end(self, trainer, pl_module):
        found = trainer.callback_metrics.items()
        self.last = {name: float(value) for name, value in found if name.startswith("val/")}


def teacher_of(server, root, tokenizer="pairs", **settings) -> ForeignTeacher:
    return ForeignTeacher(ServedTeacher(server.url, k=4), str(root / tokenizer), **settings)


@pytest.mark.parametrize("ends", [None, ["<eos>", "<pad>"]])
@pytest.mark.parametrize(
    "method",
    [
        lambda: KD(),
        lambda: KD(JensenShannon(), cross_entropy_weight=0.5),
        lambda: GKD(on_policy_fraction=1.0),
        lambda: OPD(),
        lambda: OPDPlus(ForwardKL(), discount=1.0),
    ],
)
def test_a_run_is_that_of_the_teacher_in_memory(method, ends, root, tmp_path, server):
    held = ForeignTeacher(str(root / "pairs"), loss="chunk", end_tokens=ends)
    found = []
    for teacher in (held, teacher_of(server, root, end_tokens=ends)):
        module = make(root, teacher)
        assert teacher.mark == "ForeignTeacher (chunk)"
        settings = {"val": VAL, "data": {"val_rollouts": 1}, "limit_val_batches": 1}
        watch = Validations()
        recorder = train(tmp_path, module, [method(), watch], max_steps=2, **settings)
        found.append((recorder, watch, tiny.weights(module)))
    (live, watched, expected), (served, watch, weights) = found
    assert tiny.distance(weights, expected) < 1e-9
    for name, value in live.losses[-1].items():
        if name.startswith("train/"):
            assert served.losses[-1][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert any("on_policy_chunk" in name for name in watch.last)
    for name, value in watch.last.items():
        assert value == pytest.approx(watched.last[name], rel=1e-6), name


def test_rows_carry_loss_up_to_the_servers_context(root, tmp_path, server):
    rows = [{"prompt": "a", "response": "abcdefabcd"}]
    server.max_model_len = 6
    module = make(root, teacher_of(server, root))
    data = {"batch_size": 1, "max_response_length": 12}
    recorder = train(tmp_path, module, [KD()], rows, max_steps=1, data=data)
    (batch,) = recorder.steps[0]
    # the server reads 5 tokens and generates one: the prompt's, and ab cd ef ab
    assert batch.teacher_reads.lengths.tolist() == [5]
    assert int(batch.mask.sum()) == 8
    assert max(len(body["prompt"]) for body in server.bodies("/v1/completions")) == 5


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (lambda: KD(temperature=2.0), "softmax temperature 2, and ServedTeacher gives"),
        (lambda: OKD(), "an online module is trained on a teacher that is run in this process"),
        (lambda: KD(seq_kd=True), "has the teacher generate responses; give --model.teacher a"),
        (lambda: OPDPlus(discount=0.5), "has discount 0.5"),
        (lambda: KD(TopK(ForwardKL(), 3)), "TopK is over single tokens"),
        (lambda: PaperMeasures(), "or leave PaperMeasures out"),
    ],
)
def test_methods_that_need_more_are_refused_before_training(method, words, root, tmp_path, server):
    with pytest.raises(ConfigError, match=re.escape(words)):
        train(tmp_path, make(root, teacher_of(server, root)), [method()])
    assert not server.bodies("/v1/completions")


@pytest.mark.parametrize("loss", ["text", "next_byte", "shared_tokens"])
def test_losses_over_all_logits_are_refused(loss, root, tmp_path, server):
    with pytest.raises(ConfigError, match=rf"loss {loss} needs all logits.*give loss chunk, or"):
        teacher_of(server, root, loss=loss)


def test_without_its_tokenizer_it_is_refused(root, tmp_path):
    with pytest.raises(ConfigError, match=r"give --model\.teacher\.tokenizer a folder or hub id"):
        make(root, ForeignTeacher(ServedTeacher("http://localhost:1")))


def test_a_server_with_another_tokenizer_is_refused(root, tmp_path, server):
    with pytest.raises(VocabularyError, match="cuts text into other ids than"):
        train(tmp_path, make(root, teacher_of(server, root, "other")), [KD()])


def test_a_server_that_is_down_is_an_error(root, tmp_path):
    dead = ForeignTeacher(ServedTeacher("http://127.0.0.1:9", num_retries=0), str(root / "pairs"))
    with pytest.raises(ServerError, match=r"--model\.teacher\.model\.url"):
        train(tmp_path, make(root, dead), [KD()])


def test_with_the_students_tokenizer_it_is_the_plain_served_teacher(root, server):
    module = make(root, teacher_of(server, root, "student"))
    assert isinstance(module.pair.given_teacher, ServedTeacher)


@pytest.mark.filterwarnings("ignore")
def test_commands(root, tmp_path, server, monkeypatch, capsys):
    """The refusal's advice trains; a checkpoint is validated; ``diagnose`` knows one loss."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{row['prompt']},{row['response']}" for row in ROWS]
    (tmp_path / "rows.csv").write_text("prompt,response\n" + "\n".join(lines))
    words = ["--model.student", str(root / "student"), "--data.max_response_length", "6"]
    words += ["--data.train", "rows.csv", "--data.val", "rows.csv", "--data.val_rollouts", "1"]
    words += ["--trainer.accelerator", "cpu", "--model.teacher", "ForeignTeacher"]
    words += ["--model.teacher.model", "ServedTeacher", "--model.teacher.model.url", server.url]
    words += ["--model.teacher.tokenizer", str(root / "pairs")]
    run = ["--trainer.max_steps", "2", "--data.batch_size", "4"]
    with unchanged_process():
        assert main(["fit", "--method", "KD", *words, *run, "--model.teacher.loss", "text"]) == 1
    error = capsys.readouterr().err.strip()
    assert "loss text needs all logits" in error.splitlines()[-1]
    with unchanged_process():
        assert main(["fit", "--method", "KD", *words, *run, "--model.teacher.loss", "chunk"]) == 0
    (where,) = (tmp_path / "runs").rglob("checkpoints")
    header = (where.parent / "metrics.csv").read_text().splitlines()[0]
    assert "val/on_policy_chunk_reverse_kl" in header
    assert "val/teacher_cross_entropy" not in header
    last = str(next(where.glob("*.ckpt")))
    with unchanged_process():
        assert main(["validate", "--ckpt_path", last]) == 0, capsys.readouterr().err
    with unchanged_process():
        assert main(["diagnose", "--method", "OPDPlus", *words, "--rows", "4"]) == 0
    found = json.loads((tmp_path / "diagnose-out" / "diagnosis.json").read_text())
    assert {one["loss"] for one in found["losses"]} == {"chunk"}
    assert found["biases"] == []
    page = (tmp_path / "diagnose-out" / "diagnosis.html").read_text()
    assert "so that no bias is known" in page
    assert "next_byte (this run)" not in page
    assert "no bias is known" in capsys.readouterr().out


def test_terms_without_the_teacher_run_with_it(root, tmp_path, server):
    recorder = train(tmp_path, make(root, teacher_of(server, root)), [KD(), SFT()], max_steps=1)
    assert recorder.losses[0]["train/sft"] > 0
