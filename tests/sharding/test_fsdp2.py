"""FSDP2 and DDP on two gloo processes against one process without either (METHODS.md, test 7).

Frozen here: losses, gradients and weights of KD, GKD, OKD and OPD+ over ten steps are those of one
process, and for LoRA students with accumulation over five (under DDP: test_ddp.py too), with ranks
that have no rows in a step and shorter last batches; so are self-teachers, stages, rewards, prompt
learning, and every way of sharding; ranks with different numbers of responses wait for each other;
gradients are sent once, and heads and generating students are gathered once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
import tiny
import torch
from parallel_runs import run, spawn
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig
from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
    DefaultAllGather,
    DefaultReduceScatter,
)
from transformers import AutoModelForCausalLM

from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    SFT,
    ExactMatch,
    OPDPlus,
    PaperMeasures,
    Reward,
    Stage,
    TeacherDrift,
)
from okd_lightning.checkpoints.contents import check_finite
from okd_lightning.divergences import JensenShannon
from okd_lightning.errors import NonFiniteError
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.teachers import AveragedSelf, FrozenSelf, LiveSelf
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.step import FiniteGuard

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the teacher drifts:UserWarning"),
]
METHODS = {
    "KD": lambda: [KD(temperature=2.0, cross_entropy_weight=0.2)],
    "GKD": lambda: [GKD(0.5, on_policy_fraction=0.5)],
    "OKD": lambda: [OKD(online_module=LoraConfig(r=2), learning_rate=0.5, clip_norm=0.5)],
    "OPD+": lambda: [OPDPlus(JensenShannon(0.5))],
}


def lora(*modules: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(modules or ("q_proj", "v_proj")))


FEW = {"max_steps": 5}  # of the ten that a run has elsewhere
MATRIX = {
    f"{method}, {'LoRA' if adapter else 'full'}, accumulation {accumulate}": {
        "methods": METHODS[method],
        "adapter": adapter,
        "accumulate": accumulate,
        "settings": {} if adapter is None else FEW,
    }
    for method in METHODS
    for adapter, accumulate in ((None, 1), (lora(), 3))  # MORE accumulates without an adapter
}
PAIRS = [
    *((name, "fsdp2") for name in MATRIX),
    *((f"{method}, LoRA, accumulation 3", "ddp") for method in ("GKD", "OPD+")),
]
ANCHORED = {"on_policy_fraction": 0.5, "anchor_weight": 0.5, "learning_rate": 0.5}
SELF_TAUGHT = {
    f"{kind.__name__}{', LoRA' if adapter else ''}": {
        "methods": METHODS["GKD"],
        "accumulate": 2,
        "data": {"teacher_prompt_template": "{reference}p{prompt}"},
        "model": {"teacher": kind()},
        "adapter": adapter,
        "settings": FEW,
    }
    for kind in (FrozenSelf, AveragedSelf, LiveSelf)
    for adapter in (None, lora("q_proj", "lm_head"))
}


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


MORE = {
    **SELF_TAUGHT,
    "anchored OKD, LoRA on both heads": {
        "methods": lambda: [OKD(online_module=lora("q_proj", "lm_head"), **ANCHORED)],
        "adapter": lora("v_proj", "lm_head"),
        "accumulate": 2,
        "settings": {"val_check_interval": 2, **FEW},
        "callbacks": lambda: [TeacherDrift(margin=1e-3, action="freeze")],
    },
    "OKD in a later stage, untied": {
        "methods": lambda: [
            Stage(SFT(), end=2),
            Stage(OKD(online_module=lora("q_proj", "lm_head"), learning_rate=0.5), start=2, end=4),
            Stage(OPDPlus(JensenShannon(0.5), discount=0.5), start=4),
        ],
        "model": {"student": "untied", "tile_positions": 2},
        "settings": {"max_steps": 6},
    },
    "tiles, discount, chunks": {
        "methods": lambda: [KD(weight=0.5), OPDPlus(JensenShannon(0.5), discount=0.5)],
        "model": {"tile_positions": 2},
        "data": {"prompts_per_rollout": 16},
        "accumulate": 2,
        "settings": FEW,
    },
    "a reward, checkpointed GPT-2": {
        "methods": lambda: [KD(), Reward(length_of, "leave_one_out", weight=0.05)],
        "model": {"student": "gpt2", "gradient_checkpointing": True},
        "data": {"samples_per_prompt": 2},
        "accumulate": 2,
        "settings": FEW,
    },
    "one prompt left": {
        "methods": lambda: [GKD(1.0, on_policy_fraction=1.0)],
        "num": 9,
        "settings": {"val_check_interval": 2, "max_steps": 4},
        "callbacks": lambda: [ExactMatch(), PaperMeasures(), FiniteGuard()],
    },
    "P-tuning": {
        "methods": lambda: [OKD(online_module=PromptEncoderConfig(num_virtual_tokens=3))],
        "settings": FEW,
    },
    "prefix": {
        "methods": lambda: [OKD(online_module=PrefixTuningConfig(num_virtual_tokens=3))],
        "settings": FEW,
    },
    "rows on both sides of rotary switches": {
        "methods": lambda: [GKD(0.5, on_policy_fraction=0.5)],
        "model": {"student": "longrope", "teacher": "dynamic"},
        "accumulate": 2,
        "settings": {"max_steps": 4, "val_check_interval": 4},
    },
}
ROPES = {  # other frequencies from the seventh token on
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": 6,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
WAYS = {  # of FSDP2 itself, on one run
    "layerwise": {"rollouts": "layerwise"},
    "kept, reduced at once": {"reshard_after_forward": False, "reduce_every_micro_batch": True},
}
BY_SHARD = {
    "read by shard, OKD": {
        "methods": lambda: [OKD(online_module=lora("q_proj", "lm_head"), **ANCHORED)],
        "adapter": lora("v_proj", "lm_head"),
    },
    "read by shard, moving average": SELF_TAUGHT["AveragedSelf"],
    "read by shard, GPT-2": MORE["a reward, checkpointed GPT-2"],
    "read by shard, rotary switches": MORE["rows on both sides of rotary switches"],
}


def settings_of(root: Path, run_settings: dict) -> dict:
    """Return settings with folders in place of names, and new callbacks."""
    found = dict(run_settings)
    model = dict(found.get("model", {}))
    for side in ("student", "teacher"):
        if isinstance(model.get(side), str):
            model[side] = str(root / model[side])
    found["model"] = model
    if "callbacks" in found:
        found["callbacks"] = found["callbacks"]()
    return found


class Traffic:
    """Counts of FSDP2's collective calls, also of those during generation."""

    def __init__(self) -> None:
        self.gathers, self.reductions, self.while_writing = 0, 0, []
        self._write = DistillationModule.respond

    def __enter__(self) -> Traffic:
        gather, reduce = DefaultAllGather.__call__, DefaultReduceScatter.__call__
        traffic = self

        def counted_gather(*args, **kwargs):
            traffic.gathers += 1
            return gather(*args, **kwargs)

        def counted_reduce(*args, **kwargs):
            traffic.reductions += 1
            return reduce(*args, **kwargs)

        def counted_write(module, *args, **kwargs):
            before = traffic.gathers
            rollout = traffic._write(module, *args, **kwargs)
            traffic.while_writing.append(traffic.gathers - before)
            return rollout

        self._stack = ExitStack()
        self._stack.enter_context(patch.object(DefaultAllGather, "__call__", counted_gather))
        self._stack.enter_context(patch.object(DefaultReduceScatter, "__call__", counted_reduce))
        self._stack.enter_context(patch.object(DistillationModule, "respond", counted_write))
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()


