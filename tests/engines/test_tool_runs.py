"""Whole runs whose responses call tools, with a tiny model that does.

Frozen here: loss, counts, sampler log-probs and advantages exist on the student's sampled tokens
alone, for every term; a killed run resumes bit for bit though its rollouts were written in turns;
validation, predict, rewards and exact match read the conversation as they say; plain rows are
refused.
"""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace

import pytest
import tiny
import tool_chats
import torch
from lightning.pytorch.callbacks import Callback
from tool_chats import END, EOS

from okd_lightning.callbacks import (
    GKD,
    ExactMatch,
    LastCheckpoint,
    OPDPlus,
    PredictionLog,
    Reward,
    RolloutLog,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import DataError
from okd_lightning.records import Response
from okd_lightning.records.requests import Rollout
from okd_lightning.rewards import RewardFunction, ToolCallMatch
from okd_lightning.tools import Calculator
from okd_lightning.training.module import DistillationModule

ROWS = [
    {
        "messages": [{"role": "user", "content": "Q" * (i % 5 + 1)}],
        "response": tool_chats.CALLS[i % 2],
    }
    for i in range(10)
]


@pytest.fixture(scope="module")
def tokenizer():
    return tool_chats.make_tokenizer()


@pytest.fixture
def module(tokenizer):
    return make_module(tokenizer)


def make_module(tokenizer) -> DistillationModule:
    student, teacher = tool_chats.make_caller(0), tool_chats.make_caller(1)
    return DistillationModule(student, teacher, tokenizer=tokenizer, learning_rate=1e-3)


def make_data(rows=ROWS, val=None, **overrides) -> RolloutDataModule:
    settings = {
        "batch_size": 2,
        "max_prompt_length": 80,
        "max_response_length": 120,
        "tools": [Calculator()],
        "max_turns": 3,
        "seed": 3,
    }
    if rows is None:
        settings["val_rollouts"] = 4
    return RolloutDataModule(rows, val, **{**settings, **overrides})


class Metrics(Callback):
    """Every logged number of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *args):
        self.steps.append({n: float(v) for n, v in trainer.callback_metrics.items()})


def own_stretches(ids, mask) -> list[bool]:
    return [bool(m) for i, m in enumerate(mask) if not i or mask[i - 1] != m]


def test_loss_lies_on_the_students_own_tokens(tmp_path, module, tokenizer):
    recorder, metrics = tiny.Recorder(), Metrics()
    trainer = tiny.make_trainer(tmp_path, [GKD(on_policy_fraction=1.0), metrics, recorder])
    trainer.fit(module, make_data())
    several = 0
    for step, batches in enumerate(recorder.steps):
        rows = recorder.rows(step)
        for ids, mask, _ in rows:
            text = tokenizer.decode(ids)
            own = "".join(
                tokenizer.decode([i]) for i, is_own in zip(ids, mask, strict=True) if is_own
            )
            assert own.count("<|im_start|>tool") == 0
            shown = re.findall(r"<\|im_start\|>tool\n(.*?)<\|im_end\|>", text, re.DOTALL)
            assert {s for s in shown if "error" not in s} <= {"2"}
            several += own_stretches(ids, mask).count(True) > 1
        counts = batches[0].step_counts
        assert sum(counts) == sum(sum(mask[1:]) for _, mask, _ in rows)
        for batch in batches:
            assert not batch.sampler_logprobs[~batch.mask].any()
            assert batch.sampler_logprobs[batch.mask].all()
            assert set(batch.stop_reasons) <= {"eos", "length", "turns"}
            measured = module.measure(batch, GKD().quantities)
            assert len(measured.row) == int(batch.mask[:, 1:].sum())
    assert several > 3
    seen = metrics.steps[-1]
    assert seen["rollout/tool_calls"] >= seen["rollout/tool_errors"] >= 0
    assert sum(step["rollout/tool_calls"] for step in metrics.steps) > 5
    assert 1 <= seen["rollout/mean_turns"] <= 3
    assert END in module.eos_ids


def test_the_sampler_is_the_trainer_on_own_tokens(tmp_path, module):
    """The log-probs of the sampler, turn by turn, are those of one pass over the whole row."""
    metrics = Metrics()
    method = OPDPlus()
    trainer = tiny.make_trainer(tmp_path, [method, metrics], max_steps=1)
    trainer.fit(module, make_data(batch_size=8))
    assert metrics.steps[0]["rollout/mean_turns"] > 1.2
    assert metrics.steps[0]["train/sampler_gap"] < 1e-4


class Killed(Exception):
    pass


class Killer(Callback):
    def __init__(self, batch: int) -> None:
        self.batch, self.calls = batch, 0

    def on_train_batch_start(self, *args):
        self.calls += 1
        if self.calls == self.batch:
            raise Killed


@pytest.mark.parametrize("batch", [2, 4, 5, 7])
def test_a_killed_run_resumes_bit_for_bit(batch, tmp_path, tokenizer):
    def run(root, killer=None, ckpt_path=None):
        module, recorder = make_module(tokenizer), tiny.Recorder()
        methods = [OPDPlus(), Reward(ToolCallMatch(), baseline="leave_one_out", weight=0.5)]
        callbacks = [*methods, LastCheckpoint(every_n_steps=1), recorder]
        trainer = tiny.make_trainer(root, [*callbacks, *([killer] if killer else [])], max_epochs=2)
        data = make_data(prompts_per_rollout=4, samples_per_prompt=2, prompts_per_epoch=5)
        with contextlib.suppress(Killed):
            trainer.fit(module, data, ckpt_path=ckpt_path)
        return module, recorder

    module, recorder = run(tmp_path / "whole")
    run(tmp_path / "cut", Killer(batch))
    last = str(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    resumed, rest = run(tmp_path / "cut", ckpt_path=last)
    num_rest = len(rest.steps)
    assert 0 < num_rest < len(recorder.steps)
    for step in range(1, num_rest + 1):
        assert recorder.rows(-step) == rest.rows(-step)
        for a, b in zip(recorder.steps[-step], rest.steps[-step], strict=True):
            assert torch.equal(a.sampler_logprobs, b.sampler_logprobs)
            assert a.stop_reasons == b.stop_reasons
            for name in a.credits:
                assert torch.equal(a.credits[name], b.credits[name])
    assert tiny.distance(tiny.weights(resumed), tiny.weights(module)) == 0


def test_advantages_of_a_group_act_on_own_tokens_alone(tmp_path, module, tokenizer):
    recorder = tiny.Recorder()
    method = Reward(ToolCallMatch(), baseline="leave_one_out")
    trainer = tiny.make_trainer(tmp_path, [method, recorder])
    trainer.fit(module, make_data(batch_size=4, samples_per_prompt=2))
    groups: dict[int, list[float]] = {}
    for batches in recorder.steps:
        for batch in batches:
            measured = module.measure(batch, ())
            assert len(measured.credits["reward"]) == int(batch.mask[:, 1:].sum())
            for index, credit in zip(batch.index.tolist(), batch.credits["reward"], strict=True):
                groups.setdefault(index, []).append(float(credit))
    assert {len(group) for group in groups.values()} == {2}
    assert all(sum(group) == pytest.approx(0) for group in groups.values())
    assert any(abs(group[0]) > 0 for group in groups.values())


class Reader(RewardFunction):
    """Reward that records its arguments."""

    def __init__(self, reads_last_turn: bool) -> None:
        self.reads_last_turn = reads_last_turn
        self.seen: list[str] = []

    def __call__(self, prompts, responses, references):
        self.seen += responses
        return [0.0] * len(responses)


class Parrot:
    """Fake model that calls the calculator and then repeats the result."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def respond(self, request):
        found = []
        for prompt in request.prompts:
            text = self._tokenizer.decode(prompt.ids)
            has_called = "<|im_start|>tool" in text
            said = "#### 2<|im_end|>" if has_called else tool_chats.CALLS[0] + "<|im_end|>"
            ids = tuple(self._tokenizer(said).input_ids)
            found.append(Response(ids, (-1.0,) * len(ids), "eos"))
        return Rollout(tuple(found))


def with_parrot(module, tokenizer) -> DistillationModule:
    module.build_engine = lambda model: Parrot(tokenizer)
    return module


def test_rewards_read_what_the_student_wrote(tmp_path, module, tokenizer):
    readers = Reader(True), Reader(False)
    methods = [Reward(reader, name=f"r{i}") for i, reader in enumerate(readers)]
    trainer = tiny.make_trainer(tmp_path, [*methods, RolloutLog()], max_steps=1)
    trainer.fit(with_parrot(module, tokenizer), make_data())
    assert set(readers[0].seen) == {"#### 2"}
    assert set(readers[1].seen) == {f"{tool_chats.CALLS[0]}\n#### 2"}
    record = json.loads((tmp_path / "rollouts.jsonl").read_text().splitlines()[0])
    assert record["response"].startswith(tool_chats.CALLS[0])
    assert record["response"].endswith("#### 2")
    assert [turn["by"] for turn in record["turns"]] == ["model", "tools", "model"]
    assert "tool\n2" in record["turns"][1]["text"]


@pytest.mark.parametrize(("pattern", "reference"), [(None, "#### 2"), ("#### (.+)", "so #### 2")])
def test_exact_match_judges_the_last_turn(pattern, reference, tmp_path, module, tokenizer):
    rows = [{**ROWS[0], "response": reference}, {**ROWS[1], "response": "#### 3"}]
    trainer = tiny.make_trainer(tmp_path, [ExactMatch(pattern)])
    found = trainer.validate(with_parrot(module, tokenizer), make_data(None, rows), verbose=False)
    assert found[0]["val/exact_match"] == 0.5
    assert any("val/on_policy_reverse_kl" in loader for loader in found)


def test_predictions_show_the_conversation_and_why_it_ends(tmp_path, module):
    data = make_data(None, predict=ROWS, max_turns=2, max_response_length=200)
    trainer = tiny.make_trainer(tmp_path, [PredictionLog()])
    trainer.predict(module, data)
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["index"] for record in records] == list(range(10))
    assert {"eos", "turns"} <= {record["stop_reason"] for record in records}
    for record in records:
        assert ("tool\n" in record["response"]) == ("turns" in record)
        assert record["num_tokens"] <= 200


