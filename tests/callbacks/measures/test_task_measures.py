"""Task measures: AvgAtK, ToolCallScore, TaskScore, and what they share.

* avg@k and pass@k are those of a slow loop that draws every sample alone; pass@k is the mean over
  all subsets of the samples.
* Tool calls: every golden answer of ToolAlpaca matches itself, and none that was changed.
* Any reward function is a measure; answers that it cannot score are left out.
* So is a text metric of torchmetrics, computed from the answers of all batches; others are refused.
* Validation uses the configured number of prompts, test all of them.
* Several numbers of one metric have its given name before their own.
* Two metrics of one name, nothing to score, and numbers out of range are refused.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics

import pytest
import tiny
import torch
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryAccuracy
from torchmetrics.text import CharErrorRate, CHRFScore

from okd_lightning.callbacks import (
    AvgAtK,
    ExactMatch,
    PaperMeasures,
    Reward,
    TaskScore,
    ToolCallScore,
)
from okd_lightning.callbacks.measures.answer_scores import Answers, sampled_prompts
from okd_lightning.callbacks.measures.avg_at_k import pass_at_k
from okd_lightning.commands.cli_arguments import load_config
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.records import Example, PromptBatch, Request
from okd_lightning.records.noise import NoiseDomain
from okd_lightning.rewards import Judge, RougeL, ToolCallMatch

K = 6


def measure(tmp_path, module, callbacks, rows, part="test"):
    data = RolloutDataModule(val=rows, max_response_length=2, val_rollouts=0, seed=7)
    trainer = tiny.make_trainer(tmp_path, callbacks)
    run = trainer.test if part == "test" else trainer.validate
    (found,) = run(module, data, verbose=False)
    return found


def drawn_alone(module, prompt: str, index: int, sample: int, temperature: float) -> str:
    ids = tuple(module.tokenizer(prompt).input_ids)
    batch = PromptBatch(input_ids=(ids,), index=(index,), sample=(sample,))
    noise = NoiseStream(3, NoiseDomain.TASK_MEASURES)
    rollout = module.respond(Request(batch, Sampling(temperature), noise, 2))
    return module.decode(rollout.response_ids[0])


def test_avg_and_pass_at_k_against_a_slow_loop(tmp_path, make_module):
    module = make_module()
    module.configure_model()
    prompts = [row["prompt"] for row in tiny.make_rows(7)]
    texts = [[drawn_alone(module, p, i, s, 0.5) for s in range(K)] for i, p in enumerate(prompts)]
    references = [statistics.mode(row) or "a" for row in texts]
    rows = [{"prompt": p, "response": r} for p, r in zip(prompts, references, strict=True)]
    rights = [[text == r for text in row] for row, r in zip(texts, references, strict=True)]
    callback = AvgAtK(K, temperature=0.5, pass_at=[2, 4, K], seed=3)
    for part, prefix in (("test", "test"), ("validate", "val")):
        found = measure(tmp_path, module, [callback], rows, part)
        shares = [sum(row) / K for row in rights]
        assert 0.1 < statistics.mean(shares) < 0.9
        assert found[f"{prefix}/avg_at_6"] == pytest.approx(statistics.mean(shares))
        for k in (2, 4, 6):
            solved = [
                statistics.mean(any(chosen) for chosen in itertools.combinations(row, k))
                for row in rights
            ]
            assert found[f"{prefix}/pass_at_{k}"] == pytest.approx(statistics.mean(solved))
    others = [
        measure(tmp_path, module, [AvgAtK(K, temperature=0.5, seed=seed)], rows)["test/avg_at_6"]
        for seed in (4, 5, 6)
    ]
    assert len({*others, found["val/avg_at_6"]}) > 1


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_mean_over_all_subsets(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * correct + [False] * (n - correct)
        subsets = list(itertools.combinations(samples, k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, correct, k) == pytest.approx(expected)


def test_samples_of_a_prompt_are_numbered():
    examples = [example(prompt_ids=(3,), index=5), example(prompt_ids=(4, 5), index=8)]
    prompts = sampled_prompts(examples, 3)
    assert [prompt.ids for prompt in prompts] == [(3,)] * 3 + [(4, 5)] * 3
    assert [prompt.index for prompt in prompts] == [5, 5, 5, 8, 8, 8]
    assert [prompt.sample for prompt in prompts] == [0, 1, 2] * 2


def example(response="", index=0, prompt_ids=(3,)):
    return Example(index, prompt_ids, (False,) * len(prompt_ids), (), "p", response)


def scored(callback, pairs):
    """Scores that a callback gives to (response, reference) pairs."""
    examples = [example(reference) for _, reference in pairs]
    return callback.score(Answers(examples, [[[response]] for response, _ in pairs]))


def test_golden_tool_calls(shared_data):
    folder = shared_data / "datasets/toolalpaca"
    files = [folder / f"eval_{kind}.json" for kind in ("simulated", "real")]
    apis = [api for file in files for api in json.loads(file.read_text())]
    golden = [
        [(call["Action"], json.loads(call["Action_Input"])) for call in calls]
        for api in apis
        for calls in api["Golden_Answers"]
        if calls and all(_is_json(call["Action_Input"]) for call in calls)
    ]
    assert len(golden) > 150

    def react(calls):
        return "\n".join(f"Action: {name}\nAction Input: {json.dumps(a)}" for name, a in calls)

    def tagged(calls):
        bodies = [json.dumps({"name": name, "arguments": a}) for name, a in calls]
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)

    def means(change):
        pairs = [(react(change(calls)), tagged(calls)) for calls in golden]
        found = scored(ToolCallScore(), pairs)
        rewarded = ToolCallMatch()([], [p for p, _ in pairs], [r for _, r in pairs])
        assert found["tool_call_match"] == pytest.approx(rewarded)
        return {name.split("_")[1]: statistics.mean(values) for name, values in found.items()}

    assert means(lambda calls: calls) == {"call": 1, "name": 1, "arguments": 1, "calls": 1}
    renamed = means(lambda calls: [(name + "x", a) for name, a in calls])
    assert renamed == {"call": 0, "name": 0, "arguments": 0, "calls": 0}
    changed = means(lambda calls: [(name, {**a, "more": 1}) for name, a in calls])
    assert changed == {"call": 0.5, "name": 1, "arguments": 0, "calls": 0}
    doubled = means(lambda calls: [*calls, *calls])
    assert doubled == {"call": 0.5, "name": 0.5, "arguments": 0.5, "calls": 0}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


def test_rows_that_call_nothing_are_left_out():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    found = scored(ToolCallScore(), [(call, "just words"), (call, call), ("words", call)])
    assert math.isnan(found["tool_call_match"][0])
    assert list(found["tool_call_match"][1:]) == [1, 0]


def test_any_reward_function_is_a_measure(tmp_path, make_module):
    module, rows = make_module(), tiny.make_rows(6)

    def first_letter(prompt, response, reference):
        return math.nan if prompt == rows[0]["prompt"] else float(len(prompt))

    callbacks = [TaskScore(first_letter), TaskScore(first_letter, "own", 3), TaskScore(RougeL())]
    found = measure(tmp_path, module, callbacks, rows)
    lengths = [len(row["prompt"]) for row in rows]
    assert found["test/first_letter"] == pytest.approx(statistics.mean(lengths[1:]))
    assert found["test/own"] == pytest.approx(statistics.mean(lengths[1:3]))
    assert "test/rouge_l" in found
    sentences = [("the cat sat on the mat", "the cat lay on a mat"), ("a", "b")]
    scores = scored(TaskScore(RougeL()), sentences)["rouge_l"]
    assert scores == pytest.approx([2 * 4 / 12, 0])


def test_a_torchmetrics_metric_is_a_measure(tmp_path, make_module):
    rows, answered = tiny.make_rows(6), {}

    def keep(prompt, response, reference):
        answered[prompt] = response, reference
        return 0.0

    given = CHRFScore()
    own = CharErrorRate()
    callbacks = [TaskScore(given), TaskScore(own, "errors"), TaskScore(Two()), TaskScore(keep)]
    module = make_module()
    for part, prefix in (("test", "test"), ("validate", "val"), ("test", "test")):
        found = measure(tmp_path, module, callbacks, rows, part)
        answers, references = zip(*answered.values(), strict=True)
        assert found[f"{prefix}/chrf_score"] == pytest.approx(
            float(CHRFScore()(answers, references))
        )
        assert found[f"{prefix}/errors"] == pytest.approx(
            float(CharErrorRate()(answers, references))
        )
        assert found[f"{prefix}/answers"] == 6
        assert found[f"{prefix}/letters"] == sum(map(len, answers))
    assert given.update_count == 0  # the user's object is left alone


class Two(Metric):
    """A metric of two numbers, which sums over updates."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("answers", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("letters", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, preds, target):
        assert len(preds) == len(target)
        self.answers += len(preds)
        self.letters += sum(map(len, preds))

    def compute(self):
        return {"answers": self.answers, "letters": self.letters}