def count(root: Path, methods, model: dict | None = None, **arguments) -> Traffic:
    """Count the calls of one optimizer step of three micro-batches; the student has three units."""
    with Traffic() as traffic:
        step = {"max_steps": 1, "gradient_clip_val": None}
        strategy = FSDP2Strategy(**arguments)
        run(root, strategy, methods, accumulate=3, num=12, settings=step, model=model)
    traffic._stack, traffic._write = None, None  # what is left can be pickled
    return traffic


def traffic(root: Path) -> dict[str, Traffic]:
    return {
        "KD": count(root, METHODS["KD"]),
        "tiles": count(root, METHODS["KD"], {"tile_positions": 1}),
        "every micro-batch": count(root, METHODS["KD"], reduce_every_micro_batch=True),
        "gathered": count(root, METHODS["OPD+"]),
        "layerwise": count(root, METHODS["OPD+"], rollouts="layerwise"),
    }


def both_ranks(rank: int, root: Path) -> None:
    results = {}
    for name, strategy in PAIRS:
        results[name, strategy] = run(root, strategy, **settings_of(root, MATRIX[name]))
    for name, settings in MORE.items():
        results[name, "fsdp2"] = run(root, "fsdp2", **settings_of(root, settings))
    for name, arguments in WAYS.items():
        settings = settings_of(root, MORE["one prompt left"])
        results[name] = run(root, FSDP2Strategy(**arguments), **settings, accumulate=2)
    results["traffic"] = traffic(root)
    no_whole_models = patch.object(AutoModelForCausalLM, "from_pretrained", None)
    for name, settings in BY_SHARD.items():
        with no_whole_models:
            strategy = FSDP2Strategy(loading="by_shard")
            results[name] = run(root, strategy, **settings_of(root, settings))
    results["finite"] = refusal_of(rank)
    torch.save(results, root / f"rank{rank}.pt")


