"""Metrics: what a run is judged by.

* ``measures``: divergences, agreement and cross-entropy of validation, as torchmetrics.
* ``exact_match``: answers against references, as text.
"""

from okd_lightning.metrics.exact_match import final_answer, matches
from okd_lightning.metrics.measures import adapted_measures, measure_metrics, measures

__all__ = ["adapted_measures", "final_answer", "matches", "measure_metrics", "measures"]
