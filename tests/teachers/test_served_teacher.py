"""Runs whose teacher is on a server, against a server that speaks vLLM's protocol.

Frozen here: losses, gradients and weights of the live run with TopK, on dataset responses and on
on-policy samples; at k = vocabulary those of the exact run; teacher prompts; validation's names;
no teacher in memory; what needs the teacher itself is refused; another tokenizer, another model, a
teacher with padding that it gives probability to, logits for log-probs, too few log-probs, dropped
connections, a slow server.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from fake_vllm_server import FakeVLLM, serving

from okd_lightning.callbacks import GKD, KD, OKD, OPD, SFT, OPDPlus, PaperMeasures, Reward
from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, TopK
from okd_lightning.errors import ConfigError, ServerError, ServerTimeoutError, VocabularyError
from okd_lightning.losses import Entropy
from okd_lightning.rewards import AnswerMatch
from okd_lightning.teachers import ServedTeacher


class Curious(KD):
    """Method that needs the teacher's entropy."""

    @property
    def quantities(self):
        return (*super().quantities, Entropy("teacher"))


ROWS, VAL = tiny.make_rows(18), tiny.make_rows(5, seed=2)
ALL = tiny.NUM_IDS


@pytest.fixture(scope="module")
def unpadded(tmp_path_factory, tiny_tokenizer):
    """Return a teacher whose table has no rows beyond the tokenizer."""
    folder = tmp_path_factory.mktemp("unpadded")
    tiny.make_llama(2, ALL).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def fake(tiny_tokenizer):
    with serving(FakeVLLM(double_llama(), tiny_tokenizer)) as engine:
        engine.name = "teacher"
        yield engine


def double_llama():
    """A float64 teacher for the server; JSON carries float64 exactly."""
    return tiny.make_llama(2, ALL).double()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def train(tmp_path, make_module, fake, unpadded):
    """A recorder and the module; from the server where k is given."""

    def run(methods, k=None, rows=ROWS, served=(), **settings):
        torch.manual_seed(5)
        server = None if k is None else ServedTeacher(fake.url, **{"k": k, **dict(served)})
        own = {"optimizer": sgd, "teacher": server or str(unpadded), "dtype": "float64"}
        own.update(settings.pop("model", {}))
        module = make_module(**own)
        return tiny.fit(tmp_path, module, methods, rows, **settings), module

    return run


def check_same(found, expected, tolerance: float = 1e-9) -> None:
    (recorder, module), (live, live_module) = found, expected
    assert len(recorder.losses) == len(live.losses) > 3
    for own, other in zip(recorder.losses, live.losses, strict=True):
        assert own == pytest.approx(other, rel=tolerance, abs=tolerance)
    gradients = zip(recorder.gradients, live.gradients, strict=True)
    assert max(tiny.distance(own, other) for own, other in gradients) < tolerance
    assert tiny.distance(tiny.weights(module), tiny.weights(live_module)) < tolerance


DIVERGENCES = [JensenShannon(0.3), ReverseKL()]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_it_is_the_live_run_with_top_k(divergence, fraction, train):
    def method(of):
        if fraction:
            return [GKD(divergence=of, on_policy_fraction=fraction)]
        return [KD(divergence=of)]

    data = {"batch_size": 2}
    settings = {"accumulate_grad_batches": 2, "data": data}
    live = train(method(TopK(divergence, 5)), **settings)
    found = train(method(divergence), k=5, **settings)
    check_same(found, live)
    assert found[1].teacher is None
    same = train(method(TopK(divergence, 5)), k=8, **settings)
    check_same(same, live)
    exact = train(method(divergence), **settings)
    name = "train/gkd" if fraction else "train/kd"
    assert abs(exact[0].losses[0][name] - live[0].losses[0][name]) > 1e-3


OWN = {
    "reverse KL": lambda: OPD(),
    "stopped forward KL, discounted": lambda: OPD(ForwardKL(), discount=0.9),
    "corrected, clipped": lambda: OPDPlus(JensenShannon(0.3), "centred", max_log_ratio=2.0),
    "through k ids": lambda: OPDPlus(TopK(ReverseKL(), 5), "as_published"),
    "through k ids, baseline": lambda: OPDPlus(TopK(JensenShannon(0.3), 3)),
}


