"""Checks that a vLLM server has the student's model and weights, and else keeps its own.

Frozen here: a server of another architecture, a quantised one, or one with other log-probabilities
is refused before any weights are sent; after a failed transfer it has its own weights again, or the
error says to restart it; weights of which a part does not arrive are found out while the difference
is far below number formats' tolerance; re-scored responses are logged, and a growing difference is
warned of once; lengths and temperatures that the server does not take are refused before training.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from fake_vllm_server import FakeVLLM, serving

from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.engines.vllm_server import VLLMServer
from okd_lightning.errors import ConfigError, ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import PromptBatch, Request

VOCABULARY = Vocabulary.of(tiny.make_tokenizer())
NOISE, SAMPLING = NoiseStream(3, 0), Sampling()
PROMPTS = PromptBatch(((3, 4), (5,), (6, 7, 8)), (0, 1, 2), (0, 0, 0))


@pytest.fixture
def fake(tmp_path):
    own = tiny.make_llama(9)
    own.save_pretrained(tmp_path / "own")
    with serving(FakeVLLM(own)) as engine:
        engine.root = str(tmp_path / "own")
        yield engine


@pytest.fixture
def generate(fake, tmp_path):
    """Generates with one source after another change of the student."""

    def call(student, source=None, sampling=SAMPLING):
        given = {"sync_folder": str(tmp_path / "weights"), "timeout_seconds": 20.0}
        call.source = source or VLLMServer(fake.url, **given)
        engine = call.source.engine(student, VOCABULARY, (tiny.EOS,))
        return engine.respond(Request(PROMPTS, sampling, NOISE, 6))

    return call


OTHERS = {
    "intermediate_size is": {"intermediate_size": 64},
    "num_hidden_layers is": {"num_hidden_layers": 3},
    "vocab_size is": {"vocab_size": tiny.NUM_IDS + 40},
}


@pytest.mark.parametrize("describes_itself", [True, False], ids=["says", "from its folder"])
@pytest.mark.parametrize("words", OTHERS)
def test_another_architecture_is_refused_before_a_transfer(
    words, describes_itself, fake, generate
) -> None:
    fake.describes_itself = describes_itself
    with pytest.raises(ServerError, match=f"whose {words} .* no weights were sent"):
        generate(tiny.make_llama(1, **OTHERS[words]))
    assert not fake.bodies("/collective_rpc")
    assert fake.version == "default"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("quantization", "fp8", "quantised by fp8"),
        ("logprobs_mode", "raw_logprobs", "start it with --logprobs-mode processed_logprobs"),
    ],
)
def test_what_the_server_says_of_itself_is_read_first(name, value, words, fake, generate):
    setattr(fake, name, value)
    with pytest.raises(ServerError, match=words):
        generate(tiny.make_llama(1))
    assert not fake.bodies("/collective_rpc")


def with_biases():
    """Return a model with further weights that the compared settings do not show."""
    return tiny.make_llama(1, mlp_bias=True)


def test_a_failed_transfer_restores_the_servers_own_weights(fake, generate):
    with pytest.raises(ServerError, match=r"could not take .*own weights, .* are loaded again"):
        generate(with_biases())
    assert not fake.is_wrecked
    assert fake.version == "default"
    generate(tiny.make_llama(1))


def test_a_server_that_cannot_be_restored_has_to_be_restarted(fake, generate):
    fake.root = None
    with pytest.raises(ServerError, match=r"location of its own weights is unknown: restart it"):
        generate(with_biases())
    fake.root = "/nowhere"
    with pytest.raises(ServerError, match=r"'/nowhere', could not be loaded again .*: restart it"):
        generate(with_biases())
    assert fake.version == "okd-updating"


def moved(student, size: float, part: str = ""):
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in student.get_submodule(part).parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return student


def test_a_tied_head_that_stays_old_is_found_out(fake, generate):
    """vLLM on CPU keeps the old head, so that the error grows from zero."""
    student = tiny.make_llama(1, tie_word_embeddings=True)
    student.save_pretrained(fake.root)
    fake.model = fake.answers_with = tiny.make_llama(1, tie_word_embeddings=True)
    fake.stay_old = ("lm_head.weight",)
    rollout = generate(student)
    assert rollout.engine_gap < 1e-5
    moved(student, 2e-3, "model.embed_tokens")
    with pytest.raises(ServerError, match=r"by 0\.0\d+ nats .*which has moved by 0\.\d+ since"):
        generate(student, generate.source)


def test_all_weights_arriving_is_never_refused(fake, generate):
    student = tiny.make_llama(1)
    generate(student)
    for size in (1e-7, 1e-4, 1e-2, 1.0):
        assert generate(moved(student, size), generate.source).engine_gap < 1e-4


def test_float32_has_no_tenth_of_a_nat(fake, generate):
    """The number format that the server reports determines the allowed first difference."""
    student = tiny.make_llama(1)
    fake.model = fake.answers_with = moved(tiny.make_llama(1), 2e-4)
    fake.loads_weights = False
    with pytest.raises(ServerError, match=r"but differs .*at most 0\.01 allowed"):
        generate(student)
    fake.describes_itself, fake.version = False, "default"
    generate(student)


def test_a_growing_difference_of_responses_is_warned_of_once(fake, generate):
    student = tiny.make_llama(1)
    assert generate(student).engine_gap < 1e-5
    fake.model = fake.answers_with = moved(tiny.make_llama(1), 1e-2)  # nobody is told
    with pytest.warns(UserWarning, match=r"and by .* at first \(rollout/engine_gap\)") as warned:
        gaps = [generate(student, generate.source).engine_gap for _ in range(2)]
    assert min(gaps) > 1e-3
    assert len(warned) == 1


def test_greedy_responses_have_nothing_to_compare(generate):
    assert generate(tiny.make_llama(1), sampling=Sampling(temperature=0)).engine_gap is None


def test_lengths_and_temperatures_are_refused_beforehand(fake, generate):
    student = tiny.make_llama(1)
    generate(student)
    fake.max_model_len = 20
    source = VLLMServer(fake.url, "weights")
    source.check_length(20)
    with pytest.raises(ConfigError, match=r"takes 20 tokens .* up to 21: start it with"):
        source.check_length(21)
    for temperature in (2.01, 0.009):
        with pytest.raises(ConfigError, match=r"vLLM samples at 0 \(greedy\) or"):
            source.check_sampling(Sampling(temperature=temperature))
        with pytest.raises(ConfigError, match="vLLM samples at 0"):
            generate(student, generate.source, Sampling(temperature=temperature))
    for temperature in (0.0, 0.01, 2.0):
        source.check_sampling(Sampling(temperature=temperature))


def test_a_response_that_had_no_room_is_an_error(fake, generate):
    student = tiny.make_llama(1)
    generate(student)
    fake.max_model_len = 7  # a limit of 6 passes, prompts with it do not
    with pytest.raises(ServerError, match=r"cut at \d of 6 tokens \(a --max-model-len"):
        generate(student, generate.source)
