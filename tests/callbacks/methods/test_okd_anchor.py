"""OKD's anchor: anchor_weight · τ² KL(base^τ‖adapted^τ), an addition to the paper.

* Its gradient in the adapted teacher's logits is anchor_weight · τ (q^τ - q0^τ), besides the
  paper's two; the student's is as without it; for every kind of module, also one on the head.
* One backward over the sum is two separate ones, and neither side's loss reaches the other.
* The base is bit-identical after training, and its distribution is that of the plain base.
* alpha = 1 is allowed with it, and a large anchor weight keeps the teacher unchanged.
* The shift is logged in training with an anchor or on request, and always in validation, where it
  is KL(base‖adapted) at τ = 1; a second forward pass is made only where something asks for it.
"""

import dataclasses

import pytest
import reference_loss as reference
import tiny
import torch
from peft import LoraConfig
from test_okd import CONFIGS, GradientsInLogits, fit

from okd_lightning.callbacks import OKD

pytestmark = pytest.mark.filterwarnings(  # PEFT's use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
KINDS = {
    **CONFIGS,
    "head": lambda: LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "lm_head"]),
    "saved head": lambda: LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
}


class Shaken(tiny.Recorder):
    """Callback that changes the online module at the start: LoRA starts as the identity."""

    def on_train_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in pl_module.trained_parameters(pl_module.teacher):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def base_logits(batch) -> torch.Tensor:
    """[positions, ids] float64, of a teacher that never had a module."""
    model = tiny.make_llama(2, rows=tiny.TEACHER_ROWS)
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    return logits[:, :-1][batch.mask[:, 1:]].double()[:, : tiny.NUM_IDS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("alpha", "tau"), [(0.3, 1.0), (1.0, 1.0), (0.3, 2.0)])
def test_gradients_in_the_logits(tmp_path, kind, alpha, tau):
    weight, recorder = 0.7, GradientsInLogits()
    method = OKD(alpha=alpha, temperature=tau, anchor_weight=weight, online_module=KINDS[kind]())
    fit(tmp_path, [method, Shaken(), recorder], steps=1)
    (batch,) = recorder.steps[0]
    targets = batch.input_ids[:, 1:][batch.mask[:, 1:]]
    student, teacher = recorder.taken["student"], recorder.taken["teacher"]
    z_s, z_t = (z.detach().double()[:, : tiny.NUM_IDS] for z in (student, teacher))
    p, q, q0 = ((z / tau).softmax(-1) for z in (z_s, z_t, base_logits(batch)))
    assert (q - q0).abs().max() > 1e-2
    onehot = torch.nn.functional.one_hot(targets, tiny.NUM_IDS)
    paper = alpha * tau * (q - p) + (1 - alpha) * (z_t.softmax(-1) - onehot)
    expected = {"student": tau * (p - q), "teacher": paper + weight * tau * (q - q0)}
    for name, logits in (("student", student), ("teacher", teacher)):
        torch.testing.assert_close(
            logits.grad[:, : tiny.NUM_IDS].double(),
            expected[name] / len(targets),
            atol=3e-7,
            rtol=1e-5,
        )


class OneSide(OKD):
    """OKD whose loss reaches one side only."""

    side = "student"

    def loss(self, measured):
        keep = {"student": {self._student}, "teacher": {self._module, self._target, self._shift}}
        values = {
            quantity: value if quantity in keep[self.side] else value.detach()
            for quantity, value in measured.values.items()
        }
        return super().loss(dataclasses.replace(measured, values=values))


