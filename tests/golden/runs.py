"""The golden runs: a few optimizer steps of every kind of run, small enough for every suite.

Each is a function of a folder that returns what happened: the loss of every step and the trained
weights after the last one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import tool_chats
import torch
from parallel_runs import Killed, Killer, spawn
from peft import LoraConfig

from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    OPD,
    SFT,
    DistillationCallback,
    LastCheckpoint,
    OPDPlus,
    Reward,
    Stage,
)
from okd_lightning.divergences import ForwardKL, JensenShannon, TopK
from okd_lightning.engines import Sampling
from okd_lightning.teachers import AveragedSelf, CachedTeacher
from okd_lightning.tools import Calculator
from okd_lightning.training.module import DistillationModule

STEPS = 4


@dataclass(frozen=True)
class Golden:
    """Losses and weights of a golden run.

    Attributes:
        losses: ``train/loss`` of every optimizer step, in nats per token.
        digest: SHA-256 of all trained weights, by name.
    """

    losses: tuple[float, ...]
    digest: str


def digest_of(module: DistillationModule) -> str:
    """SHA-256 over names, shapes and bytes of what was trained."""
    found = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            found.update(parameter.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def length_of(prompt: str, response: str, reference: str) -> float:
    """A reward."""
    return float(len(response))


def make_module(dtype: str = "float64", **settings: Any) -> DistillationModule:
    """A tiny pair; PEFT's adapters draw their weights from the seed."""
    torch.manual_seed(3)
    overrides = {"attention_dropout": 0.1} if settings.pop("dropout", False) else {}
    teacher = settings.pop("teacher", None) or tiny.make_llama(2, tiny.TEACHER_ROWS)
    return DistillationModule(
        tiny.make_llama(1, **overrides),
        teacher,
        tokenizer=tiny.make_tokenizer(),
        dtype=dtype,
        **{"learning_rate": 1e-2, **settings},
    )


