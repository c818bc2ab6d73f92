"""Every option at a resume: the table of docs/state.md, row by row.

Frozen here: every option of the module, the data module and the Trainer is in the table; one that
acts is in effect in the resumed run (rates: in every step, as in the run that was never stopped);
one that is refused or needs a new run stops the resume with a message that says so; checkpoints of
before parameter groups had names resume.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from okd_lightning.callbacks import GKD, KD, SFT, LastCheckpoint
from okd_lightning.commands.resume_rules import check_resume, verdict
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import Sampling
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.training.module import DistillationModule

PAGE = Path(__file__).parents[2] / "docs" / "state.md"
TABLE = PAGE.read_text().split("## Options at a resume")[1].split("\n## ")[0]
ROWS = {
    option: cells[1].strip()
    for cells in (line.strip("|").split("|") for line in TABLE.splitlines()[4:] if line[:1] == "|")
    for option in re.findall(r"`([\w.*]+)`", cells[0])
    if not set(cells[1].strip()) <= set("-")
}
ROWS.pop("option", None)


def options_of(kind: type, section: str) -> set[str]:
    return {f"{section}.{name}" for name in inspect.signature(kind).parameters}


def test_the_table_has_every_option():
    known = options_of(DistillationModule, "model") | options_of(RolloutDataModule, "data")
    known |= options_of(lightning.Trainer, "trainer")
    others = {"method", "method.*", "method.online_module", "seed_everything"}
    assert known - ROWS.keys() == set()
    assert ROWS.keys() - known == others


@pytest.mark.parametrize("option", [name for name in ROWS if name != "method.*"])
def test_the_table_says_what_the_command_line_does(option):
    loaders_own = ("trainer.limit_train_batches", "trainer.overfit_batches")
    loaders_own += ("trainer.reload_dataloaders_every_n_epochs",)
    assert ROWS[option] == ("refused" if option in loaders_own else verdict(option))


# ---------------------------------------------------------------- what acts


class Rates(Callback):
    """Learning rate and weight decay of the first group, in every step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        group = optimizer.param_groups[0]
        self.seen.append((trainer.global_step, group["lr"], group["weight_decay"]))


