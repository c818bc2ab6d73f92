"""Reports of comparisons of runs.

* ``curve_log``: the validations of a run and its cost at each of them.
* ``results``: the record of one run, ``results.json`` and the CSV files.
* ``measures``: the shown measures, and the direction in which each improves.
* ``spread``, ``reading``: means over seeds, and a sentence with the conclusion that they support.
* ``tables``: before and after, methods and costs, and answers side by side, for the terminal.
* ``plots``: learning curves as plots.
"""

from okd_lightning.commands.reports.curve_log import CurveLog
from okd_lightning.commands.reports.plots import plot_comparison, plot_curves
from okd_lightning.commands.reports.reading import reading
from okd_lightning.commands.reports.results import (
    Point,
    RunResult,
    write_metrics_csv,
    write_results,
    write_table_csv,
)
from okd_lightning.commands.reports.tables import (
    Answer,
    answers_table,
    comparison_table,
    cost_table,
    results_table,
)

__all__ = [
    "Answer",
    "CurveLog",
    "Point",
    "RunResult",
    "answers_table",
    "comparison_table",
    "cost_table",
    "plot_comparison",
    "plot_curves",
    "reading",
    "results_table",
    "write_metrics_csv",
    "write_results",
    "write_table_csv",
]
