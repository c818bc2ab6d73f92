"""OKD in training: the module's own schedule, recomputed activations, exact resume.

* The module's learning rate follows its own warm-up and schedule, the student's follows the
  student's; what is not given is the student's.
* With gradient checkpointing the teacher's layers run twice a step, its dropout stays off, and the
  gradients are bit for bit those without; for LoRA, on the head as well, and for P-tuning. Prefix
  tuning, which writes into the attention cache, is refused.
* A killed run with an anchor, an own schedule and own rows resumes bit for bit, for every kind of
  module, with and without recomputing.
"""

import contextlib

import pytest
import tiny
import torch
from peft import LoraConfig
from test_okd import CONFIGS
from test_okd_anchor import Shaken

from okd_lightning.callbacks import OKD, LastCheckpoint
from okd_lightning.errors import ConfigError
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.optimizers import schedule_factor

pytestmark = pytest.mark.filterwarnings(  # PEFT's use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def fit(root, callbacks, teacher=None, ckpt_path=None, **settings):
    """6 steps of 2 micro-batches of 2 rows."""
    module = DistillationModule(
        tiny.make_gpt2(1),
        teacher or tiny.make_llama(2, rows=tiny.TEACHER_ROWS),
        tokenizer=tiny.make_tokenizer(),
        **{"learning_rate": 1e-2, "warmup_steps": 1, "schedule": "cosine", **settings},
    )
    data = tiny.RolloutDataModule(
        tiny.make_rows(24), batch_size=2, max_prompt_length=8, max_response_length=6, seed=7
    )
    trainer = tiny.make_trainer(root, callbacks, accumulate_grad_batches=2)
    with contextlib.suppress(Killed):
        trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


class Killed(Exception):
    """Exception that ends a run in the middle."""


class Rates(tiny.Recorder):
    """The learning rates of every step, by side."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        online = {id(p) for p in pl_module.trained_parameters(pl_module.teacher)}
        sides = {}
        for group in optimizer.param_groups:
            side = "module" if id(group["params"][0]) in online else "student"
            assert sides.setdefault(side, group["lr"]) == group["lr"]
        self.seen.append(sides)


@pytest.mark.parametrize("factory", [None, lambda groups: torch.optim.SGD(groups, lr=1e-2)])
@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ("cosine", 1)),
        ({"schedule": "linear"}, ("linear", 1)),
        ({"schedule": "constant", "warmup_steps": 3}, ("constant", 3)),
        ({"warmup_steps": 0}, ("cosine", 0)),
    ],
)
def test_own_schedule(tmp_path, own, expected, factory):
    rates = Rates()
    method = OKD(online_module=CONFIGS["lora"](), learning_rate=3e-3, **own)
    fit(tmp_path, [method, rates], optimizer=factory)
    assert len(rates.seen) == 6
    for step, seen in enumerate(rates.seen):
        assert seen["student"] == pytest.approx(1e-2 * schedule_factor("cosine", step, 1, 6))
        name, warmup_steps = expected
        assert seen["module"] == pytest.approx(3e-3 * schedule_factor(name, step, warmup_steps, 6))


def test_a_schedule_without_an_end_names_the_methods_option(tmp_path):
    method = OKD(online_module=CONFIGS["lora"](), schedule="linear")
    module = DistillationModule(
        tiny.make_llama(1), tiny.make_llama(2), tokenizer=tiny.make_tokenizer()
    )
    data = tiny.RolloutDataModule(tiny.make_rows(4), batch_size=2, max_response_length=6)
    with pytest.raises(ConfigError, match=r"method.schedule linear needs to know the run's end"):
        tiny.make_trainer(tmp_path, [method], max_epochs=-1).fit(module, data)


class Passes(Shaken):
    """Counts the forward passes of the teacher's second layer during the first step."""

    calls = 0

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        (layer,) = [m for n, m in pl_module.teacher.named_modules() if n.endswith(LAYERS)]
        layer.register_forward_pre_hook(self.count)  # it may stop half-way

    def count(self, *_):
        if not self.gradients:
            self.calls += 1


LAYERS = ("layers.1.mlp", "layers.1.fc2")  # of Llama, of OPT: inside of what is recomputed
RECOMPUTED = {
    "lora": CONFIGS["lora"],
    "p_tuning": CONFIGS["p_tuning"],
    "head": lambda: LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "lm_head"]),
}


