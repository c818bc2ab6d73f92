"""Rewards: a number for a whole response.

* ``functions``: ``RewardFunction`` and the included ones; ``baselined``, group baselines.
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
    ToolCallMatch,
    baselined,
    checked_rewards,
)
from okd_lightning.rewards.rouge import rouge_l

__all__ = [
    "AnswerMatch",
    "GroupBaseline",
    "PlainFunction",
    "RewardFunction",
    "RougeL",
    "ToolCallMatch",
    "baselined",
    "checked_rewards",
    "rouge_l",
]