@dataclass
class Run:
    module: DistillationModule
    data: RolloutDataModule
    trainer: lightning.Trainer
    rates: list[tuple[int, float, float]]

    @property
    def group(self) -> dict[str, Any]:
        return self.trainer.optimizers[0].param_groups[0]

    @property
    def last(self) -> str:
        return f"{self.trainer.default_root_dir}/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def fit(student_folder, teacher_folder):
    def run(root, ckpt_path=None, method=None, rows=None, val=None, **options) -> Run:
        given: dict[str, dict[str, Any]] = {"model": {}, "data": {}, "trainer": {}}
        for option, value in options.items():
            section, _, name = option.partition("__")
            given[section][name] = value
        torch.manual_seed(3)
        models = {"student": str(student_folder), "teacher": str(teacher_folder)}
        module = DistillationModule(**{**models, "learning_rate": 1e-2, **given["model"]})
        lengths = {"batch_size": 4, "max_prompt_length": 16, "max_response_length": 8}
        rows = tiny.make_rows(24) if rows is None else rows
        data = RolloutDataModule(
            rows,
            val,
            **{"seed": 7, "val_rollouts": 0, "token_cache": None, **lengths, **given["data"]},
        )
        rates = Rates()
        callbacks = [method or KD(), LastCheckpoint(), rates]
        trainer = tiny.make_trainer(
            root, callbacks, **{"max_epochs": -1, "max_steps": 4, **given["trainer"]}
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return Run(module, data, trainer, rates.seen)

    return run


@pytest.fixture(scope="module")
def checkpoint(fit, tmp_path_factory) -> str:
    """Checkpoint of step 4, in the middle of the first epoch of 6."""
    return fit(tmp_path_factory.mktemp("first")).last


HOT = Sampling(temperature=0.5)
ACTING = {
    "model.learning_rate": (0.5, lambda run: run.rates[0][1:] == (0.5, 0.0)),
    "model.weight_decay": (0.5, lambda run: run.rates[0][2] == 0.5),
    "model.warmup_steps": (8, lambda run: run.rates[0][1] == 1e-2 * 5 / 8),
    "model.schedule": ("linear", lambda run: run.rates[0][1] == pytest.approx(1e-2 / 5)),
    "model.dtype": ("bfloat16", lambda run: run.module.student.dtype == torch.bfloat16),
    "model.teacher_dtype": ("bfloat16", lambda run: run.module.teacher.dtype == torch.bfloat16),
    "model.attn_implementation": (
        "eager",
        lambda run: run.module.student.config._attn_implementation == "eager",
    ),
    "model.gradient_checkpointing": (
        True,
        lambda run: run.module.pair.settings.gradient_checkpointing,
    ),
    "model.tile_positions": (3, lambda run: run.module.pair.settings.tile_positions == 3),
    "model.packing": (False, lambda run: not run.module.pair.packs_student),
    "data.max_response_length": (
        3,
        lambda run: run.data._train_loader._generation.max_new_tokens == 3,
    ),
    "data.sampling": (HOT, lambda run: run.data._train_loader._generation.sampling is HOT),
    "data.max_prompt_length": (40, lambda run: run.data.max_prompt_length == 40),
    "data.on_overlong": ("error", lambda run: run.data.on_overlong == "error"),
    "data.val_rollouts": (3, lambda run: run.data.val_rollouts == 3),
    "trainer.max_steps": (6, lambda run: run.trainer.global_step == 6),
    "trainer.gradient_clip_val": (0.5, lambda run: run.trainer.gradient_clip_val == 0.5),
    "trainer.precision": ("bf16-mixed", lambda run: run.trainer.precision == "bf16-mixed"),
}


@pytest.mark.filterwarnings("ignore:.*bfloat16, which keeps 8 bits")
@pytest.mark.parametrize("option", ACTING)
def test_an_option_acts(option, fit, checkpoint, tmp_path):
    assert ROWS[option] == "acts"
    value, acts = ACTING[option]
    run = fit(tmp_path, checkpoint, **{"trainer__max_steps": 5, option.replace(".", "__"): value})
    assert [step for step, _, _ in run.rates] == list(range(4, run.trainer.global_step))
    assert acts(run)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_longer_run_has_its_own_rates(schedule, fit, tmp_path):
    settings = {"model__schedule": schedule, "model__warmup_steps": 2}
    whole = fit(tmp_path / "whole", trainer__max_steps=8, **settings)
    short = fit(tmp_path / "short", trainer__max_steps=4, **settings)
    longer = fit(tmp_path / "long", short.last, trainer__max_steps=8, **settings)
    assert longer.rates == whole.rates[4:]
    assert short.rates[3] != whole.rates[3]


def test_an_optimizers_own_settings_act(fit, tmp_path):
    first = fit(tmp_path / "first", model__optimizer=partial(AdamW, betas=(0.9, 0.99)))
    run = fit(
        tmp_path / "more",
        first.last,
        model__optimizer=partial(AdamW, betas=(0.5, 0.6)),
        trainer__max_steps=5,
    )
    assert run.group["betas"] == (0.5, 0.6)


def test_a_methods_settings_act(fit, checkpoint, tmp_path):
    same = fit(tmp_path / "same", checkpoint, trainer__max_steps=5)
    other = fit(tmp_path / "other", checkpoint, method=KD(temperature=3.0), trainer__max_steps=5)
    assert tiny.distance(tiny.weights(other.module), tiny.weights(same.module)) > 0


@pytest.mark.filterwarnings("ignore:.*prompts_per_rollout 12 has no effect in this run")
@pytest.mark.parametrize(("before", "after"), [(0.0, 1.0), (1.0, 0.0), (1.0, 0.5)])
def test_another_on_policy_share_generates_the_rollout_batch_again(before, after, fit, tmp_path):
    """The chunk is 12 prompts, three optimizer steps; the checkpoint is in the middle of one."""
    chunk = {"data__prompts_per_rollout": 12}
    first = fit(tmp_path / "a", method=GKD(on_policy_fraction=before), **chunk)
    run = fit(
        tmp_path / "b",
        first.last,
        method=GKD(on_policy_fraction=after),
        trainer__max_steps=6,
        **chunk,
    )
    assert run.trainer.global_step == 6


SEEN_ELSEWHERE = {
    "model.teacher": "teachers/test_cached_runs.py",
    "model.tokenizer": "commands/test_resumed_options.py",  # as other prompts
    "model.ema_decay": "teachers/test_self_teacher.py",
    "model.compile_blocks": "models/test_blocks.py",
    "model.engine": "engines/test_vllm_engine.py",
    "method.*": "commands/test_resumed_options.py",
    "trainer.callbacks": "commands/test_retyped_callbacks.py",
    "trainer.default_root_dir": "commands/test_run_paths.py",
}
"""Options that act, and the test that has them in effect."""

OTHER_RUNS = ("data.", "trainer.")
"""Options of these sections that are not in ACTING are read again by every run, resumed or not."""


def test_every_option_that_acts_is_seen_to():
    acting = {option for option, what in ROWS.items() if what == "acts"}
    unseen = acting - ACTING.keys() - SEEN_ELSEWHERE.keys()
    assert {option for option in unseen if not option.startswith(OTHER_RUNS)} == set()
    assert all((Path(__file__).parents[1] / test).is_file() for test in SEEN_ELSEWHERE.values())


# ---------------------------------------------------------------- what is refused

OTHER_ROWS = tiny.make_rows(24, seed=5)
REFUSED = {
    "data.train": {"rows": OTHER_ROWS},
    "data.batch_size": {"data__batch_size": 2},
    "data.global_batch_size": {"data__global_batch_size": 8},
    "data.prompts_per_epoch": {"data__prompts_per_epoch": 12},
    "data.prompts_per_rollout": {"data__prompts_per_rollout": 8},
    "data.seed": {"data__seed": 8},
    "data.samples_per_prompt": {"data__samples_per_prompt": 2},
    "trainer.accumulate_grad_batches": {"trainer__accumulate_grad_batches": 2},
    "model.optimizer": {"model__optimizer": SGD},
    "model.lr_scheduler": {"model__lr_scheduler": partial(StepLR, step_size=1)},
    "model.end_tokens": {"model__end_tokens": [1, 5]},
    "method": {"method": SFT()},
}


@pytest.fixture(scope="module")
def end_of_epoch(fit, tmp_path_factory) -> str:
    """Checkpoint of step 6, after the first epoch."""
    return fit(tmp_path_factory.mktemp("epoch"), trainer__max_steps=6).last


@pytest.mark.parametrize("option", REFUSED)
@pytest.mark.parametrize("place", ["checkpoint", "end_of_epoch"])
def test_an_option_is_refused(option, place, fit, tmp_path, request):
    assert ROWS[option] in ("refused", "new run")
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        fit(tmp_path, request.getfixturevalue(place), trainer__max_steps=9, **REFUSED[option])
    assert re.search(r"checkpoint|set --data\.global_batch_size|has no effect", str(caught.value))


def test_other_responses_to_the_same_prompts_act(fit, checkpoint, tmp_path):
    rows = [{**row, "response": "abc"} for row in tiny.make_rows(24)]
    assert fit(tmp_path, checkpoint, rows=rows, trainer__max_steps=5).trainer.global_step == 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"model__learning_rate": 0.5}, "learning_rate"),
        ({"model__lr_scheduler": partial(CosineAnnealingLR, T_max=9)}, "T_max"),
    ],
)
def test_a_schedulers_settings_are_refused(options, named, fit, tmp_path):
    own = {"model__lr_scheduler": partial(CosineAnnealingLR, T_max=5)}
    first = fit(tmp_path / "first", **own)
    more = fit(tmp_path / "more", first.last, **own, trainer__max_steps=5)
    whole = fit(tmp_path / "whole", **own, trainer__max_steps=5)
    assert more.rates == whole.rates[4:]
    with pytest.raises(CheckpointError, match=named):
        fit(tmp_path / "other", first.last, **{**own, **options}, trainer__max_steps=5)


