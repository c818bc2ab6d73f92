"""The student's responses from a vLLM server, against a server that speaks its protocol.

Tests marked ``on_both`` run against a real vLLM too, where there is one (``make test-vllm``).

Frozen here: log-probs are the student's own under the distribution drawn from, right after its
weights have changed; limits a row, stop reasons and ids that no token has; seeds by (seed, epoch,
prompt, sample, tokens before); greedy; the server's weights are those of the student, never stale,
or generation fails; merged adapters are what samples; a dropped connection is repeated, a slow
server, a 500, a wrong model, a server without dev mode, one that reports raw log-probs, and one
that was exchanged in between are errors that say so.
"""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from fake_vllm_server import FakeVLLM, serving
from peft import LoraConfig
from served_models import STUDENT, make_student
from vllm_proxy import ForwardedVLLM, restore

from okd_lightning.endpoint import in_parallel
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.engines.vllm_server import VLLMServer
from okd_lightning.engines.weights import weights_label
from okd_lightning.errors import ConfigError, ServerError, ServerTimeoutError
from okd_lightning.models import Vocabulary, add_adapter, merge_adapters
from okd_lightning.records.requests import Prompt, PromptBatch, Request

VOCABULARY = Vocabulary.of(tiny.make_tokenizer())
NOISE = NoiseStream(3, 0)


on_both = pytest.mark.parametrize(
    "fake", ["fake", pytest.param("real", marks=pytest.mark.real_vllm)], indirect=True
)


@pytest.fixture
def fake(request):
    """The fake server; for tests that are ``on_both`` a real one as well."""
    if getattr(request, "param", "fake") == "fake":
        engine = FakeVLLM(make_student(9))
    else:
        servers = request.getfixturevalue("vllm_servers")
        engine = ForwardedVLLM(servers.url(STUDENT))
        restore(engine.upstream, servers.model_folder(STUDENT))
    with serving(engine):
        yield engine


@pytest.fixture
def student():
    return make_student(1)


@pytest.fixture
def make_engine(fake, tmp_path):
    def make(student, source=None, **settings):
        defaults = {"sync_folder": str(tmp_path / "weights"), "timeout_seconds": 20.0}
        source = source or VLLMServer(fake.url, **{**defaults, **settings})
        return source.engine(student, VOCABULARY, (tiny.EOS,))

    return make


def prompts(num=6, samples=2, **more) -> tuple[Prompt, ...]:
    ids = tuple(tuple(range(3, 4 + i % 5)) for i in range(num) for _ in range(samples))
    index = tuple(i for i in range(num) for _ in range(samples))
    return PromptBatch(ids, index, tuple(range(samples)) * num, **more)


def own_logprobs(model, prompt, response, sampling) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logprobs = sampling.logprobs(VOCABULARY.cut(logits.double()))
    return [float(row[token]) for row, token in zip(logprobs, response, strict=True)]


def check_own(model, batch, rollout, sampling, tolerance=1e-4) -> None:
    for asked, response in zip(batch, rollout, strict=True):
        prompt, ids, logprobs = asked.ids, response.ids, response.logprobs
        expected = own_logprobs(model, prompt, ids, sampling)
        assert logprobs == pytest.approx(expected, abs=tolerance)


def check_same(found, expected) -> None:
    """Compare responses; a real server's log-probs depend on the batch, by rounding."""
    for own, other in zip(found, expected, strict=True):
        assert (own.ids, own.stop_reason) == (other.ids, other.stop_reason)
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-5)


SAMPLINGS = [Sampling(), Sampling(temperature=0.7, top_k=6), Sampling(top_p=0.8)]


@on_both
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
def test_logprobs_are_the_students_own(fake, sampling, student, make_engine):
    batch = prompts()
    rollout = make_engine(student).respond(Request(batch, sampling, NOISE, 8))
    check_own(student, batch, rollout, sampling)
    assert all(i < tiny.NUM_IDS for ids in rollout.response_ids for i in ids)
    assert {"eos", "length"} == {r.stop_reason for r in rollout}
    for ids, reason in ((r.ids, r.stop_reason) for r in rollout):
        assert (ids[-1] == tiny.EOS) == (reason == "eos")
        assert len(ids) == 8 or reason == "eos"


@on_both
def test_new_weights_are_pushed_once(fake, student, make_engine):
    source = make_engine(student).host
    batch = prompts()
    make_engine(student, source).respond(Request(batch, Sampling(), NOISE, 4))
    make_engine(student, source).respond(Request(batch, Sampling(), NOISE, 4))
    assert fake.num_reloads == 1
    first = fake.version
    with torch.no_grad():
        student.lm_head.weight.data[5] += 1e-3  # unseen by autograd
    rollout = make_engine(student, source).respond(Request(batch, Sampling(), NOISE, 4))
    assert fake.num_reloads == 2
    assert fake.version != first
    check_own(student, batch, rollout, Sampling())
    with torch.no_grad():
        student.lm_head.weight[5] -= 1e-3
        student.model.norm.weight *= 1.2
    check_own(
        student,
        batch,
        make_engine(student, source).respond(Request(batch, Sampling(), NOISE, 4)),
        Sampling(),
    )


