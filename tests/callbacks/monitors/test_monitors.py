"""Monitoring callbacks.

Frozen here: the finite guard stops before the step, also where only the loss is infinite; exact
match counts greedy answers; written files are on disk, in a folder that may be new; tokens are
counted once, and the time of every step, whatever is validated; a callback that has monitored one
run starts again for the next.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from okd_lightning.callbacks import (
    GKD,
    KD,
    SFT,
    DivergenceCallback,
    ExactMatch,
    LastCheckpoint,
    RolloutLog,
    TeacherDrift,
    Throughput,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import Divergence
from okd_lightning.errors import ConfigError, NonFiniteError
from okd_lightning.rewards.answers import matches
from okd_lightning.training.safeguards.step_intervals import StepIntervals
from okd_lightning.training.step import FiniteGuard


@dataclass(frozen=True)
class Broken(Divergence):
    """Method that makes the loss, or the gradient as well, infinite or NaN."""

    kind: str

    def generator(self, log_ratio: Tensor) -> Tensor:
        return -log_ratio

    def value(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        values = super().value(student_logprobs, teacher_logprobs)
        if self.kind == "infinite loss":
            return values + math.inf
        return values * (math.inf if self.kind == "infinite gradient" else math.nan)


@pytest.mark.parametrize("kind", ["infinite loss", "infinite gradient", "nan"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_finite_guard_stops_before_the_step(kind, accumulate, tmp_path, make_module):
    module = make_module()
    module.configure_model()
    before = tiny.weights(module)
    with pytest.raises(NonFiniteError, match=r"step 0 .*divergence_callback (inf|nan|-inf)"):
        tiny.fit(
            tmp_path,
            module,
            [DivergenceCallback(Broken(kind))],
            tiny.make_rows(16),
            callbacks=[FiniteGuard()],
            accumulate_grad_batches=accumulate,
        )
    assert tiny.distance(tiny.weights(module), before) == 0


def test_the_finite_guard_logs_the_norm(tmp_path, make_module):
    module = make_module()
    recorder = tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4), callbacks=[FiniteGuard()])
    squares = sum(float(g.square().sum()) for g in recorder.gradients[0].values())
    assert recorder.losses[0]["train/grad_norm"] == pytest.approx(squares**0.5, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("is_broken", [False, True])
def test_a_loss_scaler_may_leave_steps_out(is_broken, tmp_path, make_module):
    """precision 16-mixed begins with a scale that overflows, and lowers it; NaN stays an error."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    method = DivergenceCallback(Broken("nan")) if is_broken else KD()
    module = make_module(learning_rate=0.0)
    settings = {
        "plugins": [MixedPrecision("16-mixed", "cpu", scaler)],
        "max_epochs": 12,
        "callbacks": [FiniteGuard()],
    }
    if is_broken:
        with pytest.raises(NonFiniteError):
            tiny.fit(tmp_path / "a", module, [method], tiny.make_rows(16), **settings)
        return
    recorder = tiny.fit(tmp_path / "a", module, [method], tiny.make_rows(16), **settings)
    assert scaler.get_scale() < 2.0**40
    plain = make_module(learning_rate=0.0)
    expected = tiny.fit(tmp_path / "b", plain, [KD()], tiny.make_rows(16), max_epochs=12)
    assert tiny.distance(recorder.gradients[-1], expected.gradients[-1]) < 0.02


def greedy(module, prompt: str, limit: int) -> str:
    ids = module.tokenizer(prompt).input_ids
    written = module.student.eval().generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=limit,
        suppress_tokens=list(range(tiny.NUM_IDS, tiny.STUDENT_ROWS)),
    )
    return module.decode(written[0, len(ids) :].tolist())


def test_exact_match_is_the_share_of_solved_prompts(tmp_path, make_module):
    module = make_module()
    module.configure_model()
    prompts = [row["prompt"] for row in tiny.make_rows(6)]
    rows = [
        {"prompt": prompt, "response": (greedy(module, prompt, 6) if i % 3 else "") or "a"}
        for i, prompt in enumerate(prompts)
    ]
    solved = sum(greedy(module, row["prompt"], 6) == row["response"] for row in rows)
    assert 0 < solved < 6
    settings = {"max_response_length": 6, "val_rollouts": 0, "seed": 7}
    for stage in ("validate", "test"):
        trainer = tiny.make_trainer(tmp_path, [ExactMatch()])
        found = getattr(trainer, stage)(
            module, RolloutDataModule(val=rows, **settings), verbose=False
        )
        found = {name: value for part in found for name, value in part.items()}
        name = "val" if stage == "validate" else "test"
        assert found[f"{name}/exact_match"] == pytest.approx(solved / 6)


