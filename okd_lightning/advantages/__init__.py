"""Advantages: a detached value for every token that the student sampled.

* ``base``: ``Advantage``, the contract.
* ``checking``: ``as_advantage``, an object, class or name, with its values checked.
* ``f_divergence``: ``FDivergenceAdvantage``, that of any divergence, biased as commonly run and
  corrected (OPD+), with baselines, discount and clipping.
* ``shaping``: ``reward_to_go``.

Pure: nothing here knows models, masks of padding, or Lightning.
"""

from okd_lightning.advantages.base import Advantage
from okd_lightning.advantages.checking import as_advantage
from okd_lightning.advantages.f_divergence import FDivergenceAdvantage, Variant
from okd_lightning.advantages.shaping import reward_to_go

__all__ = ["Advantage", "FDivergenceAdvantage", "Variant", "as_advantage", "reward_to_go"]