def refusal_of(rank: int) -> str:
    """Weights of which one rank's shard alone is broken."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    weights = {"first": torch.ones(3), "second": torch.full((2,), torch.inf if rank else 1.0)}
    check_finite({"first": torch.ones(3), "empty": torch.ones(0)}, "nothing")
    try:
        check_finite(weights, "the checkpoint")
    except NonFiniteError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    root = tmp_path_factory.mktemp("fsdp2")
    models = {
        "student": tiny.make_llama(1, tie_word_embeddings=True),
        "untied": tiny.make_llama(5),
        "teacher": tiny.make_llama(2, tiny.TEACHER_ROWS),
        "longrope": tiny.make_llama(6, rope_parameters=ROPES["longrope"]),
        "dynamic": tiny.make_llama(7, rope_parameters=ROPES["dynamic"], max_position_embeddings=6),
        "gpt2": tiny.make_gpt2(3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def ranks(folder):
    spawn(both_ranks, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder) -> Callable[..., dict]:
    """Runs on one process, each made once."""
    made = {}

    def run_alone(kind: dict, name: str, **more) -> dict:
        key = name, *sorted(more.items())
        if key not in made:
            made[key] = run(folder, None, **settings_of(folder, kind[name]), **more)
        return made[key]

    return run_alone


def check(found: dict, alone: dict) -> None:
    """Compare two runs: float64 weights and gradients, numbers logged in float32."""
    assert found["steps"] == alone["steps"] == len(alone["losses"])
    assert found["difference"] == 0
    assert tiny.distance(found["weights"], alone["weights"]) < 1e-9
    for own, expected in zip(found["gradients"], alone["gradients"], strict=True):
        assert tiny.distance(own, expected) < 1e-9
    for own, expected in zip(found["losses"], alone["losses"], strict=True):
        own = {name: value for name, value in own.items() if name in expected}
        assert own == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert found["measures"] == pytest.approx(alone["measures"], rel=1e-5)


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_two_ranks_do_what_one_does(name, strategy, alone, ranks):
    expected = alone(MATRIX, name)
    assert expected["steps"] == MATRIX[name]["settings"].get("max_steps", 10)
    for rank in ranks:
        check(rank[name, strategy], expected)


@pytest.mark.parametrize("name", MORE)
def test_sharded_ranks_do_what_one_does(name, alone, ranks):
    for rank in ranks:
        check(rank[name, "fsdp2"], alone(MORE, name))


@pytest.mark.parametrize("name", BY_SHARD)
def test_shards_read_from_disk_are_those_of_a_loaded_model(name, alone, ranks):
    for rank in ranks:
        check(rank[name], alone(BY_SHARD, name))


@pytest.mark.parametrize("name", WAYS)
def test_every_way_of_sharding_gives_the_same(name, alone, ranks):
    expected = alone(MORE, "one prompt left", accumulate=2)
    for rank in ranks:
        check(rank[name], expected)


def test_all_ranks_refuse_weights_that_one_rank_sees_broken(ranks):
    for rank in ranks:
        assert "1 weights hold NaN or infinite values (such as second)" in rank["finite"]


def test_gradients_are_sent_and_heads_are_gathered_once_a_step(ranks):
    for rank in ranks:
        traffic = rank["traffic"]
        assert traffic["KD"].reductions == 3  # units of the student
        assert traffic["every micro-batch"].reductions == 9
        assert traffic["tiles"].gathers == traffic["KD"].gathers
        assert set(traffic["gathered"].while_writing) == {3}
        assert min(traffic["layerwise"].while_writing) > 3
