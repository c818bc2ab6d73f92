"""Whole runs whose student writes on a vLLM server, against a server that speaks its protocol.

Frozen here: GKD and OPD+ train through the command line, every rollout has the log-probs of the
student as it was when it was written, which are those of the first optimizer step; a run that was
cut within a chunk goes on with the stored responses, to the same weights; tools and LoRA students
work; a server that fails ends the run in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_workbench import Assets, Result, assert_same_weights, metric_names
from fake_vllm_server import FakeVLLM, serving
from transformers import AutoModelForCausalLM

from okd_lightning.module import DistillationModule

Fit = Callable[..., Result]
LAST = Path("run/checkpoints/last.ckpt")


@pytest.fixture
def fake(assets: Assets):
    # other weights than the student's: nothing is right before they have been pushed
    with serving(FakeVLLM(AutoModelForCausalLM.from_pretrained(assets.teacher))) as engine:
        yield engine


@pytest.fixture
def flags(fake: FakeVLLM) -> list[str]:
    engine = ["--model.engine", "VLLMServer", "--model.engine.url", fake.url]
    return [*engine, "--model.engine.sync_folder", "weights"]


@pytest.fixture
def gaps(monkeypatch) -> list[float]:
    """How far each rollout's log-probs are from the student's own, right after it was written."""
    found: list[float] = []
    original = DistillationModule.write

    def write(self, author, prompts, *args, **kwargs):
        rollout = original(self, author, prompts, *args, **kwargs)
        rows = zip(prompts.input_ids, rollout.response_ids, rollout.logprobs, strict=True)
        for prompt, ids, logprobs in rows if author == "student" else ():
            read = torch.tensor([[*prompt, *ids]], device=self.device)
            was_training = self.student.training
            with torch.no_grad():
                logits = self.student.eval()(read).logits[0, len(prompt) - 1 : -1]
            self.student.train(was_training)
            own = logits.log_softmax(-1).gather(-1, read[0, len(prompt) :, None])[:, 0]
            found.append(float((own - torch.tensor(logprobs)).abs().max()))
        return rollout

    monkeypatch.setattr(DistillationModule, "write", write)
    return found


GKD = ("--method", "GKD", "--method.on_policy_fraction", "1")
VALIDATES = ("--trainer.val_check_interval", "3")


@pytest.mark.parametrize("method", [GKD, ("--method", "OPDPlus")], ids=lambda words: words[1])
def test_methods_train_on_what_the_server_writes(method, fit: Fit, fake, flags, gaps) -> None:
    steps = ["--trainer.max_steps", "3", "--model.learning_rate", "1e-1"]
    fit(method, flags, steps, VALIDATES)
    assert len(gaps) == 8  # three steps of two rows, and validation's two
    assert max(gaps) < 1e-4
    assert fake.num_reloads == 4
    assert all("seed" in body for body in fake.bodies("/v1/completions") if body["max_tokens"] > 1)
    names = metric_names(Path("run/metrics.csv"))
    assert {"rollout/tokens_per_second", "val/on_policy_reverse_kl"} <= names
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    assert config["model"]["engine"]["init_args"]["url"] == fake.url
    assert list(Path("weights").iterdir()) == [Path("weights/update.lock")]


def test_a_cut_run_goes_on_with_its_stored_responses(fit: Fit, okd: Fit, fake, flags) -> None:
    chunk = [*GKD, *flags, *VALIDATES, "--data.prompts_per_rollout", "6"]
    fit(chunk, "--trainer.max_steps", "3", "--trainer.default_root_dir", "whole")
    fake.requests.clear()
    fit(chunk, "--trainer.max_steps", "2")
    fake.requests.clear()
    resumed = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "3")
    assert resumed.status == 0, resumed.err
    assert_same_weights(LAST, Path("whole/checkpoints/last.ckpt"))
    written = [b for b in fake.bodies("/v1/completions") if b["max_tokens"] > 1]
    assert len(written) == 2  # validation's: the chunk's were in the checkpoint


def test_an_adapted_student_is_pushed_merged(fit: Fit, fake, flags, gaps) -> None:
    lora = ["--model.student_adapter", "LoraConfig", "--model.student_adapter.r", "4"]
    steps = ["--trainer.max_steps", "2", "--model.learning_rate", "1e-1"]
    fit(GKD, flags, lora, steps)
    assert max(gaps) < 1e-4
    assert fake.num_reloads >= 2


@pytest.mark.parametrize(
    ("fault", "words"),
    [("500", "answers with status 500"), ("slow", "has not answered within 0.3 seconds")],
)
def test_one_line_where_the_server_fails(fault, words, okd: Fit, assets, fake, flags) -> None:
    fake.faults = [fault] * 200
    patience = ["--model.engine.timeout_seconds", "0.3"]
    short = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]
    result = okd("fit", assets.data, assets.models, GKD, flags, patience, short)
    fake.faults = []
    assert result.status == 1
    assert words in result.err.splitlines()[-1]


def test_one_line_for_an_engine_that_is_not_there(okd: Fit, assets) -> None:
    result = okd("fit", assets.data, assets.models, *GKD, "--model.engine", "VLLMServr")
    assert result.status == 2
    assert "VLLMServer" in result.err
    missing = okd("fit", assets.data, assets.models, *GKD, "--model.engine", "VLLMServer")
    assert missing.status == 2
    assert "url" in missing.err
