"""Reports: what a comparison of runs leaves behind.

* ``results``: the record of one run, and ``results.json``.
* ``tables``: before and after, and answers side by side, for the terminal.
* ``plots``: the learning curve as a picture.
"""

from okd_lightning.reports.plots import plot_curves
from okd_lightning.reports.results import RunResult, write_metrics_csv, write_results
from okd_lightning.reports.tables import Answer, answers_table, results_table

__all__ = [
    "Answer",
    "RunResult",
    "answers_table",
    "plot_curves",
    "results_table",
    "write_metrics_csv",
    "write_results",
]
