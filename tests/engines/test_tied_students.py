"""Students that share one table between embedding and head, on vLLM servers.

Frozen here: a server on a CPU that shares the table too is refused at the first transfer, before
any weights are sent, as it would keep the old head; the error names a copy with two tables, and a
server that is started on it is given two; a server on a GPU is given one; an untied student is not
sent to a server that shares the table.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from fake_vllm_server import FakeVLLM, serving
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from okd_lightning.engines import NoiseStream, Sampling, VLLMServer
from okd_lightning.errors import ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import PromptBatch, Request

VOCABULARY = Vocabulary.of(tiny.make_tokenizer())
PROMPTS = PromptBatch(((3, 4), (5,), (6, 7, 8)), (0, 1, 2), (0, 0, 0))


def make_tied(seed: int = 1):
    return tiny.make_llama(seed, tie_word_embeddings=True)


@pytest.fixture
def serve(tmp_path):
    """A server on ``device`` that was started on ``model``; it keeps what it is handed."""
    handed: list[set[str]] = []

    class Keeping(FakeVLLM):
        def _rpc(self, body):
            folder = Path(body["kwargs"]["weights_path"])
            handed.append(set(load_file(folder / "model.safetensors")))
            return super()._rpc(body)

    def start(model, device):
        fake = Keeping(model)
        model.save_pretrained(tmp_path / "own")
        fake.device, fake.root = device, str(tmp_path / "own")
        fake.handed = handed
        return serving(fake)

    return start


def generate(fake, student, tmp_path):
    engine = VLLMServer(fake.url, str(tmp_path / "weights"))
    return engine.engine(student, VOCABULARY, (tiny.EOS,)).respond(
        Request(PROMPTS, Sampling(), NoiseStream(3, 0), 6)
    )


def test_a_cpu_server_is_refused_with_a_copy_that_it_takes(serve, tmp_path):
    student = make_tied()
    with serve(make_tied(9), "cpu") as fake:
        with pytest.raises(ServerError, match=r"one table between embedding and head") as raised:
            generate(fake, student, tmp_path)
        assert not fake.handed
        assert fake.version == "default"
    found = re.search(r"--model (\S+) --tokenizer (\S+);", str(raised.value))
    copy, tokenizer = Path(found[1]), found[2]
    assert tokenizer == str(tmp_path / "own")
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"] is False
    with serve(AutoModelForCausalLM.from_pretrained(copy), "cpu") as fake:
        for _ in range(2):
            assert generate(fake, student, tmp_path).engine_gap < 1e-5
            with torch.no_grad():
                student.model.embed_tokens.weight *= 1.1
        both = {"lm_head.weight", "model.embed_tokens.weight"}
        assert [both <= names for names in fake.handed] == [True, True]
    assert student.config.tie_word_embeddings
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_gpu_server_is_given_one_table(serve, tmp_path):
    with serve(make_tied(9), "cuda") as fake:
        assert generate(fake, make_tied(), tmp_path).engine_gap < 1e-5
        assert ["lm_head.weight" in names for names in fake.handed] == [False]


def test_an_untied_student_is_not_sent_to_a_tied_server(serve, tmp_path):
    with (
        serve(make_tied(9), "cuda") as fake,
        pytest.raises(ServerError, match="tie_word_embeddings is True where the student's is Fals"),
    ):
        generate(fake, tiny.make_llama(1), tmp_path)
    assert not fake.handed
