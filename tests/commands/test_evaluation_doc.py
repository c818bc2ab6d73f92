"""docs/evaluation.md: its commands run, in order, and its numbers are in the named files.

* ``test`` on another file than the run's own; task measures from the command line.
* A file without the columns is refused with the names that it has.
* ``measures.jsonl`` names the measures and their data.
* The task file and the command for lm-evaluation-harness run on an export, offline.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
from cli_workbench import LENGTHS, QUIET, make_rows, read_metrics, write_jsonl
from forked import type_command

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text()


ADAPTER = "okd_lightning.commands.lm_eval_adapter"


def run_adapter() -> None:
    runpy.run_module(ADAPTER, run_name="__main__")


def commands(word: str) -> list[list[str]]:
    """The commands of the bash block that holds a word."""
    (block,) = [b for b in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) if word in b]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


def question_rows(seed: int) -> list[dict[str, str]]:
    return [
        {"question": row["prompt"], "answer": f"{row['response']} #### {number}"}
        for number, row in enumerate(make_rows(6, seed=seed))
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder for what the first test that asks for ``runs`` has trained."""
    return tmp_path_factory.mktemp("runs") / "made"


@pytest.fixture
def runs(okd, assets, here, made):
    """runs/gsm8k and runs/tools, other.jsonl and toolalpaca.jsonl, as the page supposes."""
    if not made.exists():
        make_runs(okd, assets, here)
        shutil.copytree(here, made)
    shutil.copytree(made, here, dirs_exist_ok=True)
    return here / "runs"


def make_runs(okd, assets, here) -> None:
    write_jsonl(here / "own.jsonl", question_rows(3))
    write_jsonl(here / "other.jsonl", question_rows(4))
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    rows = [{"question": "ab=", "answer": call}]
    write_jsonl(here / "toolalpaca.jsonl", rows)
    columns = ("--data.prompt_column", "question", "--data.response_column", "answer")
    for name in ("gsm8k", "tools"):
        result = okd(
            *("fit", assets.models, LENGTHS, QUIET, columns, "--method", "KD"),
            *("--data.train", "own.jsonl", "--data.val", "own.jsonl", "--trainer.max_steps", "1"),
            *("--trainer.default_root_dir", f"runs/{name}", "--trainer.callbacks+=ExactMatch"),
        )
        assert result.status == 0, result.err


def numbers(out: str) -> dict[str, float]:
    return {name: float(value) for name, value in (line.split() for line in out.splitlines())}


def test_its_commands_and_where_the_numbers_are(runs, okd, here):
    found = []
    for command in [*commands("other.jsonl\n"), *commands("AvgAtK"), *commands("ToolCallScore")]:
        assert command[0] == "okd-lightning"
        result = okd(command[1:])
        assert result.status == 0, result.err
        found.append(numbers(result.out))
    own, other, task, tools = found
    assert own.keys() == other.keys() >= {"test/forward_kl", "test/exact_match"}
    assert own["test/forward_kl"] != other["test/forward_kl"]
    assert task.keys() - own.keys() == {
        *("test/avg_at_4", "test/pass_at_1", "test/pass_at_2", "test/rouge_l")
    }
    assert task["test/avg_at_4"] == task["test/pass_at_1"]
    assert {n for n in tools if "tool" in n} == {
        *("test/tool_call_match", "test/tool_name_match", "test/tool_arguments_match"),
        "test/tool_calls_equal",
    }
    assert not {n for n in tools if "exact_match" in n}
    lines = (runs / "gsm8k" / "measures.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["data"] for entry in entries] == ["own.jsonl", "other.jsonl", "other.jsonl"]
    for entry, printed in zip(entries, found, strict=False):
        assert entry["part"] == "test"
        assert entry["checkpoint"] == "runs/gsm8k/checkpoints/last.ckpt"
        assert entry["measures"] == pytest.approx(printed, rel=1e-5)
    assert float(read_metrics(runs / "gsm8k" / "metrics.csv")[-1]["test/rouge_l"]) >= 0


def test_a_file_without_the_columns_is_refused(runs, okd, here):
    write_jsonl(here / "other.jsonl", [{"prompt": "ab=", "response": "c"}])
    result = okd(commands("other.jsonl\n")[1][1:])
    assert result.status == 1
    assert "other.jsonl: no column 'question', which --data.prompt_column names" in result.err
    assert "found: 'prompt', 'response'" in result.err
    write_jsonl(here / "other.jsonl", [{"question": "ab=", "answer": ""}])
    result = okd(commands("other.jsonl\n")[1][1:])
    assert "no row of --data.test has a response (column 'answer'" in result.err


def test_its_python_runs():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    namespace: dict = {}
    exec(compile(block, "evaluation.md", "exec"), namespace)
    assert namespace["callback"].measured == ("is_short",)


def test_lm_evaluation_harness(runs, okd, here):
    pytest.importorskip("lm_eval")
    (task,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    (here / "tasks").mkdir()
    task = task.replace("max_gen_toks: 256", "max_gen_toks: 8")  # the tiny model's positions
    (here / "tasks" / "gsm8k_local.yaml").write_text(task)
    export, evaluate = commands("lm_eval_adapter")
    assert okd(export[1:]).status == 0
    assert evaluate[:3] == ["python", "-m", ADAPTER]
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(here / "hub")}
    done = type_command(evaluate[3:], here, program=run_adapter, **variables)
    assert done.returncode == 0, done.stderr
    (results,) = (here / "lm-eval").rglob("results_*.json")
    measured = json.loads(results.read_text())
    assert measured["results"]["gsm8k_local"]["exact_match,final-answer"] == 0
    assert measured["n-samples"]["gsm8k_local"]["effective"] == 6
