"""Whole runs whose student generates on a vLLM server, against a fake server with its protocol.

Frozen here: GKD and OPD+ train through the command line, every rollout has the log-probs of the
student at the time of generation, which are those of the first optimizer step; a run that was
killed within a rollout batch continues with the stored responses, to the same weights; tools and
LoRA students work; a server that fails ends the run in one line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tool_chats
import torch
import yaml
from cli_workbench import Assets, Result, assert_same_weights, metric_names
from fake_vllm_server import FakeVLLM, serving
from transformers import AutoModelForCausalLM

from okd_lightning.callbacks import GKD
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import VLLMServer
from okd_lightning.records import Rollout
from okd_lightning.tools import Calculator
from okd_lightning.training.module import DistillationModule

Fit = Callable[..., Result]
LAST = Path("run/checkpoints/last.ckpt")
NO_TABLES = ("--trainer.callbacks+=SampleTable", "--trainer.callbacks.num_prompts", "0")


@pytest.fixture
def fake(assets: Assets):
    # other weights than the student's: nothing is right before they have been pushed
    with serving(FakeVLLM(AutoModelForCausalLM.from_pretrained(assets.teacher))) as engine:
        yield engine


@pytest.fixture
def flags(fake: FakeVLLM) -> list[str]:
    engine = ["--model.engine", "VLLMServer", "--model.engine.url", fake.url]
    return [*engine, "--model.engine.sync_folder", "weights", *NO_TABLES]


@pytest.fixture
def gaps(monkeypatch) -> list[float]:
    """Differences of each rollout's log-probs from the student's own, right after generation."""
    found: list[float] = []
    original = DistillationModule.respond

    def respond(self, request):
        rollout = original(self, request)
        prompts = request.prompts
        rows = ((p.ids, r.ids, r.logprobs) for p, r in zip(prompts, rollout, strict=True))
        for prompt, ids, logprobs in rows if request.generator == "student" else ():
            read = torch.tensor([[*prompt, *ids]], device=self.device)
            was_training = self.student.training
            with torch.no_grad():
                logits = self.student.eval()(read).logits[0, len(prompt) - 1 : -1]
            self.student.train(was_training)
            own = logits.log_softmax(-1).gather(-1, read[0, len(prompt) :, None])[:, 0]
            found.append(float((own - torch.tensor(logprobs)).abs().max()))
        return rollout

    monkeypatch.setattr(DistillationModule, "respond", respond)
    return found


ON_POLICY = ("--method", "GKD", "--method.on_policy_fraction", "1")
VALIDATES = ("--trainer.val_check_interval", "3")


@pytest.mark.parametrize("method", [ON_POLICY, ("--method", "OPDPlus")], ids=lambda words: words[1])
def test_methods_train_on_the_servers_responses(method, fit: Fit, fake, flags, gaps) -> None:
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


def test_a_cut_run_continues_with_its_stored_responses(fit: Fit, okd: Fit, fake, flags) -> None:
    chunk = [*ON_POLICY, *flags, *VALIDATES, "--data.prompts_per_rollout", "6"]
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
    fit(ON_POLICY, flags, lora, steps)
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
    result = okd("fit", assets.data, assets.models, ON_POLICY, flags, patience, short)
    fake.faults = []
    assert result.status == 1
    assert words in result.err.splitlines()[-1]


def test_tools_are_called_on_the_server(fake, tmp_path) -> None:
    tokenizer = tool_chats.make_tokenizer()
    fake.model = fake.answers_with = tool_chats.make_caller(2)
    students: list[Rollout] = []

    class Kept(DistillationModule):
        def respond(self, request):
            rollout = super().respond(request)
            students.append(rollout)
            for asked, response in zip(request.prompts, rollout, strict=True):
                prompt, ids, logprobs = asked.ids, response.ids, response.logprobs
                own = response.mask
                with torch.no_grad():
                    logits = self.student.eval()(torch.tensor([[*prompt, *ids]])).logits[0]
                known = self.vocabulary.cut(logits[len(prompt) - 1 : -1]).log_softmax(-1)
                found = known.gather(-1, torch.tensor(ids)[:, None])[:, 0] * torch.tensor(own)
                assert found.tolist() == pytest.approx(logprobs, abs=1e-3)
            return rollout

    engine = VLLMServer(fake.url, str(tmp_path / "weights"))
    models = tool_chats.make_caller(0), tool_chats.make_caller(1)
    module = Kept(*models, tokenizer=tokenizer, learning_rate=1e-3, engine=engine)
    row = {"messages": [{"role": "user", "content": "QQ"}], "response": tool_chats.CALLS[0]}
    lengths = {"max_prompt_length": 80, "max_response_length": 60, "batch_size": 2, "max_turns": 3}
    data = RolloutDataModule([row] * 4, tools=[Calculator()], **lengths)
    method = GKD(on_policy_fraction=1.0)
    tiny.make_trainer(tmp_path, [method], max_steps=2).fit(module, data)
    assert fake.num_reloads == 2
    used = [use for rollout in students for use in (r.tool_use for r in rollout)]
    assert len(used) == 4
    assert max(use.calls for use in used) > 0
    seeds = [body["seed"] for body in fake.bodies("/v1/completions") if "seed" in body]
    assert len(set(seeds)) == len(seeds) > 4  # a turn has one of its own


def test_one_line_for_an_engine_that_is_not_there(okd: Fit, assets) -> None:
    result = okd("fit", assets.data, assets.models, *ON_POLICY, "--model.engine", "VLLMServr")
    assert result.status == 2
    result = okd("fit", assets.data, assets.models, *ON_POLICY, "--model.engine", "VLLMServr")
    assert result.status == 2
    assert "VLLMServer" in result.err
    missing = okd("fit", assets.data, assets.models, *ON_POLICY, "--model.engine", "VLLMServer")
    assert missing.status == 2
    assert "url" in missing.err