SAVED = {
    "seed_everything": 0,
    "model": {"student": "HERE", "student_adapter": None, "optimizer": None, "learning_rate": 1},
    "method": {"class_path": "okd_lightning.callbacks.OKD", "init_args": {"online_module": None}},
}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("seed_everything", 1),
        ("model.student", "OTHER"),
        ("model.student_adapter", {"class_path": "peft.LoraConfig", "init_args": {"r": 4}}),
        ("model.optimizer", {"class_path": "torch.optim.SGD", "init_args": {"lr": 1}}),
        ("model.lr_scheduler", {"class_path": "StepLR", "init_args": {"step_size": 1}}),
        ("method.online_module", {"class_path": "peft.LoraConfig", "init_args": {"r": 4}}),
    ],
)
def test_the_command_line_refuses(option, value, tmp_path):
    (tmp_path / "here").mkdir()
    saved = {**SAVED, "model": {**SAVED["model"], "student": str(tmp_path / "here")}}
    section, _, name = option.partition(".")
    own = {**saved, section: value}
    if section == "model":
        own = {**saved, "model": {**saved["model"], name: value}}
    elif section == "method":
        own = {**saved, "method": {**saved["method"], "init_args": {name: value}}}
    check_resume(saved, saved, "last.ckpt")
    with pytest.raises(
        CheckpointError, match=f"--{option}.* would have no effect at a resume"
    ) as caught:
        check_resume(saved, own, "last.ckpt")
    wants_export = ROWS[option] == "new run" or section == "model"
    assert ("okd-lightning export --ckpt_path last.ckpt" in str(caught.value)) == wants_export


