"""Metrics of runs.

* ``measures``: divergences, agreement and cross-entropy of validation, as torchmetrics.
* ``gradient_fidelity``: bias and noise of an estimated gradient.
* ``uncertainty``, ``excess_accumulated_error``, ``logit_std``: further measures of the OKD paper.
"""

from okd_lightning.metrics.excess_accumulated_error import (
    ExcessAccumulatedError,
    excess_accumulated_error,
)
from okd_lightning.metrics.gradient_fidelity import (
    GradientFidelity,
    GradientProducts,
    gradient_fidelity,
    variance_trace,
)
from okd_lightning.metrics.logit_std import LogitStd, logit_std
from okd_lightning.metrics.measures import (
    adapted_chunk_measures,
    adapted_measures,
    cached_measures,
    chunk_measures,
    measure_metrics,
    measures,
)
from okd_lightning.metrics.uncertainty import (
    DIFFICULTIES,
    Uncertainty,
    by_difficulty,
    response_uncertainty,
)

__all__ = [
    "DIFFICULTIES",
    "ExcessAccumulatedError",
    "GradientFidelity",
    "GradientProducts",
    "LogitStd",
    "Uncertainty",
    "adapted_chunk_measures",
    "adapted_measures",
    "by_difficulty",
    "cached_measures",
    "chunk_measures",
    "excess_accumulated_error",
    "gradient_fidelity",
    "logit_std",
    "measure_metrics",
    "measures",
    "response_uncertainty",
    "variance_trace",
]
