"""The stages of a diagnosis: what ``--skip`` leaves out, expected time, and progress.

* A skipped stage leaves empty findings, on the page and in the terminal too; all of them together
  need no rollouts. A name that is no stage is one line that lists them.
* Progress is said at most every ten seconds, with the time left at the stage's pace.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from cli_workbench import QUIET

from okd_lightning.commands.diagnose.expected_time import Costs, Plan
from okd_lightning.commands.diagnose.stages import (
    Stages,
    duration,
    expectation,
    followed,
    skipped_stages,
)
from okd_lightning.errors import UsageError

SMALL = ["--rows", "4", "--batches", "3"]


@pytest.fixture
def diagnose(okd, assets):
    def type_diagnose(*argv):
        base = [*assets.models, *assets.data, *QUIET, *SMALL]
        return okd("diagnose", base, "--out", "out", *argv)

    return type_diagnose


def test_skipped_stages_leave_empty_findings(diagnose):
    said = diagnose("--skip", "gradients,trials,steps")
    assert said.status == 0, said.err
    record = json.loads(Path("out/diagnosis.json").read_text())
    assert record["skipped"] == ["gradients", "steps", "trials"]
    assert record["stage_seconds"].keys() == {"responses", "divergences"}
    assert (record["trials"], record["drift"], record["gradients"]["estimators"]) == ([], [], [])
    page = Path("out/diagnosis.html").read_text()
    assert page.count("<svg") == 3
    assert "along exact" not in page + said.out
    assert "left out: gradients, steps, trials" in page


def test_one_stage_alone_is_left_out(diagnose):
    said = diagnose("--skip", "gradients")
    assert said.status == 0, said.err
    record = json.loads(Path("out/diagnosis.json").read_text())
    stages = ["responses", "divergences", "rollouts", "steps", "trials"]
    assert list(record["stage_seconds"]) == stages
    assert record["trials"]
    assert not record["gradients"]["estimators"]
    assert "expected time: about" in said.out
    lines = [line.split(":")[0] for line in said.out.splitlines() if ": " in line]
    assert [line for line in lines if line in stages] == stages


def test_a_name_that_is_no_stage(diagnose):
    said = diagnose("--skip", "responses")
    assert said.status == 2
    assert "--skip responses: expected one or more of: gradients (bias" in said.err
    with pytest.raises(UsageError, match="--skip trial: expected"):
        skipped_stages("gradients, trial")
    assert skipped_stages(None) == skipped_stages("") == frozenset()


@pytest.mark.parametrize(
    ("skipped", "num"),
    [((), 16), (("gradients",), 16), (("gradients", "trials"), 5), (("steps", "trials"), 16)],
)
def test_rollouts_are_those_that_some_stage_needs(skipped, num):
    assert Plan(64, 16, 8, 4, frozenset(skipped)).num_rollouts == num
    assert Plan(64, 16, 8, 4, frozenset({"gradients", "trials", "steps"})).num_rollouts == 0


COSTS = Costs(own=1.0, teachers=2.0, forward=1.0, step=3.0, has_answers=True)


def test_rows_and_batches_are_lowered_alike_until_the_time_is_enough():
    plan = Plan(64, 16, 8, 4, frozenset())
    whole = sum(COSTS.of(plan).values())
    assert plan.at_most(whole, COSTS) == plan
    half = plan.at_most(whole / 2, COSTS)
    assert sum(COSTS.of(half).values()) <= whole / 2
    more = replace(half, rows=half.rows + 4, batches=half.batches + 1)
    assert sum(COSTS.of(more).values()) > whole / 2
    assert half.rows / 64 == pytest.approx(half.batches / 16, abs=1 / 16)


def test_there_are_at_least_eight_rows_and_three_batches():
    least = Plan(64, 16, 8, 4, frozenset()).at_most(1.0, COSTS)
    assert (least.rows, least.batches) == (8, 3)
    assert Plan(5, 3, 8, 4, frozenset()).at_most(1.0, COSTS) == Plan(5, 3, 8, 4, frozenset())


def test_few_minutes_make_a_small_diagnosis(diagnose, assets):
    Path("more.jsonl").write_text(Path(assets.val).read_text() * 3)
    words = ["--data.val", "more.jsonl", "--rows", "12", "--batches", "4"]
    said = diagnose(*words, "--minutes", "1e-4", "--skip", "gradients")
    assert said.status == 0, said.err
    lowered = "--minutes 0.0001: 8 rows and 3 batches; 12 and 4 would take"
    assert lowered in " ".join(said.out.split())
    record = json.loads(Path("out/diagnosis.json").read_text())
    assert {rows["rows"] for rows in record["rows"]} == {8}
    assert {trial["steps"] for trial in record["trials"]} == {3}


def test_minutes_are_a_positive_number(diagnose):
    said = diagnose("--minutes", "0")
    assert (said.status, said.err.count("\n")) == (2, 1)
    assert "--minutes 0: expected a positive number" in said.err


def test_progress_is_said_every_ten_seconds():
    now, said = [0.0], []
    stages = Stages(said.append, lambda: now[0])
    with stages.run("trials", "3 steps") as progress:
        for number in followed(range(4), 4, progress):
            now[0] += 6.0
            assert number < 4
        now[0] += 10.0
        progress(1, 4, of=(1, 2))
    assert said == [
        "trials: 3 steps",
        "trials: 50%, about 12 s left",
        "trials: 62%, about 20 s left",
    ]
    assert stages.seconds == {"trials": 34.0}


def test_the_expected_time_names_the_longest_stage_that_can_be_skipped():
    assert duration(0.2) == "1 s"
    assert duration(89) == "89 s"
    assert duration(200) == "3 min"
    said = expectation({"responses": 200.0, "trials": 100.0, "gradients": 150.0})
    assert said.startswith(
        "expected time: about 8 min (responses 3 min, gradients 2 min, trials 2 min); --skip grad"
    )
    assert expectation({"trials": 5.0}) == "expected time: about 5 s"