@pytest.mark.filterwarnings("ignore:.*is not its gradient")
@pytest.mark.parametrize("name", OWN)
def test_what_the_student_draws_has_the_advantage_by_the_teacher_itself(name, train):
    """A served teacher and the same model in memory give the same advantage, for any k.

    Ids without a token are an exception: the server reports them among the k + 8 likeliest alone.
    """
    live = train([OWN[name]()])
    check_same(train([OWN[name]()], k=ALL - 8), live)
    check_same(train([OWN[name]()], k=5), live)


def test_a_value_baseline_of_k_ids_is_another_of_the_same_kind(train):
    """With all ids the baseline is the exact mean; with fewer, loss and gradient differ."""
    exact = train([OPDPlus(JensenShannon(0.3))])
    check_same(train([OPDPlus(JensenShannon(0.3))], k=ALL), exact)
    few = train([OPDPlus(JensenShannon(0.3))], k=5)
    assert abs(few[0].losses[0]["train/opd_plus"] / exact[0].losses[0]["train/opd_plus"] - 1) > 1e-3
    name = "train/opd_plus_log_ratio"  # exact as ever
    assert few[0].losses[0][name] == pytest.approx(exact[0].losses[0][name], rel=1e-4)


def test_a_reward_with_it(train):
    methods = [OPDPlus(ReverseKL()), Reward(AnswerMatch(), weight=0.5)]
    check_same(
        train(methods, k=ALL), train([OPDPlus(ReverseKL()), Reward(AnswerMatch(), weight=0.5)])
    )


def test_with_all_ids_it_is_the_exact_run(train):
    check_same(train([KD()], k=ALL + 9), train([KD()]))


def test_teacher_prompts(train):
    data = {"teacher_prompt_template": "ab{prompt}"}
    found = train([KD()], k=ALL, data=data)
    check_same(found, train([KD()], data=data))
    assert (
        abs(found[0].losses[0]["train/kd"] - train([KD()], k=ALL)[0].losses[0]["train/kd"]) > 0.01
    )


def test_validation_takes_bounds_on_both_kinds_of_responses(train):
    settings = {"val": VAL, "data": {"val_rollouts": 3}, "max_steps": 2, "val_check_interval": 1}
    metrics = {}
    for name, k in (("served", ALL), ("live", None)):
        _, module = train([GKD()], k=k, **settings)
        logged = module.trainer.callback_metrics
        metrics[name] = {key: float(value) for key, value in logged.items() if "val/" in key}
    assert metrics["served"].keys() == {
        *("val/cross_entropy", "val/agreement", "val/on_policy_entropy", "val/on_policy_agreement"),
        *(
            f"val/{p}top_k_{n}"
            for p in ("", "on_policy_")
            for n in ("forward_kl", "reverse_kl", "jsd")
        ),
    }
    for name, value in metrics["served"].items():
        assert value == pytest.approx(metrics["live"][name.replace("top_k_", "")], rel=1e-6), name