class Three(Two):
    """A metric with a name of ``Two`` and one of the run."""

    def compute(self):
        return {"letters": self.letters, "jsd": self.answers}


def nothing_wrong(prompt, response, reference):
    return 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: [judge(), judge("Rate {response}")], "both measure judge.*another name"),
        (lambda: [TaskScore(nothing_wrong, "x"), judge(name="x")], "both measure x"),
        (lambda: [TaskScore(nothing_wrong, "jsd")], "would log val/jsd, which every run"),
        (lambda: [TaskScore(Two()), TaskScore(nothing_wrong, "letters")], "both measure letters"),
        (lambda: [TaskScore(Two()), TaskScore(Three())], "both measure letters"),
        (lambda: [TaskScore(Three())], "would log val/jsd"),
    ],
    ids=["judges", "judge and function", "own", "number", "numbers", "number of the run"],
)
def test_two_measures_of_one_name_are_refused(make, words, tmp_path, make_module):
    with pytest.raises(ConfigError, match=words) as caught:
        measure(tmp_path, make_module(), make(), tiny.make_rows(2))
    assert "\n" not in str(caught.value)


def judge(prompt=None, name=None):
    return TaskScore(Judge("http://127.0.0.1:9", prompt=prompt), name)


def test_numbers_of_a_named_metric_have_its_name(tmp_path, make_module):
    callbacks = [TaskScore(Two(), "a"), TaskScore(Three(), "b")]
    found = measure(tmp_path, make_module(), callbacks, tiny.make_rows(4), "validate")
    assert found["val/a/answers"] == found["val/b/jsd"] == 4
    assert found["val/a/letters"] == found["val/b/letters"]