def test_another_run_without_tools_writes_without_them(tmp_path, module):
    with_tools, without = tiny.Recorder(), tiny.Recorder()
    trainer = tiny.make_trainer(tmp_path, [GKD(on_policy_fraction=1.0), with_tools], max_steps=1)
    trainer.fit(module, make_data())
    assert module.pair.tool_rounds is not None
    trainer = tiny.make_trainer(tmp_path, [GKD(on_policy_fraction=1.0), without], max_steps=1)
    trainer.fit(module, make_data(tools=None, max_turns=None))
    assert module.pair.tool_rounds is None
    assert all(own_stretches(ids, mask)[1:] == [True] for ids, mask, _ in without.rows(0))


def test_plain_rows_and_tokenizers_without_template_are_refused(tmp_path, module, tokenizer):
    plain = [{"prompt": "a", "response": "b"}]
    trainer = tiny.make_trainer(tmp_path, [GKD()])
    with pytest.raises(DataError, match=r"plain prompts, and --data\.tools are called in chats"):
        trainer.fit(module, make_data(plain))


def test_the_models_end_of_text_ends_a_turn_too(tmp_path, module, tokenizer):
    """The id that ended the turn is kept, and the template's text follows it."""

    class Ender(Parrot):
        def respond(self, request):
            found = super().respond(request)
            return Rollout(tuple(replace(r, ids=(*r.ids[:-1], EOS)) for r in found))

    module.build_engine = lambda model: Ender(tokenizer)
    recorder = tiny.Recorder()
    trainer = tiny.make_trainer(tmp_path, [GKD(on_policy_fraction=1.0), recorder], max_steps=1)
    trainer.fit(module, make_data())
    text = tokenizer.decode(recorder.rows(0)[0][0])
    assert f"{tool_chats.CALLS[0]}</s>\n<|im_start|>tool\n2<|im_end|>\n" in text


def test_a_privileged_teacher_judges_the_same_own_tokens(tmp_path, module):
    recorder = tiny.Recorder()
    trainer = tiny.make_trainer(tmp_path, [GKD(on_policy_fraction=1.0), recorder], max_steps=3)
    data = make_data(teacher_prompt_template="{prompt} Hint: {reference}")
    trainer.fit(module, data)
    batches = [batch for step in recorder.steps for batch in step]
    assert any(own_stretches(None, mask).count(True) > 1 for b in batches for mask in b.mask)
    for batch in batches:
        own, seen = batch.input_ids[batch.mask], batch.teacher_input_ids[batch.teacher_mask]
        assert torch.equal(own, seen)
        assert batch.teacher_input_ids.shape[1] > batch.input_ids.shape[1]