def test_a_student_that_was_moved_is_taken_where_it_is(tmp_path):
    saved = {"model": {"student": str(tmp_path / "gone")}}
    check_resume(saved, {"model": {"student": str(tmp_path)}}, "last.ckpt")


# ---------------------------------------------------------------- older checkpoints


def test_a_checkpoint_without_group_names_resumes(fit, tmp_path):
    """The user's optimizer had one group then, with matrices, biases and norms."""
    own = {"model__optimizer": partial(SGD, momentum=0.9)}
    first = fit(tmp_path / "first", **own)
    expected = fit(tmp_path / "expected", first.last, **own, trainer__max_steps=6)
    old = torch.load(first.last, weights_only=True)
    del old["okd_lightning"]["optimizer"]
    (state,) = old["optimizer_states"]
    trained = first.module.trained_parameters(first.module.student)
    order = [i for has in (True, False) for i, p in enumerate(trained) if (p.ndim >= 2) is has]
    state["state"] = {order[number]: moments for number, moments in state["state"].items()}
    group = {k: v for k, v in state["param_groups"][0].items() if k != "name"}
    state["param_groups"] = [{**group, "params": list(range(len(trained)))}]
    (scheduler,) = old["lr_schedulers"]
    for name in ("base_lrs", "_last_lr", "lr_lambdas"):
        scheduler[name] = scheduler[name][:1]
    torch.save(old, tmp_path / "old.ckpt")
    found = fit(tmp_path / "found", str(tmp_path / "old.ckpt"), **own, trainer__max_steps=6)
    assert [g["name"] for g in found.trainer.optimizers[0].param_groups] == [
        "student/decay",
        "student/no_decay",
    ]
    for name, weight in tiny.weights(expected.module).items():
        assert torch.equal(weight, tiny.weights(found.module)[name]), name
