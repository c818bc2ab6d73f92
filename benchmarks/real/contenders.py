"""The contenders of the study on a real pair, and one run of one of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
from pair import Places, evaluate, fit, warm_start
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from callbacks.distillm2 import DistiLLM2
from callbacks.imitkd import ImitKD
from okd_lightning.callbacks import GKD, KD, OKD, SFT, DistillationCallback, OPDPlus
from okd_lightning.divergences import ForwardKL, ReverseKL
from okd_lightning.training.module import DistillationModule

LEARNING_RATE, WARMUP_STEPS = 3e-4, 2


@dataclass(frozen=True)
class Contender:
    """Methods, and how much of the budget goes first into fine-tuning the teacher's module.

    Attributes:
        method: Builds the method, or several, whose losses are added.
        tuning: Share of the budget for SFT of the teacher's LoRA module (OKD's module) before
            distillation; 0 for the base teacher.
        is_tuning_free: The fine-tuned teacher exists already: distillation has the whole budget.
    """

    method: Callable[[], DistillationCallback | list[DistillationCallback]]
    tuning: float = 0.0
    is_tuning_free: bool = False


def online_module(rank: int) -> LoraConfig:
    """Return OKD's default module with another rank."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])


CONTENDERS = {
    "SFT": Contender(SFT),
    "KD": Contender(KD),
    "OKD 0.3": Contender(lambda: OKD(alpha=0.3)),
    "tuned + KD": Contender(KD, tuning=0.375),
    "reverse KD": Contender(lambda: KD(divergence=ReverseKL())),
    "GKD 0.5": Contender(lambda: GKD(beta=0.5, on_policy_fraction=0.5)),
    "OKD 0.1": Contender(lambda: OKD(alpha=0.1)),
    "OKD 0.3 anchor 1": Contender(lambda: OKD(alpha=0.3, anchor_weight=1.0)),
    "OPD+": Contender(lambda: OPDPlus(divergence=ForwardKL())),
    "GKD 0": Contender(lambda: GKD(beta=0.5, on_policy_fraction=0.0)),
    "GKD 1": Contender(lambda: GKD(beta=0.5, on_policy_fraction=1.0)),
    "OKD 0.5": Contender(lambda: OKD(alpha=0.5)),
    "OKD 0.3 rank 8": Contender(lambda: OKD(alpha=0.3, online_module=online_module(8))),
    "ImitKD": Contender(ImitKD),
    "DistiLLM-2": Contender(DistiLLM2),
    "KD + CE": Contender(lambda: KD(cross_entropy_weight=0.5)),
    "OKD 0.3 + CE": Contender(lambda: [OKD(alpha=0.3, weight=0.5), SFT(weight=0.5)]),
    "tuned teacher: KD": Contender(KD, tuning=0.375, is_tuning_free=True),
    "tuned teacher: OKD 0.3": Contender(lambda: OKD(alpha=0.3), tuning=0.375, is_tuning_free=True),
}
"""Name → contender, in the order of the screen.

"tuned + KD" pays for the fine-tuning out of its budget. In "tuned teacher: ..." the fine-tuned
teacher is the base teacher of both methods, at no cost."""


def tuned_teacher(places: Places, budget: float, seed: int) -> tuple[str, dict[str, Any]]:
    """Fine-tune OKD's module on the training rows; return the merged teacher, and its costs.

    The contenders of one seed share it: it is kept in the work folder, with its costs.
    """
    folder = places.work / f"tuned-{places.task}-{places.rows}-{budget:g}-{seed}"
    costs = folder / "costs.json"
    if costs.is_file():
        return str(folder), json.loads(costs.read_text("utf-8"))
    base = AutoModelForCausalLM.from_pretrained(places.teacher, dtype="float32")
    tuned = get_peft_model(base, online_module(32))
    module = DistillationModule(
        tuned,
        tokenizer=str(places.teacher),
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
    )
    spent, steps = fit(places, module, SFT(), budget, seed, validates=False)
    merged = tuned.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(places.teacher).save_pretrained(folder)
    found = {"tuning_cpu_seconds": round(spent.seconds, 2), "tuning_steps": steps}
    found |= {"tuned_teacher": evaluate(places, merged)}
    costs.write_text(json.dumps(found), "utf-8")
    return str(folder), found


def run(places: Places, name: str, budget: float, seed: int) -> dict[str, Any]:
    """Train and measure one contender.

    Args:
        places: Folders.
        name: Key of CONTENDERS.
        budget: CPU seconds of training and rollouts, on one thread.
        seed: Seed of the order of rows, samples and the online module.

    Returns:
        Steps, CPU seconds, the curve of the validations in training (divergences there are to the
        teacher that the contender has: the fine-tuned one after tuning, and ``adapted_*`` to OKD's)
        and the final measures against the references and the base teacher.
    """
    contender, found = CONTENDERS[name], dict[str, Any]()
    student = warm_start(places)
    lightning.seed_everything(seed, verbose=False)
    teacher = str(places.teacher)
    rest = budget
    if contender.tuning:
        teacher, costs = tuned_teacher(places, contender.tuning * budget, seed)
        found |= costs
        rest = budget if contender.is_tuning_free else budget - costs["tuning_cpu_seconds"]
    module = DistillationModule(
        str(student),
        teacher,
        tokenizer=str(places.teacher),
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP_STEPS,
    )
    spent, steps = fit(places, module, contender.method(), rest, seed)
    assert module.student is not None
    found |= {"steps": steps, "cpu_seconds": round(spent.seconds, 2), "curve": spent.curve}
    return found | {"final": evaluate(places, module.student)}
