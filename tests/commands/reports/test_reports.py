"""Files and tables that a comparison writes.

* ``results.json`` is a list of runs with exactly the documented keys, and holds no history.
* ``metrics.csv`` has a row per validation of every run, step 0 included.
* The table shows the numbers; a right answer is green and a wrong one red.
* The picture has a panel per metric and a line per run, and is a PNG.
"""

import csv
import json

from matplotlib.figure import Figure
from rich.console import Console

from okd_lightning.commands.reports import (
    Answer,
    Point,
    RunResult,
    answers_table,
    plot_curves,
    results_table,
    write_metrics_csv,
    write_results,
)

BEFORE = {"val/exact_match": 0.25, "val/forward_kl": 0.5}
AFTER = {"val/exact_match": 0.75, "val/forward_kl": 0.125}
AT_50, AT_100 = (50, 2000, 4.0), (100, 4000, 10.0)  # steps, tokens, seconds
RUNS = [
    RunResult(
        "SFT", 10.0, 100, 4000, 0, BEFORE, BEFORE, [Point(*AT_50, BEFORE), Point(*AT_100, BEFORE)]
    ),
    RunResult(
        "GKD", 20.0, 100, 4000, 4100, BEFORE, AFTER, [Point(*AT_50, BEFORE), Point(*AT_100, AFTER)]
    ),
]


def test_results_json(tmp_path):
    write_results(tmp_path / "results.json", RUNS)
    records = json.loads((tmp_path / "results.json").read_text())
    assert [record["method"] for record in records] == ["SFT", "GKD"]
    assert records[1] == {
        "method": "GKD",
        "seconds": 20.0,
        "cpu_seconds": 0.0,
        "steps": 100,
        "tokens": 4000,
        "generated_tokens": 4100,
        "before": BEFORE,
        "after": AFTER,
    }


def test_metrics_csv(tmp_path):
    write_metrics_csv(tmp_path / "metrics.csv", RUNS)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["step"]) for row in rows] == [
        *(("SFT", step) for step in ("0", "50", "100")),
        *(("GKD", step) for step in ("0", "50", "100")),
    ]
    assert float(rows[-1]["val/exact_match"]) == 0.75


def rendered(table) -> str:
    console = Console(width=100, force_terminal=True, color_system="standard")
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_results_table_shows_every_number():
    text = rendered(results_table(RUNS))
    for expected in ("0.250", "0.750", "0.125", "after GKD", "20.0", "200", "4,100"):
        assert expected in text


def test_answers_are_coloured_by_right_and_wrong():
    answer = Answer("1+1=", "2", (("teacher", "2"), ("student", "3")))
    text = rendered(answers_table([answer]))
    assert "\x1b[32m2" in text
    assert "\x1b[31m3" in text


def test_picture_draws_every_run(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig

    def keep(figure, path, **kwargs):
        drawn.append(figure)
        save(figure, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    plot_curves(tmp_path / "curve.png", RUNS)
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    exact_match, forward_kl = drawn[0].axes
    assert [line.get_ydata().tolist() for line in exact_match.lines] == [
        [0.25, 0.25, 0.25],
        [0.25, 0.25, 0.75],
    ]
    assert len(forward_kl.lines) == 2