def run(
    root: Path,
    methods: Callable[[], Sequence[DistillationCallback]],
    *,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Golden:
    """Train for ``STEPS`` steps of four rows."""
    module = make_module(**(model or {}))
    rows = [{**row, "hint": row["response"][::-1]} for row in tiny.make_rows(24)]
    options = {"max_epochs": -1, "max_steps": STEPS, "gradient_clip_val": 1.0, **settings}
    record = tiny.fit(root, module, methods(), rows, data=dict(data or {}), **options)
    return Golden(tuple(step["train/loss"] for step in record.losses), digest_of(module))


def from_cache(root: Path) -> Golden:
    """The teacher's six most likely ids, from files."""
    teacher = CachedTeacher(tiny.make_llama(2, tiny.TEACHER_ROWS), str(root / "cache"), 6)
    return run(root, lambda: [KD(cross_entropy_weight=0.3)], model={"teacher": teacher})


def with_tools(root: Path) -> Golden:
    """The student calls a calculator in its on-policy responses."""
    tokenizer = tool_chats.make_tokenizer()
    student, teacher = tool_chats.make_caller(0), tool_chats.make_caller(1)
    module = DistillationModule(student, teacher, tokenizer=tokenizer, learning_rate=1e-3)
    chats = [
        {"messages": [{"role": "user", "content": "Q" * (i % 5 + 1)}], "response": call}
        for i, call in enumerate(tool_chats.CALLS * 3)
    ]
    options = {
        "batch_size": 2,
        "max_prompt_length": 80,
        "max_response_length": 120,
        "tools": [Calculator()],
        "max_turns": 3,
    }
    methods = [GKD(on_policy_fraction=1.0), OPDPlus()]
    record = tiny.fit(root, module, methods, chats, data=options, max_epochs=-1, max_steps=STEPS)
    return Golden(tuple(step["train/loss"] for step in record.losses), digest_of(module))


def resumed(
    root: Path, methods: Callable[[], Sequence[DistillationCallback]], **more: Any
) -> Golden:
    """Run that is killed after its second step and resumed; the losses after the resume."""
    callbacks = [LastCheckpoint(every_n_steps=1)]
    try:
        run(root, methods, callbacks=[*callbacks, Killer(2)], **more)
    except Killed:
        last = root / "checkpoints" / "last.ckpt"
        return run(root, methods, callbacks=callbacks, ckpt_path=last, **more)
    raise AssertionError("the run was not killed")


def _of_one_rank(rank: int, root: Path) -> None:
    options = {"devices": 2, "strategy": "ddp", "data": {"batch_size": 2}}
    found = run(root / "two ranks", lambda: [GKD(on_policy_fraction=0.5)], **options)
    torch.save((found.losses, found.digest), root / f"rank{rank}.pt")


def two_ranks(root: Path) -> Golden:
    """Run on two gloo processes."""
    spawn(_of_one_rank, root)
    ranks = [torch.load(root / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert ranks[0] == ranks[1]
    return Golden(*ranks[0])


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
SAMPLES = {"samples_per_prompt": 2, "prompts_per_rollout": 4, "batch_size": 4}


def _okd(**settings: Any) -> OKD:
    return OKD(online_module=LoraConfig(**LORA), learning_rate=1e-2, **settings)


def _stages() -> list[DistillationCallback]:
    return [Stage(SFT(), end=2), Stage(OPDPlus(JensenShannon(0.5)), start=2)]


RUNS: dict[str, Callable[[Path], Golden]] = {
    "sft": partial(run, methods=lambda: [SFT()]),
    "kd": partial(run, methods=lambda: [KD(temperature=2.0, cross_entropy_weight=0.3)]),
    "kd_float32": partial(run, methods=lambda: [KD()], model={"dtype": "float32"}),
    "kd_top_k": partial(run, methods=lambda: [KD(TopK(ForwardKL(), 5))]),
    "seq_kd": partial(run, methods=lambda: [KD(seq_kd=True)]),
    "gkd": partial(run, methods=lambda: [GKD(0.5, on_policy_fraction=0.5)]),
    "gkd_float32": partial(run, methods=lambda: [GKD(0.5)], model={"dtype": "float32"}),
    "okd": partial(run, methods=lambda: [_okd()]),
    "okd_anchor": partial(run, methods=lambda: [_okd(anchor_weight=0.5, on_policy_fraction=0.5)]),
    "opd": partial(run, methods=lambda: [OPD()], data=SAMPLES),
    "opdplus": partial(run, methods=lambda: [OPDPlus(JensenShannon(0.5))], data=SAMPLES),
    "opdplus_discount": partial(run, methods=lambda: [OPDPlus(discount=0.5)], data=SAMPLES),
    "kd_opdplus_reward": partial(
        run,
        methods=lambda: [KD(), OPDPlus(), Reward(length_of, "leave_one_out", weight=0.05)],
        data=SAMPLES,
    ),
    "stages": partial(run, methods=_stages),
    "ema_self_teacher": partial(
        run,
        methods=lambda: [GKD(0.5)],
        model={"teacher": AveragedSelf(), "ema_decay": 0.7},
        data={"teacher_prompt_column": "hint"},
    ),
    "privileged_prompts": partial(
        run, methods=lambda: [OPDPlus()], data={**SAMPLES, "teacher_prompt_column": "hint"}
    ),
    "lora_student": partial(
        run, methods=lambda: [GKD(0.5)], model={"student_adapter": LoraConfig(**LORA)}
    ),
    "dropout_resumed": partial(
        resumed, methods=lambda: [GKD(0.5, on_policy_fraction=0.5)], model={"dropout": True}
    ),
    "sampling": partial(
        run, methods=lambda: [OPDPlus()], data={"sampling": Sampling(temperature=0.8, top_p=0.9)}
    ),
    "teacher_cache": from_cache,
    "tools": with_tools,
    "two_ranks": two_ranks,
}
