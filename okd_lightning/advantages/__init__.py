"""Advantages: a detached value for every token that the student sampled.

* ``base``: ``Advantage``, the interface.
* ``checking``: ``as_advantage``, an object, class or name, with its values checked.
* ``f_divergence``: ``FDivergenceAdvantage`` of any divergence, as commonly used (biased) and
  corrected (OPD+), with baselines, discount and clipping; ``reward_to_go``.

Pure functions and records: this package imports no models and no Lightning.
"""

from okd_lightning.advantages.base import Advantage
from okd_lightning.advantages.checking import as_advantage
from okd_lightning.advantages.f_divergence import FDivergenceAdvantage, Variant, reward_to_go

__all__ = ["Advantage", "FDivergenceAdvantage", "Variant", "as_advantage", "reward_to_go"]