@on_both
def test_a_new_process_finds_the_weights_there(fake, student, make_engine):
    for _ in range(2):
        make_engine(student).respond(Request(prompts(2), Sampling(), NOISE, 2))
    assert fake.num_reloads == 1


@on_both
def test_processes_take_turns(fake, student, make_engine):
    """Four that write at once with one folder: the first brings the weights."""
    engines = [make_engine(make_student(1)) for _ in range(4)]
    request = Request(prompts(2), Sampling(), NOISE, 2)
    calls = [partial(engine.respond, request) for engine in engines]
    found = in_parallel(calls, 4)
    assert fake.num_reloads == 1
    for rollout in found[1:]:
        check_same(rollout, found[0])


@on_both
def test_limits_of_rows_and_greedy(fake, student, make_engine):
    limits = tuple(1 + i % 4 for i in range(12))
    batch = prompts(limits=limits)
    greedy = Sampling(temperature=0.0)
    rollout = make_engine(student).respond(Request(batch, greedy, NOISE, 3))
    for row, ids in enumerate(rollout.response_ids):
        assert len(ids) <= min(limits[row], 3)
        assert len(ids) == min(limits[row], 3) or rollout[row].stop_reason == "eos"
        assert set(rollout[row].logprobs) == {0.0}
    assert rollout.response_ids[::2] != rollout.response_ids[1::2]  # other limits
    none = make_engine(student).respond(Request(prompts(2, limits=(0,) * 4), greedy, NOISE, 3))
    assert none.response_ids == ((),) * 4
    assert make_engine(student).respond(Request(prompts(0), greedy, NOISE, 3)).response_ids == ()


def test_the_runs_own_ids_alone_end_a_response(fake, student, make_engine):
    engine = make_engine(student).host.engine(student, VOCABULARY, (5, 7))
    rollout = engine.respond(Request(prompts(), Sampling(), NOISE, 12))
    for ids, reason in ((r.ids, r.stop_reason) for r in rollout):
        assert not {5, 7} & set(ids[:-1])
        assert (ids[-1] in (5, 7)) == (reason == "eos")
    inner = {i for ids in rollout.response_ids for i in ids[:-1]}
    assert tiny.EOS in inner  # the model's own, which is none of this run's
    fake.stops_at = [inner.pop()]
    with pytest.raises(ServerError, match="which does not end a response in this run"):
        engine.respond(Request(prompts(), Sampling(), NOISE, 12))


@on_both
def test_seeds_are_by_what_is_sampled(fake, student, make_engine):
    engine = make_engine(student)
    batch = prompts()
    first = engine.respond(Request(batch, Sampling(), NOISE, 6))
    check_same(engine.respond(Request(batch, Sampling(), NOISE, 6)), first)
    other_epoch = engine.respond(Request(batch, Sampling(), NoiseStream(3, 1), 6))
    assert other_epoch.response_ids != first.response_ids
    again = engine.respond(Request(batch[::-1], Sampling(), NOISE, 6))
    assert again.response_ids == first.response_ids[::-1]
    seeds = NOISE.seeds([p.index for p in batch], [p.sample for p in batch])
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**52 for seed in seeds)
    later = NOISE.starting_at({(0, 0): 3}).seeds(
        [p.index for p in batch], [p.sample for p in batch]
    )
    assert [a == b for a, b in zip(seeds, later, strict=True)] == [False] + [True] * 11