REFUSED = {
    "asks for Entropy": lambda: [Curious()],
    "an online module is trained on a teacher": lambda: [OKD()],
    "its temperature is 2": lambda: [KD(temperature=2.0)],
    "takes 19 ids, and 5 are known": lambda: [KD(divergence=TopK(ReverseKL(), 20))],
    "PaperMeasures has the teacher generate": lambda: [KD(), PaperMeasures()],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_needs_the_teacher_itself_is_refused(words, train):
    with pytest.raises(ConfigError, match=words):
        train(REFUSED[words](), k=5)


def test_settings_that_do_not_fit(make_module):
    with pytest.raises(ConfigError, match=r"leave model\.teacher_dtype out"):
        make_module(teacher=ServedTeacher("http://x"), teacher_dtype="bfloat16")
    with pytest.raises(ConfigError, match="k must be at least 1"):
        ServedTeacher("http://x", k=0)


# ------------------------------------------------------------------- what goes wrong


def test_another_tokenizer(train, fake):
    fake.tokenizer = tiny.make_tokenizer("bacdefghijklmnop")
    with pytest.raises(VocabularyError, match="cuts text into other ids than the run's tokenizer"):
        train([KD()], k=5)


def test_another_model(train, fake):
    with pytest.raises(ServerError, match=r"serves teacher, not 'other'; .*--model.teacher.model"):
        train([KD()], k=5, served={"model": "other"})


def test_padding_that_has_probability(train, fake):
    fake.model = fake.answers_with = tiny.make_llama(2, tiny.TEACHER_ROWS)
    with pytest.raises(
        VocabularyError, match=r"no token for, with probability [01][.0-9]*, such as"
    ):
        train([KD()], k=5)


def test_padding_without_probability_is_passed_over(train, fake):
    """The padding is among the most likely ids, as the others have almost no probability."""
    exact = train([KD()])
    unpadded = fake.model

    def padded(ids):
        logits = unpadded(ids).logits
        unlikely = logits.logsumexp(-1, keepdim=True) - 18.0
        return SimpleNamespace(logits=torch.cat([logits, unlikely.expand(-1, -1, 8)], dim=-1))

    fake.answers_with = padded
    check_same(train([KD()], k=ALL), exact)


def test_too_few_logprobs(train, fake):
    fake.max_logprobs = 10
    with pytest.raises(ServerError, match=r"--max-logprobs 13.* lower --model.teacher.k"):
        train([KD()], k=5)


def test_the_prompts_own_tokens_are_left_out(train, fake, monkeypatch):
    complete = fake._of_prompt

    def without(body):
        rows = complete(body)
        for row, token in zip(rows[1:], body["prompt"][1:], strict=True):
            row.pop(str(token))
        return rows

    monkeypatch.setattr(fake, "_of_prompt", without)
    with pytest.raises(ServerError, match="has no log-probabilities of the prompt's own tokens"):
        train([KD()], k=5)


def test_logits_are_not_log_probabilities(train, fake, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda self, dim: self, raising=True)
    with pytest.raises(ServerError, match=r"where a log-probability .* is expected"):
        train([SFT(), KD()], k=5, max_steps=1)


def test_dropped_connections_and_a_slow_server(train, fake):
    expected = train([KD()], k=5)
    fake.faults = ["drop", "503", "drop"]
    assert train([KD()], k=5)[0].losses == expected[0].losses
    fake.faults = ["slow"] * 60
    with pytest.raises(ServerTimeoutError, match=r"not answered within 0\.2 seconds"):
        train([KD()], k=5, served={"timeout_seconds": 0.2})
    fake.faults = []


# ---------------------------------------------------------------- several end ids


def merging(module_settings=None):
    return {"end_tokens": [tiny.EOS, tiny.BOS], **(module_settings or {})}


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("name", ["reverse KL", "corrected, clipped"])
def test_a_sampled_end_has_the_advantage_by_the_teacher_itself(name, k, train, fake):
    """An end id that is not among the most likely ids costs a further request."""
    live = train([OWN[name]()], model=merging())
    found = train([OWN[name]()], k=k, model=merging())
    check_same(found, live)
    prompts = [tuple(body["prompt"]) for body in fake.bodies("/v1/completions")]
    ends = {prompt[-1] for prompt in prompts if prompt[-1] in (tiny.EOS, tiny.BOS)}
    assert ends == {tiny.EOS, tiny.BOS}


def test_at_all_ids_it_is_the_exact_run_of_the_merged_outcomes(train):
    live = train([KD(divergence=ReverseKL())], model=merging())
    check_same(train([KD(divergence=ReverseKL())], k=ALL, model=merging()), live)


def test_a_divergence_is_a_lower_bound_and_costs_no_request(train, fake):
    """Ends that are not all known are part of the rest, on both sides."""
    live = train([KD(divergence=ReverseKL())], model=merging())
    fake.requests.clear()
    found = train([KD(divergence=ReverseKL())], k=2, model=merging())
    losses = zip(found[0].losses, live[0].losses, strict=True)
    first, exact = next(losses)
    assert 0 <= first["train/kd"] <= exact["train/kd"] + 1e-9
    sent = [tuple(body["prompt"]) for body in fake.bodies("/v1/completions")]
    assert len(sent) == sum(len(batch) for step in found[0].steps for batch in step)
