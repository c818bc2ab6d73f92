"""``VLLMEngine``: the real vLLM in this process.

Frozen here: log-probs are the student's own right after its weights have changed, for students with
one table and with two; its settings fail in one line: sleeping on a platform that cannot, and
arguments that vLLM does not have. Sleeping itself needs a GPU.
"""

from __future__ import annotations

import pytest
import served_models
import tiny
import torch

from okd_lightning.engines import NoiseStream, Sampling, VLLMEngine
from okd_lightning.errors import ConfigError
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import PromptBatch, Request

pytestmark = [
    pytest.mark.real_vllm,
    pytest.mark.filterwarnings("default"),  # vLLM's own, in this process
]

VOCABULARY = Vocabulary.of(tiny.make_tokenizer())
PROMPTS = PromptBatch(((3, 4), (5,), (6, 7, 8), (3, 4)), (0, 1, 2, 0), (0, 0, 0, 1))
HAS_GPU = torch.cuda.is_available()
SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_model_len": served_models.LENGTH}


def write(source, student):
    engine = source.engine(student, VOCABULARY, (tiny.EOS,))
    return engine.respond(Request(PROMPTS, Sampling(), NoiseStream(3, 0), 6))


@pytest.mark.parametrize(
    "sleep",
    [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))],
)
@pytest.mark.parametrize("make", [served_models.make_student, served_models.make_tied])
def test_it_samples_from_the_students_weights(make, sleep, vllm_servers):
    vllm_servers.close()  # memory
    student = make().cuda() if HAS_GPU else make()
    source = VLLMEngine(gpu_memory_utilization=0.2, sleep=sleep, **SETTINGS)
    found = []
    for _ in range(3):
        rollout = write(source, student)
        assert rollout.engine_gap < 1e-5
        found.append([response.logprobs for response in rollout])
        with torch.no_grad():
            student.model.embed_tokens.weight *= 1.2
    assert found[0] != found[1] != found[2]


@pytest.mark.skipif(HAS_GPU, reason="vLLM sleeps on a GPU")
def test_sleep_needs_a_gpu(vllm_servers):
    with pytest.raises(ConfigError, match=r"platform \(cpu\); .* --model.engine.sleep false"):
        write(VLLMEngine(**SETTINGS), served_models.make_student())


@pytest.mark.parametrize("unknown", [{"no_such_argument": 1}, {"kv_cache_dtype": "nothing"}])
def test_arguments_that_vllm_does_not_take(unknown, vllm_servers):
    source = VLLMEngine(sleep=HAS_GPU, **SETTINGS, engine_args=unknown)
    with pytest.raises(ConfigError, match=r"does not take its settings: .*engine_args"):
        write(source, served_models.make_student())
