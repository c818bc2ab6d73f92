"""Rewards and advantages that are broken.

Frozen here: errors of a reward function are handled, counted or refused; an advantage with
a gradient, a wrong shape or values that are not finite is refused where its method is made.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from okd_lightning.advantages import Advantage, FDivergenceAdvantage
from okd_lightning.callbacks import (
    AdvantageCallback,
    OPDPlus,
    Reward,
)
from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.rewards import AnswerMatch, RewardFunction, RougeL


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


class Failing(RewardFunction):
    def __init__(self, result):
        self.result = result

    def __call__(self, prompts, responses, references):
        return self.result(responses)


def raising(responses):
    raise KeyError("price")


BROKEN = {
    "raises": (raising, "reward Failing raised KeyError: 'price'"),
    "wrong length": (lambda r: [0.0], "returned 1 values for 4 responses"),
    "no number": (lambda r: ["good"] * len(r), "returned 'good' for the response"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_reward_functions_that_are_broken(name, tmp_path, make_module):
    result, message = BROKEN[name]
    with pytest.raises(RewardError, match=message):
        tiny.fit(tmp_path, make_module(), [Reward(Failing(result))], tiny.make_rows(8))


def test_responses_without_a_reward_are_counted_and_left_out(tmp_path, make_module):
    some = Failing(lambda r: [math.nan, math.inf] + [1.0] * (len(r) - 2))
    module = make_module(learning_rate=0.0)
    with pytest.warns(UserWarning, match="no finite reward") as warned:
        recorder = tiny.fit(tmp_path, module, [Reward(some)], tiny.make_rows(4), max_epochs=3)
    (warning,) = [w for w in warned if "no finite reward" in str(w.message)]  # of three steps
    assert str(warning.message).startswith("reward: 2 of 4 responses have no finite reward")
    assert len(recorder.steps) == 3
    metrics = recorder.steps[0][0].metrics
    assert metrics["rollout/reward_failures"] == 2
    assert metrics["rollout/reward"] == 1.0
    assert sorted(recorder.steps[0][0].credits["reward"].tolist()) == [0.0, 0.0, 1.0, 1.0]
    strict = Reward(some, on_failure="error")
    with pytest.raises(RewardError, match="not a finite number for the response"):
        tiny.fit(tmp_path, make_module(), [strict], tiny.make_rows(4))


def test_settings_that_are_refused():
    with pytest.raises(ConfigError, match="expected one of none, group_mean, leave_one_out"):
        Reward(length_of, "mean")
    with pytest.raises(ConfigError, match="on_failure is 'ignore'"):
        Reward(length_of, on_failure="ignore")
    with pytest.raises(ConfigError, match="expected a RewardFunction"):
        Reward("length")
    with pytest.raises(ConfigError, match="use OPD for it"):
        OPDPlus(variant="stopped_reward")
    with pytest.raises(ConfigError, match="pattern"):
        AnswerMatch("(unclosed")


class Differentiated(Advantage):
    def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
        return student_logprobs * self.factor

    def __init__(self, factor):
        self.factor = factor


def test_a_advantage_with_a_gradient_is_refused(tmp_path, make_module):
    factor = torch.ones((), requires_grad=True)
    with pytest.raises(ConfigError, match="Differentiated: the advantage carries a gradient"):
        AdvantageCallback(Differentiated(factor), name="own")
    method = AdvantageCallback(Differentiated(factor.detach().clone()), name="own")
    method.advantage.factor.requires_grad_()  # after the check at construction
    with pytest.raises(ConfigError, match=r"own: the advantage carries a gradient.*k1: zero"):
        tiny.fit(tmp_path, make_module(), [method], tiny.make_rows(4))


class Summed(Advantage):
    def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
        return (teacher_logprobs - student_logprobs).sum(-1)


class Floats(Summed):
    def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
        return teacher_logprobs.tolist()


class Unscored(Summed):
    def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
        return teacher_logprobs / 0.0


@pytest.mark.parametrize(
    ("advantage", "words"),
    [
        (Summed(), r"Summed: credit\(\) returned \[2\] for log-probs of shape \[2, 3\]"),
        (Floats(), r"Floats: credit\(\) returned list"),
        (Unscored, "Unscored: it is not finite for an ordinary token"),
        ("Unscored", "Unscored: it is not finite for an ordinary token"),
        ("FDivergence", "advantage is 'FDivergence'; expected an Advantage .*did you mean FDiv"),
        (FDivergenceAdvantage, r"needs arguments: give FDivergenceAdvantage\(divergence=...\)"),
    ],
)
def test_advantages_are_checked_where_a_method_is_made(advantage, words):
    with pytest.raises(ConfigError, match=words):
        AdvantageCallback(advantage)


def test_rewards_may_be_named():
    assert isinstance(Reward("RougeL").function, RougeL)
    assert isinstance(Reward(AnswerMatch).function, AnswerMatch)
    with pytest.raises(ConfigError, match="function is <class 'int'>; expected a RewardFunction"):
        Reward(int)