def test_exact_match_of_a_part_of_the_answer():
    import re

    pattern = re.compile("#### (.+)")
    assert matches("so #### 5\nno #### 7", "#### 7", pattern)
    assert not matches("7", "#### 7", pattern)
    assert not matches("#### 5", "#### 7", pattern)
    assert matches(" 7\n", "7")
    for wrong in ("(", "no group"):
        with pytest.raises(ConfigError, match="pattern"):
            ExactMatch(wrong)


def test_exact_match_with_nothing_to_compare_is_an_error(tmp_path, make_module):
    rows = [{"prompt": row["prompt"]} for row in tiny.make_rows(4)]
    trainer = tiny.make_trainer(tmp_path, [ExactMatch()])
    with pytest.raises(ConfigError, match="ExactMatch"):
        trainer.validate(
            make_module(), RolloutDataModule(val=rows, max_response_length=6), verbose=False
        )


def test_the_rollout_log(tmp_path, make_module):
    log = RolloutLog(every_n_steps=2, num_rows=3)
    module = make_module(learning_rate=0.0)
    recorder = tiny.fit(
        tmp_path / "new",
        module,
        [GKD(on_policy_fraction=1.0)],
        tiny.make_rows(24),
        callbacks=[log],
        accumulate_grad_batches=2,
        data={"batch_size": 3},
    )
    lines = (tmp_path / "new" / "rollouts.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [0] * 3 + [2] * 3
    written = {module.decode(ids) for step in (0, 2) for ids, _, _ in recorder.rows(step)}
    for record in records:
        assert record["source"] == "student"
        assert record["prompt"] + record["response"] in written


def test_given_rows_are_not_logged_as_rollouts(tmp_path, make_module):
    tiny.fit(tmp_path, make_module(), [SFT()], tiny.make_rows(8), callbacks=[RolloutLog()])
    assert not (tmp_path / "rollouts.jsonl").exists()


def test_throughput_counts_every_token_once(tmp_path, make_module):
    throughput = Throughput()
    recorder = tiny.fit(
        tmp_path,
        make_module(),
        [KD(), GKD(1.0, on_policy_fraction=1.0)],
        tiny.make_rows(21),
        callbacks=[throughput],
        accumulate_grad_batches=2,
        max_epochs=2,
    )
    rows = [row for i in range(len(recorder.steps)) for row in recorder.rows(i)]
    assert throughput.tokens == sum(sum(mask[1:]) for _, mask, _ in rows)
    assert throughput.generated_tokens == sum(sum(m) for _, m, source in rows if source == 1)
    assert 0 < throughput.rollout_seconds < throughput.seconds
    assert recorder.losses[-1]["train/tokens"] == throughput.tokens


class Slow(Callback):
    def on_train_batch_start(self, *args):
        time.sleep(0.1)


@pytest.mark.parametrize("interval", [1, 2])
def test_throughput_counts_the_time_of_steps_after_a_validation(interval, tmp_path, make_module):
    """The first step of a resumed run counts too."""
    throughput = Throughput()
    last = LastCheckpoint()
    for max_steps in (2, 4):
        tiny.fit(
            *(tmp_path, make_module(), [KD()], tiny.make_rows(24)),
            val=tiny.make_rows(4),
            callbacks=[Slow(), throughput, StepIntervals(), last],
            ckpt_path=last.path if max_steps == 4 else None,
            val_check_interval=interval,
            max_steps=max_steps,
        )
        assert throughput.seconds >= 0.1 * max_steps


def test_monitors_begin_again_with_a_run(tmp_path, make_module):
    throughput, last, intervals, drift = (
        *(Throughput(), LastCheckpoint(), StepIntervals()),
        TeacherDrift(action="freeze"),
    )
    drift.is_frozen = True
    steps = []
    for number, accumulate in enumerate((1, 2)):
        validated = []
        spy = LambdaCallback(on_validation_end=lambda t, m, v=validated: v.append(t.global_step))
        steps.append(validated)
        recorder = tiny.fit(
            *(tmp_path / str(number), make_module(), [KD()], tiny.make_rows(16 * accumulate)),
            val=tiny.make_rows(4),
            callbacks=[throughput, last, intervals, drift, spy],
            accumulate_grad_batches=accumulate,
            val_check_interval=number + 1,
            num_sanity_val_steps=0,
        )
        assert throughput.tokens == recorder.losses[-1]["train/tokens"]
        assert last.path == tmp_path / str(number) / "checkpoints" / "last.ckpt"
        assert last.path.is_file()
    counted = sum(sum(m[1:]) for i in range(4) for _, m, _ in recorder.rows(i))
    assert throughput.tokens == counted
    assert steps == [[1, 2, 3, 4], [2, 4]]
    assert not drift.is_frozen
