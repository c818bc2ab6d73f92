"""Locations of a model's files.

Frozen here: what stands as a model's location, and in which order it is read; a revision reaches
config, weights, tokenizer and generation config; a folder may have @ in its name; each way in which
the hub cannot give a model is one line with its remedy; GGUF files are read unpacked, and the
package that reads them is named where it is missing.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch
from huggingface_hub import constants
from quantised_models import write_gguf

from okd_lightning.__main__ import main
from okd_lightning.callbacks import KD
from okd_lightning.errors import ModelError, ModelNotFoundError
from okd_lightning.models import (
    eos_token_ids,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
    max_positions,
)
from okd_lightning.models.sources import Source, locate
from okd_lightning.training.module import DistillationModule

STUDENT = "--model.student"
REVISIONS = {"main": "a" * 40, "v2": "b" * 40, "refs/pr/3": "c" * 40}


def load(source, **settings):
    config = load_model_config(str(source), STUDENT, 0)
    return load_causal_lm(str(source), config, STUDENT, **settings)


@pytest.fixture
def with_gguf(monkeypatch):
    """Pretend that the package gguf is installed; no file is read."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_what_stands_as_a_location(tmp_path, monkeypatch, with_gguf):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a@b").mkdir()
    (tmp_path / "model.Q4.gguf").touch()
    here = str(tmp_path)
    assert locate(f"{here}/a@b", STUDENT) == Source(f"{here}/a@b", f"{here}/a@b")
    assert locate("~/a@b", STUDENT).name == f"{here}/a@b"
    assert locate(f"{here}/model.Q4.gguf", STUDENT).gguf_file == "model.Q4.gguf"
    for given, name, revision, file in (
        ("gpt2", "gpt2", None, None),
        ("gpt2@e7da7f2", "gpt2", "e7da7f2", None),
        ("Qwen/Qwen2.5-0.5B@v1.0", "Qwen/Qwen2.5-0.5B", "v1.0", None),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3", None),
        ("org/name/sub/m.gguf", "org/name", None, "sub/m.gguf"),
        ("org/name/m.gguf@v2", "org/name", "v2", "m.gguf"),
    ):
        assert locate(given, STUDENT) == Source(given, name, revision, file)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "is empty; give a folder"),
        ("./nowhere", "there is no such folder"),
        ("/no/where@v2", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("./m.gguf", "there is no such folder"),
        ("org/name@", "no revision after @; give org/name@"),
        ("FOLDER/model.safetensors", r"is a file; expected a folder.*FOLDER'"),
        ("FOLDER/config.json", "is a file"),
    ],
)
def test_what_does_not(given, message, student_folder):
    given, message = (text.replace("FOLDER", str(student_folder)) for text in (given, message))
    with pytest.raises(ModelNotFoundError, match=f"^{STUDENT} .*{message}"):
        locate(given, STUDENT)


def test_gguf_without_its_package_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match="pip install gguf"):
        load_model_config(str(tmp_path / "m.gguf"), STUDENT, 0)


# ---------------------------------------------------------------- the hub's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The local cache of org/model: each revision has other weights and another end."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--org--model"
    for number, (revision, commit) in enumerate(REVISIONS.items()):
        snapshot = repository / "snapshots" / commit
        model = tiny.make_llama(10 + number, max_position_embeddings=64 + number)
        model.generation_config.eos_token_id = [tiny.EOS, 3 + number]
        model.save_pretrained(snapshot)
        tiny.make_tokenizer("abcdefghijklmnop"[number:]).save_pretrained(snapshot)
        reference = repository / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    return tmp_path


@pytest.mark.parametrize("number", range(3))
def test_a_revision_reaches_config_weights_tokenizer_and_ends(number, cache):
    revision = list(REVISIONS)[number]
    source = "org/model" + (f"@{revision}" if number else "")
    model, tokenizer = load(source), load_tokenizer(source, STUDENT)
    expected = tiny.make_llama(10 + number).state_dict()
    assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())
    assert max_positions(model.config) == 64 + number
    assert len(tokenizer) == tiny.NUM_IDS - number
    assert eos_token_ids(source, tokenizer) == (tiny.EOS, 3 + number)


def test_a_pair_of_one_repositorys_revisions_trains(cache, tmp_path):
    tokenizer = tiny.make_tokenizer()
    with pytest.raises(ModelError, match="tokenizers differ"):
        DistillationModule("org/model", "org/model@v2")
    module = DistillationModule("org/model", "org/model@" + "a" * 40, learning_rate=1e-2)
    assert module.tokenizer.get_vocab() == tokenizer.get_vocab()
    tiny.fit(tmp_path / "run", module, [KD()], tiny.make_rows(8))


