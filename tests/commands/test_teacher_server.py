"""``--model.teacher ServedTeacher`` on the command line.

Frozen here: an address is enough, with GKD on on-policy samples; k and the model have
flags of their own; resuming, validating, testing and exporting work without a teacher here; both
the student's and the teacher's servers in one run of two processes, which share them; mistakes end
in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cli_workbench import QUIET, Assets, Result, assert_same_weights, make_tokenizer, metric_names
from fake_vllm_server import FakeVLLM, serving
from forked import type_on_ranks
from transformers import AutoModelForCausalLM

Fit = Callable[..., Result]
LAST = Path("run/checkpoints/last.ckpt")
METHOD = ("--method", "GKD", "--method.on_policy_fraction", "1")


@pytest.fixture
def fake(assets: Assets):
    model = AutoModelForCausalLM.from_pretrained(assets.teacher)
    with serving(FakeVLLM(model, make_tokenizer())) as engine:
        engine.name = "big"
        yield engine


@pytest.mark.parametrize("method", [METHOD, ("--method", "OPDPlus")], ids=["gkd", "opd_plus"])
def test_fit_resume_validate_and_export(fit: Fit, okd: Fit, assets: Assets, fake, method) -> None:
    server = ["--model.teacher", "ServedTeacher", "--model.teacher.url", fake.url]
    command = [*method, "--model.student", assets.student, *server]
    whole = fit(
        command, "--trainer.max_epochs", "2", "--trainer.default_root_dir", "whole", models=False
    )
    assert "teacher: big at http://127.0.0.1" in whole.log
    assert "best-step=" in whole.log
    names = metric_names(Path("whole/metrics.csv"))
    assert {"val/top_k_reverse_kl", "val/on_policy_top_k_forward_kl"} <= names
    assert len({"train/gkd", "train/opd_plus"} & names) == 1
    assert "val/reverse_kl" not in names
    fit(command, "--trainer.max_epochs", "1", models=False)
    resumed = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_epochs", "2")
    assert resumed.status == 0, resumed.err
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))
    tested = okd("test", "--ckpt_path", str(LAST))
    assert tested.status == 0, tested.err
    assert "test/top_k_forward_kl" in tested.out
    assert okd("export", "--ckpt_path", str(LAST), "--out", "out").status == 0
    assert "ServedTeacher" in Path("out/README.md").read_text()


def test_settings_of_its_own(fit: Fit, assets: Assets, fake) -> None:
    flags = ["--model.teacher", "ServedTeacher", "--model.teacher.url", fake.url]
    flags += ["--model.teacher.k", "5", "--model.teacher.model", "big"]
    flags += ["--model.student", assets.student]
    result = fit(METHOD, flags, "--trainer.max_steps", "1", models=False)
    assert "5 ids per token" in result.log
    assert {body["prompt_logprobs"] for body in fake.bodies("/v1/completions")} == {13}
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["model"]["teacher"]["init_args"]["k"] == 5


def test_two_processes_share_both_servers(assets: Assets, fake, here: Path) -> None:
    student = FakeVLLM(AutoModelForCausalLM.from_pretrained(assets.teacher))
    with serving(student):
        engine = ["--model.engine", "VLLMServer", "--model.engine.url", student.url]
        command = [
            *("fit", *METHOD, *assets.data, *QUIET),
            *("--config", "overlays/cpu2", "--model.student", assets.student, *engine),
            *("--model.engine.sync_folder", str(here / "weights"), "--trainer.max_steps", "3"),
            *("--model.teacher", "ServedTeacher", "--model.teacher.url", fake.url),
            *("--trainer.default_root_dir", str(here / "run")),
            *("--trainer.callbacks+=SampleTable", "--trainer.callbacks.num_prompts", "0"),
        ]
        assert "MEMBER: 2/2" in type_on_ranks(command, here)
    assert student.num_reloads == 4  # once a step, and for validation
    written = [b for b in student.bodies("/v1/completions") if "seed" in b]
    assert len({(tuple(b["prompt"]), b["seed"]) for b in written}) == len(written) == 14


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "OKD"], "an online module is trained on a teacher that is run"),
        (["--method", "KD", "--method.temperature", "2"], "with a served teacher: its temperature"),
        (["--method", "KD", "--model.teacher_dtype", "float32"], "leave model.teacher_dtype out"),
        (["--method", "KD", "--model.teacher.k", "0"], "k must be at least 1"),
        (["--method", "KD", "--model.teacher.model", "small"], "serves big, not 'small'"),
        (["--method", "KD", "--model.teacher.url", "nowhere"], "is not an address"),
    ],
)
def test_one_line_for_what_cannot_be(okd: Fit, assets: Assets, fake, flags, words) -> None:
    own = [word.format(teacher=assets.teacher) for word in flags]
    base = ["--model.student", assets.student, "--trainer.accelerator", "cpu"]
    server = ["--model.teacher", "ServedTeacher", "--model.teacher.url", fake.url]
    result = okd("fit", assets.data, base, server, own)
    assert result.status in (1, 2)
    assert words in result.err.splitlines()[-1]
