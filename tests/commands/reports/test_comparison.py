"""Reports about several methods over several seeds.

* A mean comes with the standard error over seeds; one seed has none.
* A method is called better only where its margin, paired by seed, is beyond Student's t at 95 %;
  more is better for agreement and exact match, less for divergences.
* The table fits 80 columns; the picture has a line per method and a band where there are seeds.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from okd_lightning.commands.reports import (
    Point,
    RunResult,
    comparison_table,
    cost_table,
    plot_comparison,
    reading,
)
from okd_lightning.commands.reports.spread import Spread, difference

KL, AGREEMENT = "val/forward_kl", "val/agreement"
BEFORE = {KL: 1.0, AGREEMENT: 0.5}


def run(method: str, seed: int, kl: float, agreement: float = 0.5) -> RunResult:
    after = {KL: kl, AGREEMENT: agreement}
    history = [Point(5, 50, 1.0 + seed, BEFORE), Point(10, 100, 2.0 + seed, after)]
    return RunResult(method, 2.0 + seed, 10, 100, 0, BEFORE, after, history, seed)


def runs(**by_method: list[float]) -> list[RunResult]:
    return [run(name, seed, kl) for name, kls in by_method.items() for seed, kl in enumerate(kls)]


def test_spread():
    spread = Spread.of([1.0, 2.0, 4.0])
    assert spread.mean == pytest.approx(7 / 3)
    assert spread.error == pytest.approx(statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3))
    assert spread.text() == "2.333±0.882"
    assert Spread.of([1.0]).text() == "1.000"
    assert not Spread.of([1.0]).is_beyond_chance


@pytest.mark.parametrize(
    ("values", "is_beyond"),
    [
        ([1.0, 1.17], True),  # 12.8 errors of two values
        ([1.0, 1.2], False),
        ([1.0, 1.2, 1.4], True),  # 10.4 errors of three
        ([1.0, 2.0, 3.0], False),  # 3.5
        ([1.0, 1.0, 1.0], False),  # the same three times: nothing about chance
        ([1.0, math.inf], False),
        ([0.0, 1.0] * 6, True),  # 3.3 errors of twelve
        ([0.13, *[-0.12, 0.5] * 5, 0.13], False),  # 2.1 of twelve, where a normal would claim it
    ],
)
def test_chance(values, is_beyond):
    assert Spread.of(values).is_beyond_chance == is_beyond


def test_differences_are_paired_by_seed():
    results = [*runs(A=[0.5, 0.7], B=[0.4, 0.6]), run("A", 2, 9.0)]
    found = difference(results, "A", "B", KL)
    assert found.count == 2
    assert found.mean == pytest.approx(0.1)
    assert found.error == pytest.approx(0.0, abs=1e-12)


def test_reading_claims_what_is_beyond_chance():
    said = reading(runs(KD=[0.50, 0.51, 0.52], GKD=[0.60, 0.62, 0.62]))
    assert said.startswith("KD is best on forward KL (by 0.103 ± 0.003)")
    assert "on agreement no method is better by more than chance" in said


def test_reading_claims_nothing_within_chance():
    said = reading(runs(KD=[0.50, 0.60, 0.52], GKD=[0.55, 0.52, 0.62]))
    assert "is best" not in said
    assert "no method is better by more than chance" in said


def test_reading_of_one_seed():
    assert "give --seeds" in reading(runs(KD=[0.5], GKD=[0.1]))
    assert "nothing to compare" in reading(runs(KD=[0.5, 0.4]))


def test_more_is_better_for_agreement():
    results = [
        run(method, seed, 1.0, agreement + step * seed)
        for method, agreement, step in (("KD", 0.6, 0.001), ("GKD", 0.7, 0.002), ("SFT", 0.5, 0))
        for seed in range(3)
    ]
    assert "GKD is best on agreement (by 0.101" in reading(results)


def rendered(table, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(width):
    names = ("exact_match", "forward_kl", "reverse_kl", "on_policy_reverse_kl", "agreement")
    after = {f"val/{name}": 12.3456 for name in names}
    results = [
        RunResult(method, 1.0, 10, 100, 5, after, after, (), seed)
        for method in ("KD", "a_method_with_a_long_name")
        for seed in range(2)
    ]
    lines = rendered(comparison_table(results), width)
    assert max(map(len, lines)) <= width
    assert sum(line.count("12.35±0.00") for line in lines) == 10
    small = [replace(result, after=dict.fromkeys(after, 0.5)) for result in results]
    lines = rendered(comparison_table(small), width)
    assert max(map(len, lines)) <= width
    assert sum(line.count("0.500±0.000") for line in lines) == 10
    assert sum(line.rstrip().endswith("0.500±0.000") for line in lines) == 2
    reason = "okd.errors.DataError: [/x] rows.jsonl: line 3 is no JSON, and so on, to its end"
    costs = rendered(cost_table(results, {"OKD, seed 1": reason}), width)
    assert max(map(len, costs)) <= width
    assert sum("OKD, seed 1" in line and "failed" in line for line in costs) == 1
    assert reason in " ".join(" ".join(costs).split())


def test_picture_has_a_line_a_method_and_a_band(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, path, **k: (drawn.append(figure), save(figure, path, **k))
    )
    plot_comparison(tmp_path / "x.png", [*runs(KD=[0.5, 0.7], GKD=[0.4, 0.6])])
    over_seconds, over_tokens, *_ = drawn[0].axes
    assert len(over_seconds.lines) == len(over_tokens.lines) == 2
    assert over_tokens.lines[0].get_xdata().tolist() == [0, 50, 100]
    assert over_seconds.lines[0].get_xdata().tolist() == [0, 1.5, 2.5]
    assert over_tokens.lines[0].get_ydata().tolist() == pytest.approx([1.0, 1.0, 0.6])
    (band, _) = over_tokens.collections
    low = min(y for path in band.get_paths() for _, y in path.vertices)
    assert low == pytest.approx(0.5 - 0.0, abs=1e-9)  # 0.6 - 0.1, the error of 0.5 and 0.7


def test_picture_under_a_budget_of_cpu_time_is_over_it(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **k: drawn.append(figure))
    given = runs(KD=[0.5, 0.7])
    own = [
        replace(r, history=[replace(p, cpu_seconds=2 * p.seconds) for p in r.history])
        for r in given
    ]
    plot_comparison(tmp_path / "x.png", own, clock="cpu_seconds")
    over_time, *_ = drawn[0].axes
    assert over_time.lines[0].get_xdata().tolist() == [0, 3, 5]
    assert drawn[0].axes[-2].get_xlabel().startswith("CPU seconds")