@pytest.mark.parametrize("metric", [MeanMetric, BinaryAccuracy])
def test_a_metric_of_something_else_than_texts_is_refused(metric, tmp_path, make_module):
    with pytest.raises(RewardError, match=rf"metric {metric.__name__} cannot be computed.*CHRF"):
        measure(tmp_path, make_module(), [TaskScore(metric())], tiny.make_rows(4))


def test_a_metric_is_no_reward():
    with pytest.raises(ConfigError, match=r"CHRFScore.*use TaskScore"):
        Reward(CHRFScore())


def test_validation_may_answer_fewer_prompts_than_test(tmp_path, make_module):
    module, rows = make_module(), tiny.make_rows(6)
    asked = []

    def length(prompt, response, reference):
        asked.append(prompt)
        return float(len(prompt))

    lengths = [len(row["prompt"]) for row in rows]
    for limits, num_val, num_test in (
        ({}, 6, 6),
        ({"num_val_prompts": 2}, 2, 6),
        ({"num_prompts": 4}, 4, 4),
        ({"num_prompts": 4, "num_val_prompts": 2}, 2, 4),
    ):
        for part, num in (("validate", num_val), ("test", num_test)):
            asked.clear()
            found = measure(tmp_path, module, [TaskScore(length, **limits)], rows, part)
            assert len(asked) == num
            (value,) = [found[name] for name in found if name.endswith("/length")]
            assert value == pytest.approx(statistics.mean(lengths[:num]))


@pytest.mark.parametrize("name", ["gsm8k", "opsd", "tasks/gsm8k"])
def test_packaged_configs_test_on_all_prompts(name):
    """Validation in a run uses a few prompts, ``test`` the whole set."""
    settings = load_config(name)["trainer"]["callbacks"][0]["init_args"]
    assert settings["num_val_prompts"] < 1319
    assert settings.get("num_prompts") is None


def test_refusals(tmp_path, make_module):
    rows = tiny.make_rows(4)

    def nothing(prompt, response, reference):
        return math.nan

    def broken(prompt, response, reference):
        raise KeyError("x")

    for callbacks, error, words in (
        ([ExactMatch(), ExactMatch("(.)")], ConfigError, "both measure exact_match"),
        ([PaperMeasures(), TaskScore(RougeL())], ConfigError, "both measure rouge_l"),
        ([TaskScore(nothing)], ConfigError, "cannot score a single answer to --data.test"),
        ([ToolCallScore()], ConfigError, "ToolCallScore cannot score a single answer"),
        ([TaskScore(broken)], RewardError, "raised KeyError"),
    ):
        with pytest.raises(error, match=words):
            measure(tmp_path, make_module(), callbacks, rows)
    prompts = [{"prompt": row["prompt"]} for row in rows]
    data = RolloutDataModule(val=prompts, max_response_length=2)
    with pytest.raises(ConfigError, match=r"no row of --data\.val has a response"):
        tiny.make_trainer(tmp_path, [AvgAtK()]).validate(make_module(), data, verbose=False)
    for make, words in (
        (lambda: AvgAtK(0), "k must be at least 1"),
        (lambda: AvgAtK(4, pass_at=[5]), "pass_at must be from 1 to k 4"),
        (lambda: AvgAtK(temperature=0), "temperature must be above 0"),
        (lambda: ExactMatch(num_prompts=0), "num_prompts must be at least 1"),
        (lambda: AvgAtK(num_val_prompts=0), "num_val_prompts must be at least 1, got 0"),
        (lambda: ToolCallScore(2, 3), "num_val_prompts 3 is above num_prompts 2"),
    ):
        with pytest.raises(ConfigError, match=words):
            make()
