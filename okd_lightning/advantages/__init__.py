"""What policy gradient maximises: a detached credit for every token that the student drew.

Map:

- ``base``: ``Advantage``, the contract.
- ``checking``: ``as_advantage``, an object, class or name, with its credit checked.
- ``f_divergence``: ``FDivergenceAdvantage``, the credit of any divergence of the library, biased as
  commonly run and corrected (OPD+), with baselines, discount and clipping.
- ``shaping``: ``reward_to_go``.
- ``rewards``: ``RewardFunction`` and the ones that are included; ``baselined``, group baselines.
- ``rouge``: ``rouge_l`` of texts in any script.

Pure: nothing here knows models, masks of padding, or Lightning.
"""

from okd_lightning.advantages.base import Advantage
from okd_lightning.advantages.checking import as_advantage
from okd_lightning.advantages.f_divergence import FDivergenceAdvantage, Variant
from okd_lightning.advantages.rewards import (
    AnswerMatch,
    GroupBaseline,
    PlainFunction,
    RewardFunction,
    RougeL,
    ToolCallMatch,
    baselined,
    checked_rewards,
)
from okd_lightning.advantages.rouge import rouge_l
from okd_lightning.advantages.shaping import reward_to_go

__all__ = [
    "Advantage",
    "AnswerMatch",
    "FDivergenceAdvantage",
    "GroupBaseline",
    "PlainFunction",
    "RewardFunction",
    "RougeL",
    "ToolCallMatch",
    "Variant",
    "as_advantage",
    "baselined",
    "checked_rewards",
    "reward_to_go",
    "rouge_l",
]
