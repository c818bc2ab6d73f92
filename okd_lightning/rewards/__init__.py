"""Rewards: a number for a whole response.

* ``functions``: ``RewardFunction`` and those that compare texts; ``baselined``, group baselines.
* ``reward_model``: a sequence classifier as a reward.
* ``judge``: the score of a language model on a server.
* ``answers``: final answers, compared as text, numbers or mathematics.
* ``math_answers``, ``math_worker``: mathematical equality, in a process with a time limit.
* ``rouge``: ``rouge_l`` of texts in any script.
"""

from okd_lightning.rewards.functions import (
    AnswerMatch,
    GroupBaseline,
    PlainFunction,
    RewardFunction,
    RougeL,
    ScoredRow,
    ToolCallMatch,
    baselined,
    checked_rewards,
)
from okd_lightning.rewards.judge import Judge
from okd_lightning.rewards.reward_model import RewardModel
from okd_lightning.rewards.rouge import rouge_l

__all__ = [
    "AnswerMatch",
    "GroupBaseline",
    "Judge",
    "PlainFunction",
    "RewardFunction",
    "RewardModel",
    "RougeL",
    "ScoredRow",
    "ToolCallMatch",
    "baselined",
    "checked_rewards",
    "rouge_l",
]