def make_opt():
    """OPT has dropout in the layer itself: training mode would switch it on."""
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(2)
        return OPTForCausalLM(
            OPTConfig(
                vocab_size=tiny.TEACHER_ROWS,
                hidden_size=32,
                word_embed_proj_dim=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                dropout=0.5,
                init_std=0.3,
                tie_word_embeddings=False,
            )
        )


@pytest.mark.parametrize("make_teacher", [lambda: None, make_opt], ids=["llama", "opt"])
@pytest.mark.parametrize("kind", RECOMPUTED)
@pytest.mark.parametrize("anchor_weight", [0.0, 0.5])
def test_recomputed_activations(tmp_path, kind, make_teacher, anchor_weight):
    found = {}
    for recompute in (False, True):
        torch.manual_seed(0)
        passes = Passes()
        method = OKD(online_module=RECOMPUTED[kind](), anchor_weight=anchor_weight)
        module, _ = fit(
            tmp_path, [method, passes], make_teacher(), gradient_checkpointing=recompute
        )
        found[recompute] = passes
        assert not any(m.training for m in module.teacher.modules())
    extra = 2 if anchor_weight else 0  # the base's passes are not recomputed
    assert found[False].calls == 2 + extra  # two micro-batches
    assert found[True].calls == 4 + extra
    for plain, recomputed in zip(found[False].gradients, found[True].gradients, strict=True):
        assert any(name.startswith("teacher.") for name in plain)
        assert plain.keys() == recomputed.keys()
        for name, gradient in plain.items():
            assert torch.equal(recomputed[name], gradient), name


def test_prefix_is_not_recomputed(tmp_path):
    method = OKD(online_module=CONFIGS["prefix"]())
    with pytest.raises(ConfigError, match=r"PrefixTuningConfig.*gradient_checkpointing off"):
        fit(tmp_path, [method], gradient_checkpointing=True)


class Killer(tiny.Recorder):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            raise Killed


@pytest.mark.parametrize(
    ("kind", "recompute"), [*((kind, False) for kind in CONFIGS), ("lora", True)]
)
def test_resume(tmp_path, kind, recompute):
    def run(root, callbacks=(), ckpt_path=None):
        torch.manual_seed(4)
        rates = Rates()
        method = OKD(
            alpha=1.0,
            anchor_weight=0.5,
            learning_rate=3e-3,
            warmup_steps=2,
            schedule="linear",
            on_policy_fraction=0.5,
            online_module=CONFIGS[kind](),
        )
        callbacks = [method, rates, LastCheckpoint(every_n_steps=1), *callbacks]
        module, trainer = fit(
            root, callbacks, ckpt_path=ckpt_path, gradient_checkpointing=recompute
        )
        return module, trainer, rates

    module, trainer, rates = run(tmp_path / "whole")
    run(tmp_path / "killed", [Killer()])
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    resumed, again, later = run(tmp_path / "killed", ckpt_path=str(last))
    assert (trainer.global_step, again.global_step) == (6, 6)
    assert later.seen == rates.seen[3:]
    found = dict(resumed.named_parameters())
    for name, value in module.named_parameters():
        assert torch.equal(found[name], value), name
    states = [t.optimizers[0].state_dict()["state"] for t in (again, trainer)]
    assert states[0].keys() == states[1].keys()
    for i, state in states[1].items():
        for name, value in state.items():
            assert torch.equal(states[0][i][name], value), (i, name)
