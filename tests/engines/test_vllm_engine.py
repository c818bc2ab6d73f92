"""The student's responses from vLLM in this process, against a module with vLLM's API.

Frozen here: log-probs are the student's own right after its weights have changed; vLLM sleeps while
the student trains and is given the new weights; awake it is given them where they changed, and
its cache is dropped; without vllm there is one line, as there is for a platform that it cannot
sleep on and for settings that it does not take; raw log-probs and weights that do not arrive are
found out. tests/real_vllm has the real one.
"""

from __future__ import annotations

import gc
import importlib.util
import sys
import tempfile

import pytest
import tiny
import torch
from fake_vllm_module import LLM, make_modules
from safetensors.torch import load_file

from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.engines.vllm_engine import VLLMEngine
from okd_lightning.errors import ConfigError, ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import PromptBatch, Request

VOCABULARY = Vocabulary.of(tiny.make_tokenizer())
PROMPTS = PromptBatch(((3, 4), (5,), (6, 7, 8), (3, 4)), (0, 1, 2, 0), (0, 0, 0, 1))
PLAIN = Sampling()
HAS_VLLM = importlib.util.find_spec("vllm") is not None


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(LLM, "made", [])
    for name, module in make_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return LLM.made


def write(source, model, sampling=PLAIN, max_new_tokens=6, **more):
    engine = source.engine(model, VOCABULARY, (tiny.EOS,))
    return engine.respond(Request(PROMPTS, sampling, NoiseStream(3, 0), max_new_tokens, **more))


def check_own(model, rollout, sampling=PLAIN) -> None:
    for asked, response in zip(PROMPTS, rollout, strict=True):
        prompt, ids, logprobs = asked.ids, response.ids, response.logprobs
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        own = sampling.logprobs(VOCABULARY.cut(logits.double()))
        expected = [float(row[token]) for row, token in zip(own, ids, strict=True)]
        assert logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sleep", [True, False])
def test_it_samples_from_the_students_weights(sleep, fake):
    student, source = tiny.make_llama(1), VLLMEngine(sleep=sleep)
    first = write(source, student)
    check_own(student, first)
    with torch.no_grad():
        student.model.norm.weight *= 1.2
    second = write(source, student)
    check_own(student, second)
    assert [r.logprobs for r in second] != [r.logprobs for r in first]
    told: list[int] = []
    warm = Sampling(temperature=0.5, top_k=4)

    def tell(rows: int, tokens: int) -> None:
        told.append(rows)

    check_own(student, write(source, student, warm, progress=tell), warm)
    assert sum(told) == 4
    (llm,) = fake
    awake = ["reload_weights", "reset_prefix_cache"]
    sleeping = ["sleep", "wake_up ['weights']", "reload_weights", "wake_up ['kv_cache']"]
    if sleep:
        assert llm.calls == ["sleep", *([*sleeping[1:], "reset_prefix_cache", "sleep"] * 2)]
    else:
        assert llm.calls == awake


def test_its_own_temporary_folder_goes_with_it(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = VLLMEngine()
    write(source, tiny.make_llama(1))
    assert list(tmp_path.glob("okd-lightning-vllm-*/model"))
    del source
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_its_settings_reach_vllm(fake, tmp_path):
    source = VLLMEngine(
        gpu_memory_utilization=0.3,
        max_model_len=32,
        enforce_eager=True,
        sync_folder=str(tmp_path / "here"),
        engine_args={"max_num_seqs": 7},
    )
    write(source, tiny.make_llama(1))
    arguments = fake[0].arguments
    assert arguments["gpu_memory_utilization"] == 0.3
    assert arguments["max_model_len"] == 32
    assert arguments["enforce_eager"]
    assert arguments["max_num_seqs"] == 7
    assert arguments["model"] == str(tmp_path / "here" / "model")


def test_raw_logprobs_are_found_out(fake):
    source = VLLMEngine(engine_args={"logprobs_mode": "raw_logprobs"})
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        write(source, tiny.make_llama(1))
    assert fake[0].calls == ["sleep"]


def test_weights_that_do_not_arrive_are_found_out(fake, monkeypatch):
    source, student = VLLMEngine(sleep=False), tiny.make_llama(1)
    write(source, student)
    monkeypatch.setattr(LLM, "collective_rpc", lambda *args, **kwargs: [None])
    other = tiny.make_llama(9)
    for _ in range(2):  # and it stays found out
        with pytest.raises(ServerError, match="but differs from the student"):
            write(source, other)


@pytest.mark.skipif(HAS_VLLM, reason="vllm is installed here")
def test_without_vllm_there_is_one_line():
    with pytest.raises(ConfigError, match=r"needs vllm, .* pip install 'okd-lightning\[vllm\]'"):
        write(VLLMEngine(), tiny.make_llama(1))


@pytest.mark.parametrize(
    ("setting", "words"),
    [({"gpu_memory_utilization": 1.5}, "between 0 and 1"), ({"tolerance": 0}, "above 0")],
)
def test_settings_out_of_range(setting, words):
    with pytest.raises(ConfigError, match=words):
        VLLMEngine(**setting)


def test_a_platform_that_cannot_sleep(fake, monkeypatch):
    for name, module in make_modules("cpu").items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ConfigError, match=r"platform \(cpu\); .* --model.engine.sleep false"):
        write(VLLMEngine(), tiny.make_llama(1))
    student = tiny.make_llama(1)
    check_own(student, write(VLLMEngine(sleep=False), student))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_shared_table_is_handed_over_twice_on_cpus(device, fake, monkeypatch, tmp_path):
    for name, module in make_modules(device).items():
        monkeypatch.setitem(sys.modules, name, module)
    student = tiny.make_llama(1, tie_word_embeddings=True)
    source = VLLMEngine(sleep=False, sync_folder=str(tmp_path))
    check_own(student, write(source, student))
    table = load_file(tmp_path / "model" / "model.safetensors")
    assert ("lm_head.weight" in table) == (device == "cpu")
    assert student.config.tie_word_embeddings
    assert student.lm_head.weight is student.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (ValueError("no such dtype"), ConfigError, r"its settings: no such dtype; .*engine_args"),
        (RuntimeError("Engine core"), ServerError, r"does not start: Engine core; .*memory_util"),
    ],
)
def test_one_line_where_vllm_does_not_start(error, kind, words, fake, monkeypatch):
    def fail(self, **arguments):
        raise error

    monkeypatch.setattr(LLM, "__init__", fail)
    with pytest.raises(kind, match=words):
        write(VLLMEngine(), tiny.make_llama(1))
