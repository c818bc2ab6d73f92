"""Warnings about failing runs.

Frozen here: each is caused by a run with that fault, names the remedy, and comes once; a healthy
run has none; a resumed run does not repeat it; ranks see one number.
"""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from parallel_runs import Killed, Killer
from peft import LoraConfig

from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    OPD,
    SFT,
    LastCheckpoint,
    Reward,
    Stage,
    TeacherDrift,
)
from okd_lightning.divergences import ReverseKL
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.engines.transformers_engine import TransformersEngine
from okd_lightning.errors import ConfigError
from okd_lightning.records.requests import PromptBatch, Request
from okd_lightning.training.safeguards.health_warnings import (
    Course,
    HealthWarnings,
    Surroundings,
    Thresholds,
    VitalSigns,
)

LONG = {"batch_size": 8, "max_response_length": 24}
ALL = ("entropy", "tokens on average", "are cut at", "nats away", "drifts")


def said(caught) -> list[str]:
    return [str(w.message) for w in caught if any(word in str(w.message) for word in ALL)]


def watch(root, module, methods, **settings):
    """Run with the warning callback; return its messages and the callback."""
    watcher = settings.pop("watcher", None) or HealthWarnings(every_n_steps=1)
    settings = {"max_epochs": -1, "max_steps": 60, "data": LONG, **settings}
    callbacks = [watcher, *settings.pop("callbacks", [])]
    rows = settings.pop("rows", None) or tiny.make_rows(64, longest=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny.fit(root, module, methods, rows, callbacks=callbacks, **settings)
    return said(caught), watcher


def letters(wanted: str):
    def reward(prompt: str, response: str, reference: str) -> float:
        return sum(c == wanted for c in response) / 24 - 0.2

    return reward


def length_of(prompt: str, response: str, reference: str) -> float:
    return len(response) / 24 - 0.2


def answered_by(model, module) -> list[dict[str, str]]:
    """Prompts with a model's own greedy answers: whatever moves it makes them less likely."""
    engine = TransformersEngine(model, module.vocabulary, module.eos_ids)
    rows = tiny.make_rows(12)
    ids = tuple(tuple(module.tokenizer(row["prompt"]).input_ids) for row in rows)
    prompts = PromptBatch(ids, tuple(range(12)), (0,) * 12)
    written = engine.respond(Request(prompts, Sampling(temperature=0), NoiseStream(0, 0), 8))
    return [
        {**row, "response": module.decode(answer)}
        for row, answer in zip(rows, written.response_ids, strict=True)
        if module.decode(answer)
    ]


def test_entropy_collapse(tmp_path, make_module):
    module = make_module(learning_rate=3e-2)
    found, watcher = watch(tmp_path, module, [Reward(letters("c"), weight=5.0)], max_steps=80)
    (message,) = [text for text in found if "entropy collapses" in text]
    assert "--model.learning_rate" in message
    course = watcher.course
    assert course.now["entropy"] < 0.25 * course.first["entropy"]


def test_length_explosion(tmp_path, make_module):
    module = make_module()
    short = [{**row, "response": "a"} for row in tiny.make_rows(32, longest=3)]
    tiny.fit(tmp_path, module, [SFT()], short, max_epochs=4)
    found, watcher = watch(tmp_path, module, [Reward(length_of, weight=5.0)], max_steps=40)
    (message,) = [text for text in found if "tokens on average" in text]
    assert "longest that fits is 24" in message
    assert "on_policy_fraction" in message
    assert watcher.course.now["mean_length"] > 0.8 * 24


def test_cut_responses(tmp_path, make_module):
    short = {"batch_size": 8, "max_response_length": 2}
    method = GKD(on_policy_fraction=1.0)
    prompts = [{"prompt": row["prompt"]} for row in tiny.make_rows(64, longest=3)]
    settings = {"rows": prompts, "data": short, "max_steps": 8}
    found, _ = watch(tmp_path / "a", make_module(learning_rate=0.0), [method], **settings)
    (message,) = [text for text in found if "are cut at 2 tokens" in text]
    assert "--data.max_response_length" in message
    assert "0% of the data's own" in message
    long = [{**row, "response": "abcdef"} for row in prompts]  # cut at 2 as well
    found, _ = watch(
        tmp_path / "b", make_module(learning_rate=0.0), [method], **{**settings, "rows": long}
    )
    assert not found


def test_extreme_log_ratios(tmp_path, make_module, tiny_tokenizer):
    teacher = tiny.make_llama(2, tiny.TEACHER_ROWS)
    with torch.no_grad():
        teacher.model.norm.weight *= 20
    for method in (OPD(), Stage(OPD(), end=60)):
        module = make_module(teacher=teacher, tokenizer=tiny_tokenizer, learning_rate=0.0)
        found, watcher = watch(tmp_path, module, [method], max_steps=6)
        (message,) = [text for text in found if "nats away" in text]
        assert "--method.max_log_ratio" in message
        assert watcher.course.now["outliers"] > 0.03


def test_a_drifting_teacher_is_told_once_and_again_after_it_went_away(tmp_path, make_module):
    module = make_module(learning_rate=0.0)
    strength = iter([0.0, 3.0, 3.0, 0.0, 3.0])

    class Disturb(Callback):
        """Callback that moves the teacher away from its base, and back."""

        def on_validation_start(self, trainer, pl_module):
            size = next(strength)
            for name, parameter in pl_module.teacher.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(size)

    lora = LoraConfig(r=2, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM")
    found, _ = watch(
        tmp_path,
        module,
        [OKD(online_module=lora, learning_rate=1e-9)],
        callbacks=[Disturb(), TeacherDrift(margin=0.1)],
        val=answered_by(module.pair.teacher.load(), module),
        val_check_interval=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        max_steps=5,
    )
    drifts = [text for text in found if "drifts" in text]
    assert [text.split("at step ")[1][0] for text in drifts] == ["2", "5"]


@pytest.mark.parametrize("method", ["KD", "GKD", "OPD"])
def test_a_healthy_run_is_quiet(method, tmp_path, make_module):
    make = {
        "KD": KD,
        "GKD": lambda: GKD(divergence=ReverseKL(), on_policy_fraction=1.0),
        "OPD": OPD,
    }[method]
    module = make_module(learning_rate=3e-3)
    found, watcher = watch(
        tmp_path, module, [make()], val=tiny.make_rows(8), watcher=HealthWarnings(every_n_steps=3)
    )
    assert found == []
    assert watcher.course.num_looks == (0 if method == "KD" else 20)


def test_what_was_said_is_remembered(tmp_path, make_module):
    """The state is restored also in the middle of an examination, which no checkpoint contains."""

    def run(root, killer=None, ckpt_path=None):
        watcher = HealthWarnings(every_n_steps=2)
        callbacks = [LastCheckpoint(every_n_steps=1), *([killer] if killer else [])]
        with contextlib.suppress(Killed):
            found, _ = watch(
                root,
                make_module(),
                [GKD(on_policy_fraction=0.5)],
                rows=[{**row, "response": "a"} for row in tiny.make_rows(64)],
                data={"batch_size": 4, "max_response_length": 2},
                callbacks=callbacks,
                watcher=watcher,
                accumulate_grad_batches=2,
                max_steps=16,
                ckpt_path=ckpt_path,
            )
            return found, watcher.state_dict()
        return [], watcher.state_dict()

    found, state = run(tmp_path / "whole")
    assert len(found) == 1
    run(tmp_path / "cut", Killer(13))
    last = str(tmp_path / "cut" / "checkpoints" / "last.ckpt")
    again, resumed = run(tmp_path / "cut", ckpt_path=last)
    assert again == []
    assert json.dumps(resumed) == json.dumps(state)


LIMITS = Thresholds(0.25, 1.5, 0.8, 0.5, 0.03)


def course_of(*signs: VitalSigns, around: Surroundings) -> list[list[str]]:
    course = Course()
    told = []
    for look in signs:
        course.add(look)
        told.append(course.new_problems(LIMITS, around))
    return told


def test_a_problem_that_has_gone_away_may_come_back():
    bad, good = VitalSigns(2.0, 5.0, 0.9), VitalSigns(2.0, 5.0, 0.0)
    told = course_of(*[good] * 3, *[bad] * 6, *[good] * 6, *[bad] * 6, around=Surroundings(100))
    assert [names for names in told if names] == [["truncated"]] * 2


def test_a_sure_student_is_well_where_its_teacher_is_as_sure():
    signs = [VitalSigns(2.0, 5.0, 0.0)] * 3 + [VitalSigns(0.1, 5.0, 0.0)] * 20
    for excess, names in ((None, [["entropy"]]), (0.05, []), (0.2, [["entropy"]])):
        told = course_of(*signs, around=Surroundings(100, excess=excess))
        assert [found for found in told if found] == names


def test_data_that_is_cut_excuses_cut_responses():
    signs = [VitalSigns(2.0, 99.0, 0.95)] * 6
    for cut, names in ((0.0, [["truncated"]]), (0.6, [["truncated"]]), (0.9, [])):
        told = course_of(*signs, around=Surroundings(100, truncated=cut))
        assert [found for found in told if found] == names


@pytest.mark.parametrize(
    "setting",
    [
        {"every_n_steps": 0},
        {"entropy_share": 0.0},
        {"length_growth": 1.0},
        {"length_share": 1.5},
        {"truncated_share": -0.1},
        {"outlier_share": 2.0},
    ],
)
def test_settings_out_of_range(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        HealthWarnings(**setting)
    HealthWarnings(entropy_share=None, length_growth=None, truncated_share=None, outlier_share=None)
