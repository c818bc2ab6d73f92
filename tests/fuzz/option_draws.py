"""Draws of what a run is made of: a method, models and teachers, an optimizer, a Trainer."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from typed_commands import Words

Draw: TypeAlias = random.Random

_DIVERGENCES: tuple[Words, ...] = (
    ["ForwardKL"],
    ["ReverseKL"],
    ["Jeffreys"],
    ["JensenShannon"],
    ["JensenShannon", ".beta", "0.1"],
    ["JensenShannon", ".beta", "1"],
    ["JensenShannon", ".normalised", "true"],
    ["SkewForwardKL", ".alpha", "0.2"],
    ["SkewReverseKL"],
    ["AlphaDivergence", ".alpha", "0.5"],
    ["AlphaDivergence", ".alpha=-0.5"],
    ["PearsonChiSquared"],
    ["NeymanChiSquared"],
    ["SquaredHellinger"],
    ["TotalVariation"],
    ["TopK", ".k", "8", ".divergence", "ReverseKL"],
    ["TopK", ".k", "300", ".divergence", "JensenShannon", ".side", "student"],
    ["Tempered", ".temperature", "2", ".divergence", "ForwardKL"],
)
_ADAPTERS: tuple[Words, ...] = (
    ["LoraConfig", ".r", "2"],
    ["LoraConfig", ".r", "4", ".lora_dropout", "0.1", ".target_modules", "all-linear"],
    ["LoraConfig", ".r", "2", ".use_rslora", "true", ".bias", "lora_only"],
    ["LoraConfig", ".r", "2", ".use_dora", "true"],
    ["IA3Config"],
    ["LoHaConfig", ".r", "2"],
    ["VeraConfig", ".r", "4"],
    ["PromptTuningConfig", ".num_virtual_tokens", "3"],
    ["BOFTConfig", ".boft_block_size", "4"],
    ["OFTConfig", ".oft_block_size", "4"],
)


def _under(option: str, words: Sequence[str]) -> Words:
    """``["X", ".a", "1"]`` as options of one setting; a dotted word belongs to the setting."""
    head, *rest = words
    return [option, head, *(f"{option}{word}" if word[0] == "." else word for word in rest)]


def maybe(draw: Draw, chance: float, *choices: Words) -> Words:
    return list(draw.choice(choices)) if draw.random() < chance else []


def _divergence(draw: Draw, option: str, chance: float = 0.8) -> Words:
    return _under(option, draw.choice(_DIVERGENCES)) if draw.random() < chance else []


# ---------------------------------------------------------------- methods


def _sft(draw: Draw, at: str) -> Words:
    return ["SFT", *maybe(draw, 0.3, [f"{at}.seq_kd", "true"])]


def _kd(draw: Draw, at: str) -> Words:
    return [
        *("KD", *_divergence(draw, f"{at}.divergence")),
        *maybe(draw, 0.4, [f"{at}.temperature", "2"], [f"{at}.temperature", "0.5"]),
        *maybe(draw, 0.4, [f"{at}.cross_entropy_weight", "0.5"]),
        *maybe(draw, 0.2, [f"{at}.seq_kd", "true"]),
    ]


def _gkd(draw: Draw, at: str) -> Words:
    shape = maybe(draw, 0.5, [f"{at}.beta", draw.choice(("0", "0.1", "0.5", "1"))])
    return [
        *("GKD", *(shape or _divergence(draw, f"{at}.divergence"))),
        *(f"{at}.on_policy_fraction", share := draw.choice(("0", "0.3", "0.5", "1"))),
        *maybe(draw, 0.3, [f"{at}.temperature", "2"]),
        *maybe(draw, 0.2 * (share != "1"), [f"{at}.seq_kd", "true"]),
    ]


def _okd(draw: Draw, at: str) -> Words:
    module = _under(f"{at}.online_module", draw.choice(_ADAPTERS)) if draw.random() < 0.6 else []
    return [
        *("OKD", *_divergence(draw, f"{at}.divergence", 0.4), *module),
        *_divergence(draw, f"{at}.teacher_divergence", 0.3),
        *maybe(draw, 0.5, [f"{at}.alpha", "0.5"], [f"{at}.alpha", "0"]),
        *maybe(draw, 0.5, [f"{at}.learning_rate", "1e-2"]),
        *maybe(draw, 0.3, [f"{at}.clip_norm", "0.5"]),
        *maybe(draw, 0.3, [f"{at}.warmup_steps", "2"]),
        *maybe(draw, 0.3, [f"{at}.schedule", "linear"], [f"{at}.schedule", "cosine"]),
        *maybe(draw, 0.3, [f"{at}.anchor_weight", "0.1"]),
        *maybe(draw, 0.3, [f"{at}.log_shift", "true"]),
        *maybe(draw, 0.5, [f"{at}.on_policy_fraction", "0.5"]),
    ]


def _limits(draw: Draw, at: str) -> Words:
    return [
        *maybe(draw, 0.3, [f"{at}.max_ratio", "3"]),
        *maybe(draw, 0.3, [f"{at}.clip", "0.2"]),
    ]


def _opd(draw: Draw, at: str) -> Words:
    return [
        *("OPD", *_divergence(draw, f"{at}.divergence", 0.5), *_limits(draw, at)),
        *maybe(draw, 0.3, [f"{at}.discount", "0.9"]),
        *maybe(draw, 0.3, [f"{at}.max_log_ratio", "5"]),
        *maybe(draw, 0.2, [f"{at}.frozen_credit", "true"]),
    ]


def _opd_plus(draw: Draw, at: str) -> Words:
    return [
        *("OPDPlus", *_divergence(draw, f"{at}.divergence", 0.6), *_limits(draw, at)),
        *maybe(draw, 0.5, [f"{at}.variant", "centred"], [f"{at}.variant", "value_baseline"]),
        *maybe(draw, 0.3, [f"{at}.discount", "0.5"]),
    ]


def _exact(draw: Draw, at: str) -> Words:
    return [
        *("DivergenceCallback", *_under(f"{at}.divergence", draw.choice(_DIVERGENCES))),
        *maybe(draw, 0.5, [f"{at}.on_policy_fraction", "0.5"]),
        *maybe(draw, 0.3, [f"{at}.cross_entropy_weight", "0.3"]),
        *maybe(draw, 0.3, [f"{at}.weight", "0.3"]),
    ]


def _sampled(draw: Draw, at: str) -> Words:
    credit = f"{at}.advantage"
    return [
        *("AdvantageCallback", credit, "FDivergenceAdvantage"),
        *_under(f"{credit}.divergence", draw.choice(_DIVERGENCES)),
        *maybe(draw, 0.5, [f"{credit}.variant", draw.choice(("biased", "centred"))]),
        *_limits(draw, at),
    ]


def _reward(draw: Draw, at: str) -> Words:
    function = draw.choice((["RougeL"], ["AnswerMatch"], ["RougeL", ".stem", "false"]))
    return [
        *("Reward", *_under(f"{at}.function", function), *_limits(draw, at)),
        *maybe(draw, 0.6, [f"{at}.baseline", draw.choice(("mean", "leave_one_out"))]),
        *maybe(draw, 0.2, [f"{at}.on_failure", "stop"]),
    ]


def _stage(draw: Draw, at: str) -> Words:
    inner = draw.choice((_kd, _gkd, _opd_plus))(draw, f"{at}.method")
    return [
        *("Stage", f"{at}.method", *inner),
        *maybe(draw, 0.5, [f"{at}.start", "1"]),
        *maybe(draw, 0.5, [f"{at}.end", "3"]),
        *maybe(draw, 0.5, [f"{at}.last_factor", "0.1"]),
    ]


_SHELF = (
    *("distillm.DistiLLM", "distillm2.DistiLLM2", "idaopd.IDAOPD", "imitkd.ImitKD", "iwopd.IWOPD"),
    *("lightningopd.LightningOPD", "minillm.MiniLLM", "opsd.OPSD", "poweropd.PowerOPD"),
    *("topd.TOPD", "tropd.TrOPD", "vopd.VOPD"),
)


def _shelf(draw: Draw, at: str) -> Words:
    return [f"callbacks.{draw.choice(_SHELF)}", *maybe(draw, 0.2, [f"{at}.weight", "0.5"])]


_METHODS: tuple[Callable[[Draw, str], Words], ...] = (
    *(_sft, _kd, _gkd, _gkd, _okd, _okd, _opd, _opd_plus, _opd_plus),
    *(_exact, _sampled, _reward, _stage, _shelf, _shelf),
)


def draw_methods(draw: Draw) -> Words:
    words = ["--method", *draw.choice(_METHODS)(draw, "--method")]
    if draw.random() < 0.15:
        at = "--trainer.callbacks"
        words += [f"{at}+={(second := draw.choice(_METHODS)(draw, at))[0]}", *second[1:]]
        words += [f"{at}.name", "second"] if second[0] != "Stage" else []
    return words


# ---------------------------------------------------------------- models and teachers


def draw_models(
    draw: Draw, assets: Path, folder: Path, url: str, methods: Words, is_chat: bool
) -> Words:
    """Draw student and teacher of some methods, and sometimes a server that generates."""
    has_engine = "on_policy_fraction" in " ".join(methods) and draw.random() < 0.25
    names = ("student", "student", "gpt2", "tied", "narrow")
    student = "chats" if is_chat else "student" if has_engine else draw.choice(names)
    words = ["--model.student", str(assets / student)]
    if not (is_chat or has_engine) and draw.random() < 0.08:
        fresh = "{model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1}"
        words = ["--model.student", fresh, "--model.tokenizer", str(assets / "student")]
    if draw.random() < 0.25:
        words += _under("--model.student_adapter", draw.choice(_ADAPTERS))
    words += draw.choice(_teachers(draw, assets, folder, url, methods))
    if has_engine:
        at = "--model.engine"
        words += [at, "VLLMServer", f"{at}.url", url, f"{at}.sync_folder", str(folder / "weights")]
    return [
        *words,
        *maybe(draw, 0.15, ["--model.dtype", draw.choice(("bfloat16", "float64"))]),
        *maybe(draw, 0.1, ["--model.teacher_dtype", "bfloat16"]),
        *maybe(draw, 0.15, ["--model.attn_implementation", draw.choice(("sdpa", "eager"))]),
        *maybe(draw, 0.15, ["--model.gradient_checkpointing", "true"]),
        *maybe(draw, 0.2, ["--model.packing", "false"]),
        *maybe(draw, 0.2, ["--model.tile_positions", draw.choice(("1", "5", "1000"))]),
        *maybe(draw, 0.3, ["--model.normalization", draw.choice(_NORMALIZATIONS)]),
    ]


def _teachers(draw: Draw, assets: Path, folder: Path, url: str, methods: Words) -> list[Words]:
    """The teachers that some methods can have; a loaded one more often than others."""
    said = " ".join(methods)
    teacher = ["--model.teacher", str(assets / draw.choice(("teacher", "gpt2")))]
    template = ["--data.teacher_prompt_template", "{prompt}{reference}"]
    served = ["--model.teacher", "ServedTeacher"]
    cached = ["--model.teacher", "CachedTeacher", "--model.teacher.model", teacher[1]]
    found = [teacher, teacher, teacher, [*teacher, *template]]
    found.append(["--model.teacher", "FrozenSelf", *template])
    if "OKD" not in methods:
        found.append(["--model.teacher", draw.choice(("AveragedSelf", "LiveSelf")), *template])
    if not any(part in said for part in ("OKD", "seq_kd", "temperature", "Tempered", "callbacks.")):
        found.append([*served, "--model.teacher.url", url, "--model.teacher.k", "6"])
        if not any(part in said for part in ("OPD", "GKD", "on_policy", "Advantage")):
            found += [[*cached, "--model.teacher.folder", str(folder / "cache")]] * 2
    if methods[1:] in (["SFT"],) or (methods[1] == "Reward" and "+=" not in said):
        found = [[]]
    return found


_NORMALIZATIONS = ("running_mean", "constant", "token_mean", "7.5")


# ---------------------------------------------------------------- optimizers


def draw_optimizer(draw: Draw) -> Words:
    at = "--model.optimizer"
    optimizer = maybe(
        draw,
        0.3,
        [at, "SGD", f"{at}.momentum", "0.9"],
        [at, "AdamW", f"{at}.betas", "[0.8, 0.9]", f"{at}.eps", "1e-6"],
        [at, "Adafactor"],
        [at, "RMSprop"],
        [at, "NAdam"],
        [at, "Muon"],
    )
    rate = draw.choice(("1e-2", "3e-3", "1e-4"))
    at = "--model.lr_scheduler"
    rates = draw.choice(
        (
            ["--model.schedule", "cosine"],
            ["--model.schedule", "linear", "--model.warmup_steps", "2"],
            ["--model.warmup_steps", "3"],
            [],
            [at, "StepLR", f"{at}.step_size", "2", f"{at}.gamma", "0.5"],
            [at, "CosineAnnealingLR", f"{at}.T_max", "5"],
            [at, "OneCycleLR", f"{at}.max_lr", "0.01", f"{at}.total_steps", "40"],
        )
    )
    decay = maybe(draw, 0.3, ["--model.weight_decay", "0.1"])
    return [*optimizer, "--model.learning_rate", rate, *rates, *decay]


# ---------------------------------------------------------------- the Trainer


def draw_callbacks(draw: Draw) -> Words:
    at = "--trainer.callbacks"
    known: tuple[tuple[float, Words], ...] = (
        (0.4, ["RolloutLog", ".every_n_steps", "2"]),
        (0.2, ["SampleTable", ".every_n_steps", "2", ".num_prompts", "1"]),
        (0.2, ["HealthWarnings", ".every_n_steps", "2"]),
        (0.1, ["ExactMatch"]),
        (0.1, ["AvgAtK", ".k", "2"]),
        (0.1, ["TaskScore", ".function", "RougeL", ".name", "rouge"]),
        (0.1, ["PaperMeasures", ".num_prompts", "3"]),
        (0.1, ["TeacherDrift"]),
        (0.1, ["LearningRateMonitor"]),
        (0.1, ["BestCheckpoint", ".keep", "2"]),
        (0.05, ["EarlyStopping", ".monitor", "val/cross_entropy", ".patience", "1"]),
        (0.02, ["GradientAccumulationScheduler", ".scheduling", "{0: 1, 1: 2}"]),
        (0.05, ["StochasticWeightAveraging", ".swa_lrs", "1e-3"]),
        (0.05, ["WeightAveraging"]),
        (0.05, ["Timer"]),
    )
    found = [f"{at}+=LastCheckpoint", f"{at}.every_n_steps", draw.choice(("1", "2", "3"))]
    found += maybe(draw, 0.3, [f"{at}.keep", "2"])
    for chance, (name, *rest) in known:
        if draw.random() < chance:
            found += [f"{at}+={name}", *(f"{at}{w}" if w[0] == "." else w for w in rest)]
    return found


def draw_trainer(draw: Draw) -> Words:
    length = draw.choice((["max_steps", "5"], ["max_epochs", "1"], ["max_epochs", "2"]))
    flags: tuple[tuple[float, str, str], ...] = (
        (0.3, "val_check_interval", draw.choice(("2", "3", "0.5", "1.0"))),
        (0.1, "check_val_every_n_epoch", "2"),
        (0.15, "precision", draw.choice(("bf16-mixed", "32-true", "64-true", "bf16-true"))),
        (0.2, "gradient_clip_val", draw.choice(("0.1", "0", "null"))),
        (0.1, "gradient_clip_algorithm", "value"),
        (0.1, "log_every_n_steps", "3"),
        (0.1, "num_sanity_val_steps", "1"),
        (0.03, "limit_train_batches", draw.choice(("3", "0.5"))),
        (0.1, "limit_val_batches", draw.choice(("1", "0.5", "0"))),
        (0.1, "deterministic", "true"),
        (0.05, "detect_anomaly", "true"),
        (0.05, "reload_dataloaders_every_n_epochs", "1"),
        (0.05, "min_steps", "2"),
        (0.05, "profiler", "simple"),
        (0.05, "use_distributed_sampler", "false"),
    )
    words = [f"--trainer.{length[0]}", length[1]]
    for chance, name, value in flags:
        if draw.random() < chance:
            words += [f"--trainer.{name}", value]
    words += maybe(draw, 0.2, ["--seed_everything", "7"])
    return words