@pytest.mark.parametrize(
    ("given", "message"),
    [("org/other", "neither a folder nor in the local cache"), ("org/model@v9", "revision 'v9'")],
)
def test_offline_says_so(given, message, cache):
    for read in (load_tokenizer, lambda *a: load_model_config(*a, 0)):
        with pytest.raises(ModelNotFoundError, match=f"{message}.*HF_HUB_OFFLINE") as caught:
            read(given, STUDENT)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- the hub's answers

ANSWERS = {
    "RepoNotFound": (404, "the hub has no such repository.*hf auth login"),
    "RevisionNotFound": (404, "has no revision 'v9'"),
    "GatedRepo": (403, "is gated; accept its terms at https://huggingface.co/org/model"),
    "EntryNotFound": (404, "holds no such file"),
    "": (503, "that can be reached"),
}


@pytest.fixture(params=ANSWERS)
def answer(request, tmp_path, monkeypatch):
    """A hub on this machine that always answers the same."""
    code = ANSWERS[request.param][0]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(code)
            self.send_header("Content-Length", "0")
            if request.param:
                self.send_header("X-Error-Code", request.param)
                self.send_header("X-Error-Message", "no")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    # transformers keeps a client of the address that it first found
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield request.param
    server.shutdown()
    server.server_close()


def test_each_refusal_of_the_hub_is_one_line(answer, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between tries
    with pytest.raises(ModelNotFoundError, match=ANSWERS[answer][1]) as caught:
        load_model_config("org/model@v9", STUDENT, 0)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- GGUF


@pytest.mark.parametrize("is_quantised", [False, True])
def test_a_gguf_file_is_read_unpacked_and_trains(is_quantised, tmp_path):
    path = tmp_path / "m.gguf"
    model = tiny.make_llama(1)
    write_gguf(path, model, is_quantised)
    loaded, ids = load(path, learns="all"), torch.tensor([[3, 7, 11, 5]])
    difference = (loaded(ids).logits - model(ids).logits).abs().max()
    assert (difference < 1.0) if is_quantised else (difference == 0)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    loaded.save_pretrained(tmp_path / "plain")  # nothing marks it as quantised
    assert torch.equal(load(tmp_path / "plain")(ids).logits, loaded(ids).logits)
    module = DistillationModule(str(path), str(path), learning_rate=1e-2)
    assert module.eos_ids == (tiny.EOS,)
    tiny.fit(tmp_path, module, [KD()], tiny.make_rows(8))


def test_a_student_is_cut_from_a_gguf_file(tmp_path, monkeypatch, capsys):
    path, student = tmp_path / "m.gguf", tmp_path / "student"
    write_gguf(path, tiny.make_llama(1), False)
    words = ["shrink", "--model", str(path), "--drop_layers", "0", "--rows", "2", "--out"]
    assert main([*words, str(student)]) == 0
    loaded = load(student)
    assert loaded.config.num_hidden_layers == 1
    assert torch.equal(loaded.lm_head.weight, tiny.make_llama(1).lm_head.weight)
    assert load_tokenizer(str(student), STUDENT).get_vocab()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*words, str(tmp_path / "other")]) == 1
    assert f"--model '{path}': GGUF files are read with" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_gguf_teacher_of_a_folder_of_the_same_tokens(tmp_path):
    """Padding that llama.cpp gives names to, and ids beyond the table, are not compared."""
    write_gguf(tmp_path / "m.gguf", tiny.make_llama(1), True)
    own = load_tokenizer(str(tmp_path / "m.gguf"), STUDENT)
    tiny.make_llama(2).save_pretrained(tmp_path / "student")
    own.save_pretrained(tmp_path / "student")
    module = DistillationModule(str(tmp_path / "student"), str(tmp_path / "m.gguf"))
    module.configure_model()


def test_broken_gguf_files(tmp_path):
    write_gguf(tmp_path / "layer.gguf", tiny.make_llama(1), True, left_out="blk.1")
    with pytest.raises(ModelError, match=r"9 of 21 weights are missing"):
        load(tmp_path / "layer.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "layer.gguf").read_bytes()[:3000])
    (tmp_path / "text.gguf").write_text("hello")
    for name in ("cut", "text"):
        with pytest.raises(ModelError, match=f"^{STUDENT} .*{name}.gguf': no model can be read"):
            load(tmp_path / f"{name}.gguf")
    with pytest.raises(ModelError, match=r"it holds cut\.gguf: give"):
        load(tmp_path)