@pytest.mark.parametrize("kind", KINDS)
def test_joint_backward_is_two_separate_ones(tmp_path, kind):
    def gradients(make):
        torch.manual_seed(0)
        shaken = Shaken()
        fit(tmp_path, [make(anchor_weight=0.7, online_module=KINDS[kind]()), shaken], steps=1)
        return {name: g for name, g in shaken.gradients[0].items() if g.any()}

    joint, apart = gradients(OKD), {}
    for side in ("student", "teacher"):
        OneSide.side = side
        found = gradients(OneSide)
        assert found
        assert all(name.startswith(f"{side}.") for name in found)
        apart |= found
    assert apart.keys() == joint.keys()
    for name, gradient in joint.items():
        torch.testing.assert_close(apart[name], gradient, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_base_stays_and_module_moves(tmp_path, kind):
    base = dict(tiny.make_llama(2, rows=tiny.TEACHER_ROWS).named_parameters())
    before = {}

    class Watch(tiny.Recorder):
        def on_train_start(self, trainer, pl_module):
            named = pl_module.teacher.named_parameters()
            before.update({n: p.detach().clone() for n, p in named if p.requires_grad})

    method = OKD(anchor_weight=0.5, online_module=KINDS[kind]())
    module, _ = fit(tmp_path, [method, Watch()], val_check_interval=1)
    after = dict(module.teacher.named_parameters())
    for name, value in base.items():
        plain = {n.replace(".base_layer", "").replace(".original_module", ""): n for n in after}
        (found,) = [after[n] for short, n in plain.items() if short.endswith(name)]
        assert torch.equal(found, value)
        assert found.grad is None
    assert before
    for name, value in before.items():
        assert after[name].requires_grad, name  # the base blocks gave it back
        if "lora_A" not in name:  # whose gradient is 0 in the first step
            assert not torch.equal(after[name], value), name


def test_a_heavy_anchor_keeps_the_teacher_where_it_was(tmp_path):
    shifts = {}
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        method = OKD(alpha=0.3, anchor_weight=weight, online_module=CONFIGS["lora"]())
        _, trainer = fit(tmp_path, [method], steps=9, max_epochs=3)
        shifts[weight] = float(trainer.callback_metrics["val/adapted_teacher_shift"])
    assert 0 < shifts[10.0] < 0.2 * shifts[0.0]


def test_the_shift_is_the_kl_from_the_base_to_the_adapted_teacher(tmp_path):
    method = OKD(temperature=2.0, online_module=CONFIGS["lora"]())
    module, trainer = fit(tmp_path, [method, Shaken()])
    base = reference.double(tiny.make_llama(2, rows=tiny.TEACHER_ROWS))
    adapted = reference.double(module.teacher)
    total, count = 0.0, 0
    for example in trainer.datamodule.examples("val").examples:
        ids, start = list(example.prompt_ids + example.response_ids), len(example.prompt_ids)
        with torch.no_grad():
            q0, q = (reference.row_logprobs(m, ids, tiny.NUM_IDS) for m in (base, adapted))
        values = reference.kl(q0, q)[start - 1 :]
        total, count = total + float(values.sum()), count + len(values)
    found = float(trainer.callback_metrics["val/adapted_teacher_shift"])
    assert found == pytest.approx(total / count, rel=1e-4)


def test_what_asks_for_the_base_pays_for_it(tmp_path):
    class Count(tiny.Recorder):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            layer = pl_module.teacher.model.layers[0]
            self.handle = layer.register_forward_hook(lambda *_: self.calls.append(1))
            self.calls = []

        def on_before_backward(self, trainer, pl_module, loss):
            self.handle.remove()

    def run(**settings):
        count = Count()
        _, trainer = fit(tmp_path, [OKD(online_module=CONFIGS["lora"](), **settings), count])
        return len(count.calls), trainer.callback_metrics

    passes, metrics = run()
    assert passes == 1
    assert "train/teacher_shift" not in metrics
    passes, metrics = run(log_shift=True)
    assert passes == 2
    shift = float(metrics["train/teacher_shift"])
    assert shift > 0
    assert float(metrics["train/online_module_loss"]) == pytest.approx(
        0.3 * float(metrics["train/online_module_divergence"])
        + 0.7 * float(metrics["train/teacher_cross_entropy"]),
        rel=1e-5,
    )
    passes, metrics = run(anchor_weight=1e-12)
    assert passes == 2
    assert float(metrics["train/teacher_shift"]) == pytest.approx(shift, rel=1e-4)