def test_adapters_are_merged_for_the_server_alone(fake, student, make_engine):
    add_adapter(student, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]), "test")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=generator)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    rollout = make_engine(student.eval()).respond(Request(prompts(), Sampling(), NOISE, 6))
    after = student.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    check_own(student, prompts(), rollout, Sampling())
    plain = fake.model.model.layers[0].self_attn.q_proj.weight
    base = before["model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert (plain - base).abs().max() > 0.1
    merge_adapters(student)
    torch.testing.assert_close(plain, student.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's
def test_a_shared_table_cannot_be_adapted(make_engine, fake):
    fake.model = fake.answers_with = make_student(9, tie_word_embeddings=True)
    tied = make_student(1, tie_word_embeddings=True)
    add_adapter(tied, LoraConfig(r=2, target_modules=["lm_head"]), "test")
    with pytest.raises(ConfigError, match="shares one table between embedding and head"):
        make_engine(tied).respond(Request(prompts(1), Sampling(), NOISE, 2))
    assert fake.version == "okd-updating"  # and never the student's


def test_tied_students_are_pushed(make_engine, fake):
    fake.model = fake.answers_with = make_student(9, tie_word_embeddings=True)
    tied = make_student(1, tie_word_embeddings=True)
    rollout = make_engine(tied).respond(Request(prompts(), Sampling(), NOISE, 6))
    check_own(tied, prompts(), rollout, Sampling())


@on_both
def test_progress_counts_rows(fake, student, make_engine):
    told: list[int] = []
    make_engine(student).respond(Request(prompts(), Sampling(), NOISE, 2, progress=told.append))
    assert sum(told) == 12


# ------------------------------------------------------------------- what goes wrong


@on_both
def test_dropped_connections_and_a_busy_server_are_repeated(fake, student, make_engine):
    engine = make_engine(student)
    expected = engine.respond(Request(prompts(), Sampling(), NOISE, 4))
    fake.faults = ["drop", "503", "drop"]
    check_same(engine.respond(Request(prompts(), Sampling(), NOISE, 4)), expected)
    assert not fake.faults


def test_a_connection_that_never_comes(student, tmp_path):
    source = VLLMServer("http://127.0.0.1:9", str(tmp_path), num_retries=1)
    with pytest.raises(ServerError, match=r"127.0.0.1:9/.* cannot be reached .* tried 2 times"):
        source.engine(student, VOCABULARY, (1,)).respond(Request(prompts(1), Sampling(), NOISE, 2))


def test_a_slow_server(fake, student, make_engine):
    make_engine(student).respond(Request(prompts(1), Sampling(), NOISE, 2))
    fake.faults = ["slow"] * 50
    with pytest.raises(ServerTimeoutError, match=r"not answered within 0\.2 seconds") as raised:
        make_engine(student, timeout_seconds=0.2).respond(Request(prompts(1), Sampling(), NOISE, 2))
    assert isinstance(raised.value, TimeoutError)
    assert fake.url in str(raised.value)
    fake.faults = []


def test_a_broken_server(fake, student, make_engine):
    engine = make_engine(student)
    engine.respond(Request(prompts(1), Sampling(), NOISE, 2))
    fake.faults = ["500"]
    with pytest.raises(ServerError, match=r"status 500: .*EngineDeadError.* server's log"):
        engine.respond(Request(prompts(), Sampling(), NOISE, 2))


@on_both
def test_a_wrong_model(fake, student, make_engine):
    with pytest.raises(ServerError, match=r"serves student, not 'other'"):
        make_engine(student, model="other").respond(Request(prompts(1), Sampling(), NOISE, 2))


def test_a_server_that_cannot_be_updated(fake, student, make_engine):
    fake.has_dev_mode = False
    with pytest.raises(ServerError, match=r"no /weight_info.*VLLM_SERVER_DEV_MODE=1"):
        make_engine(student).respond(Request(prompts(1), Sampling(), NOISE, 2))
    assert not fake.bodies("/v1/completions")


def test_weights_that_have_not_arrived(fake, student, make_engine):
    """The name is right and the weights are not."""
    fake.loads_weights = False
    with pytest.raises(ServerError, match=r"but differs from the student by .* nats"):
        make_engine(student).respond(Request(prompts(1), Sampling(), NOISE, 2))


def test_an_old_version_is_updated_and_never_sampled_from(fake, student, make_engine):
    source = make_engine(student).host
    make_engine(student, source).respond(Request(prompts(1), Sampling(), NOISE, 2))
    fake.model = fake.answers_with = make_student(9)  # restarted
    fake.version = "default"
    rollout = make_engine(student, source).respond(Request(prompts(), Sampling(), NOISE, 4))
    check_own(student, prompts(), rollout, Sampling())

    def restart():
        fake.version = "default"

    fake.after_completion = restart
    with pytest.raises(ServerError, match="has default now: it was restarted"):
        make_engine(student, source).respond(Request(prompts(), Sampling(), NOISE, 4))


def test_a_server_that_reports_raw_logprobs(fake, student, make_engine):
    fake.logprobs_mode = "raw_logprobs"
    with pytest.raises(ServerError, match="--logprobs-mode processed_logprobs"):
        make_engine(student).respond(Request(prompts(1), Sampling(), NOISE, 2))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"url": "localhost:8000"}, "is not an address"),
        ({"concurrency": 0}, "concurrency must be above 0"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0"),
        ({"num_retries": -1}, "num_retries must be at least 0"),
    ],
)
def test_settings_out_of_range(setting, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        VLLMServer(**{"url": "http://x", "sync_folder": str(tmp_path), **setting})


def test_labels_tell_weights_apart(student):
    first = weights_label(student)
    assert weights_label(make_student(1)) == first
    student.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1e-7
    assert weights_label(student) != first
    assert weights_label(make_student(1).bfloat16()) != first
