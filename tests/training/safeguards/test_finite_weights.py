"""Weights that are trained stay finite, and broken ones are not written.

Frozen here: float16 weights are not trained, whether the format was named, the model was in memory,
or a trained part alone is in it, from Python and from the command line, before anything is loaded;
they may be measured, be frozen under a float32 adapter, or teach; weights that have become NaN or
infinite are written into no checkpoint and no export, and what was written before stays; the guard
does not call broken weights untouched.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig

from okd_lightning.__main__ import main
from okd_lightning.callbacks import KD, OKD
from okd_lightning.callbacks.monitors.last_checkpoint import LastCheckpoint
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.commands.export import export_online_module, export_student
from okd_lightning.errors import ConfigError, NonFiniteError
from okd_lightning.training.optimizers import build_optimizer
from okd_lightning.training.step import FiniteGuard

pytestmark = pytest.mark.filterwarnings(  # PEFT's use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
REFUSED = "the student would be trained in float16 weights"


@pytest.fixture
def pair(tmp_path, tiny_tokenizer):
    for name, model in (("student", tiny.make_llama(1)), ("teacher", tiny.make_llama(2))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("student", "teacher")}


def test_float16_is_refused_before_anything_is_loaded(pair, tmp_path, make_module):
    module = make_module(**pair, tokenizer=None, dtype="float16")
    with pytest.raises(ConfigError, match=REFUSED):
        tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4))
    assert module.student is None


def test_a_loaded_model_in_float16_is_refused(tmp_path, make_module):
    module = make_module(student=tiny.make_llama(1).half())
    with pytest.raises(ConfigError, match=REFUSED):
        tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4))


def test_the_hint_leads_to_training(tmp_path, make_module):
    """model.float(), or an adapter on the frozen float16 weights."""
    for settings in (
        {"student": tiny.make_llama(1).half().float()},
        {"student": tiny.make_llama(1).half(), "student_adapter": LoraConfig(r=2)},
    ):
        module = make_module(**settings)
        recorder = tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4), max_steps=1)
        assert len(recorder.losses) == 1
        assert {p.dtype for p in module.trained_parameters(module.student)} == {torch.float32}


def test_the_command_line_refuses(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "ab", "response": "cd"}\n' * 4)
    arguments = ["fit", "--method", "KD", "--model.dtype", "float16", "--data.train", "rows.jsonl"]
    arguments += ["--model.student", pair["student"], "--model.teacher", pair["teacher"]]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]
    assert main(arguments) == 1
    assert REFUSED in capsys.readouterr().err


def test_float16_may_be_measured_and_teach(tmp_path, make_module):
    module = make_module(student=tiny.make_llama(1).half())
    limits = {"max_prompt_length": 16, "max_response_length": 8, "val_rollouts": 0}
    data = tiny.RolloutDataModule(None, tiny.make_rows(3), batch_size=2, **limits)
    (found,) = tiny.make_trainer(tmp_path).validate(module, data, verbose=False)
    assert found["val/forward_kl"] > 0
    module = make_module(teacher=tiny.make_llama(2).half())
    method = OKD(learning_rate=0.5, online_module=LoraConfig(r=2))
    recorder = tiny.fit(tmp_path, module, [method], tiny.make_rows(4), max_steps=1)
    assert len(recorder.losses) == 1
    assert {p.dtype for p in module.trained_parameters(module.teacher)} == {torch.float32}


@pytest.mark.parametrize("side", ["student", "teacher's online module"])
def test_no_optimizer_gets_a_trained_float16_part(side):
    sides = {"student": [torch.nn.Parameter(torch.ones(2, 2))]}
    sides["teacher's online module"] = [torch.nn.Parameter(torch.ones(2, 2))]
    sides[side] += [torch.nn.Parameter(torch.ones(3).half(), requires_grad=False)]
    build_optimizer(*sides.values(), 1e-3, 0.0)
    sides[side][-1].requires_grad_(True)
    with pytest.raises(ConfigError, match=f"the {side} would be trained in float16"):
        build_optimizer(*sides.values(), 1e-3, 0.0)


class Break(Callback):
    """Callback that fills a trained tensor with NaN after a step."""

    def __init__(self, side: str, step: int = 2) -> None:
        self.side, self.step = side, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            model = getattr(pl_module, self.side)
            with torch.no_grad():
                pl_module.trained_parameters(model)[0].fill_(torch.nan)


@pytest.mark.parametrize("kind", [LastCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_no_checkpoint_of_broken_weights(side, kind, tmp_path, make_module):
    if kind is LastCheckpoint:
        callback = LastCheckpoint(every_n_steps=1, keep=2)
    else:
        callback = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="c", save_top_k=1)
    method = OKD(learning_rate=0.1, online_module=LoraConfig(r=2))
    with pytest.raises(NonFiniteError, match=rf"such as {side}\..*step 2 is not written"):
        tiny.fit(
            tmp_path, make_module(), [method], tiny.make_rows(16), callbacks=[Break(side), callback]
        )
    (path,) = (p for p in tmp_path.rglob("*.ckpt") if "last-step" not in p.name)
    assert read_checkpoint(str(path))["global_step"] == 1


def test_no_export_of_broken_weights(tmp_path, make_module, pair):
    def fresh():
        return make_module(**pair, tokenizer=None)

    module = fresh()
    last = LastCheckpoint()
    method = OKD(learning_rate=0.1, online_module=LoraConfig(r=2))
    tiny.fit(tmp_path, module, [method], tiny.make_rows(4), callbacks=[last], max_steps=1)
    checkpoint, out = read_checkpoint(str(last.path)), tmp_path / "out"
    for side, export in (("student.", export_student), ("teacher.", export_online_module)):
        export(fresh(), checkpoint, out)
        before = {path: path.read_bytes() for path in out.iterdir()}
        name = next(n for n in checkpoint["state_dict"] if n.startswith(side))
        broken = {**checkpoint["state_dict"]}
        broken[name] = torch.full_like(broken[name], torch.inf)
        with pytest.raises(NonFiniteError, match="is not written, and what was written before"):
            export(fresh(), {**checkpoint, "state_dict": broken}, out)
        assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_the_guard_says_what_is_true_of_the_weights(tmp_path, make_module):
    callbacks = [FiniteGuard(), Break("student", step=1)]
    with pytest.raises(NonFiniteError, match="hold NaN or infinite values from a step before"):
        tiny.fit(tmp_path, make_module(), [KD()], tiny.make_rows(16), callbacks=callbacks)
