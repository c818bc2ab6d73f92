"""OKD: the student and the teacher's online module learn from each other.

* The gradients in the logits are ∂L_s/∂z_s = τ(p^τ - q^τ) and
  ∂L_t/∂z_t = ατ(q^τ - p^τ) + (1-α)(q - onehot) (arXiv 2409.12512, Eq. 2), each a token's share of
  the mean.
* One backward over the sum is two separate ones: the student's gradient does not depend on the
  module's loss, nor the module's on the student's.
* The teacher's base is bit-identical after training; the module has moved; for LoRA, P-tuning and
  prefix tuning.
* What is trained is the adapted teacher as PEFT itself computes it, and validation measures
  against the base.
* The online module has its own learning rate and clip norm, is in the checkpoint, and resumes.
* Settings without a loss that keeps the teacher at the data (alpha = 1, only on-policy rows), a
  config that matches no layer or trains the base's biases, and two different modules are refused;
  reverse KL for the student warns once.
"""

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig

from okd_lightning.callbacks import KD, OKD
from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL, Tempered
from okd_lightning.errors import ConfigError
from okd_lightning.models import head_inputs
from okd_lightning.teachers import attach_online_module, base_teacher
from okd_lightning.training.module import DistillationModule

pytestmark = pytest.mark.filterwarnings(  # PEFT's use of transformers
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
KL_AT_3 = Tempered(ForwardKL(), 3.0)
CONFIGS = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian"),
    "p_tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3),
}


def fit(tmp_path, callbacks, steps=3, **settings):
    module = DistillationModule(
        tiny.make_llama(1),
        tiny.make_llama(2, rows=tiny.TEACHER_ROWS),
        tokenizer=tiny.make_tokenizer(),
        learning_rate=1e-2,
    )
    data = tiny.RolloutDataModule(
        tiny.make_rows(24),
        tiny.make_rows(6, seed=1),
        batch_size=8,
        max_prompt_length=8,
        max_response_length=8,
        val_rollouts=0,
    )
    trainer = tiny.make_trainer(tmp_path, callbacks, max_steps=steps, **settings)
    trainer.fit(module, data)
    return module, trainer


class GradientsInLogits(tiny.Recorder):
    """Records the gradients at both heads' outputs in the first step."""

    def __init__(self):
        super().__init__()
        self.taken = {}

    def on_train_start(self, trainer, pl_module):
        for name, model in (("student", pl_module.student), ("teacher", pl_module.teacher)):
            model.get_output_embeddings().register_forward_hook(self.keep(name))

    def keep(self, name):
        def hook(module, args, output):
            if args[0].ndim == 2 and output.requires_grad and name not in self.taken:
                output.retain_grad()
                self.taken[name] = output

        return hook


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_gradients_in_the_logits(tmp_path, tau, alpha):
    recorder = GradientsInLogits()
    method = OKD(alpha=alpha, temperature=tau, online_module=CONFIGS["lora"]())
    fit(tmp_path, [method, recorder], steps=1)
    (batch,) = recorder.steps[0]
    mask = batch.mask[:, 1:]
    targets = batch.input_ids[:, 1:][mask]
    student, teacher = recorder.taken["student"], recorder.taken["teacher"]
    z_s, z_t = (z.detach().double()[:, : tiny.NUM_IDS] for z in (student, teacher))
    p, q = (z_s / tau).softmax(-1), (z_t / tau).softmax(-1)
    onehot = torch.nn.functional.one_hot(targets, tiny.NUM_IDS)
    expected_s = tau * (p - q) / len(targets)
    plain_q = z_t.softmax(-1)
    expected_t = (alpha * tau * (q - p) + (1 - alpha) * (plain_q - onehot)) / len(targets)
    torch.testing.assert_close(
        student.grad[:, : tiny.NUM_IDS].double(), expected_s, atol=2e-7, rtol=1e-5
    )
    torch.testing.assert_close(
        teacher.grad[:, : tiny.NUM_IDS].double(), expected_t, atol=2e-7, rtol=1e-5
    )
    assert (student.grad[:, tiny.NUM_IDS :] == 0).all()
    assert (teacher.grad[:, tiny.NUM_IDS :] == 0).all()


@pytest.mark.parametrize("kind", CONFIGS)
def test_joint_backward_is_two_separate_ones(tmp_path, kind):
    """The student's gradient is KD's against the same (first-step) teacher, whatever alpha is."""
    gradients = {}
    for alpha in (0.0, 0.7):
        torch.manual_seed(0)
        recorder = tiny.Recorder()
        fit(tmp_path, [OKD(alpha=alpha, online_module=CONFIGS[kind]()), recorder], steps=1)
        gradients[alpha] = recorder.gradients[0]
    student = [name for name in gradients[0.0] if name.startswith("student.")]
    module = [name for name in gradients[0.0] if name.startswith("teacher.")]
    assert student
    assert module
    for name in student:
        torch.testing.assert_close(gradients[0.0][name], gradients[0.7][name], rtol=0, atol=0)
    assert any(not torch.equal(gradients[0.0][n], gradients[0.7][n]) for n in module)


@pytest.mark.parametrize("kind", CONFIGS)
def test_base_stays_and_module_moves(tmp_path, kind):
    base = {n: p.clone() for n, p in tiny.make_llama(2, rows=tiny.TEACHER_ROWS).named_parameters()}
    trained = {}

    class Watch(tiny.Recorder):
        def on_train_start(self, trainer, pl_module):
            named = pl_module.teacher.named_parameters()
            trained.update({n: p.detach().clone() for n, p in named if p.requires_grad})

    module, _ = fit(tmp_path, [OKD(online_module=CONFIGS[kind]()), Watch()])
    after = dict(module.teacher.named_parameters())
    for name, value in base.items():
        found = [v for n, v in after.items() if n.replace(".base_layer", "").endswith(name)]
        assert len(found) == 1
        assert torch.equal(found[0], value)
        assert found[0].grad is None
    assert trained
    assert any(not torch.equal(after[name], value) for name, value in trained.items())
    assert not module.teacher.training


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapted_logits_are_pefts_own(kind):
    torch.manual_seed(0)
    reference = tiny.make_llama(2)
    plain = tiny.make_llama(2)
    teacher = attach_online_module(reference, CONFIGS[kind](), "online_module")
    with torch.no_grad():  # LoRA starts as the identity
        for parameter in teacher.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        own = teacher(input_ids=ids, attention_mask=mask).logits[:, -4:]
        hidden = head_inputs(teacher, ids, mask)
        ours = teacher.get_output_embeddings()(hidden)
        with base_teacher(teacher):
            base = teacher.get_output_embeddings()(head_inputs(teacher, ids, mask))
        expected = plain(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(ours[real], own[real])
    torch.testing.assert_close(base[real], expected[real])
    assert not torch.allclose(ours[real], base[real], atol=1e-4)


def test_module_has_its_own_rate_and_clip(tmp_path):
    recorder = tiny.Recorder()
    norms = {}

    class AfterClip(tiny.Recorder):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for side in ("student", "teacher"):
                parameters = getattr(pl_module, side).parameters()
                grads = [p.grad for p in parameters if p.grad is not None]
                norms[side] = float(torch.nn.utils.get_total_norm(grads))

    class KeepGradients(AfterClip):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.on_train_batch_end(trainer, pl_module, None, None, 0)

    method = OKD(online_module=CONFIGS["lora"](), learning_rate=3e-4, clip_norm=1e-3)
    _, trainer = fit(tmp_path, [method, recorder, KeepGradients()], steps=2, gradient_clip_val=1e-2)
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {1e-2, 3e-4}
    assert norms["student"] == pytest.approx(1e-2, rel=1e-3)
    assert norms["teacher"] == pytest.approx(1e-3, rel=1e-3)


def test_default_is_lora_on_query_and_value(tmp_path):
    module, _ = fit(tmp_path, [OKD()], steps=1)
    trained = {n for n, p in module.teacher.named_parameters() if p.requires_grad}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == {"q_proj", "v_proj"}
    shapes = {p.shape[0] for n, p in module.teacher.named_parameters() if "lora_A" in n}
    assert shapes == {32}


def test_own_rows_carry_no_cross_entropy(tmp_path):
    method = OKD(
        alpha=0.5, on_policy_fraction=1.0, anchor_weight=2.0, online_module=CONFIGS["lora"]()
    )
    _, trainer = fit(tmp_path, [method], steps=2)
    metrics = trainer.callback_metrics
    assert float(metrics["train/teacher_shift"]) > 0
    assert float(metrics["train/online_module_loss"]) == pytest.approx(
        0.5 * float(metrics["train/online_module_divergence"])
        + 2.0 * float(metrics["train/teacher_shift"]),
        rel=1e-5,
    )


def test_composes_with_kd(tmp_path):
    callbacks = [OKD(online_module=CONFIGS["lora"]()), KD(weight=0.5)]
    _, trainer = fit(tmp_path, callbacks, steps=1)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(
        metrics["train/okd"] + 0.5 * metrics["train/kd"], rel=1e-5
    )


def test_refusals(tmp_path):
    for both in ({"divergence": KL_AT_3}, {"teacher_divergence": KL_AT_3}):
        with pytest.raises(ConfigError, match="both would act"):
            OKD(temperature=2.0, **both)
    with pytest.raises(ConfigError, match="alpha 1 leaves no loss"):
        OKD(alpha=1.0)
    with pytest.raises(ConfigError, match="on_policy_fraction 1 leaves no dataset responses"):
        OKD(on_policy_fraction=1.0)
    for name in ("learning_rate", "clip_norm"):
        for value in (0.0, -1.0, float("nan")):
            with pytest.raises(ConfigError, match=f"{name} must be a number above 0"):
                OKD(**{name: value})
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="anchor_weight must be a number from 0 on"):
            OKD(anchor_weight=value)
    with pytest.raises(ConfigError, match="warmup_steps must be a number from 0 on, got -1"):
        OKD(warmup_steps=-1)
    with pytest.raises(ConfigError, match=r"method.schedule is 'linaer'; expected one of"):
        OKD(schedule="linaer")
    biased = LoraConfig(target_modules=["q_proj"], bias="all")
    with pytest.raises(ConfigError, match="bias 'all' would train biases of the base"):
        fit(tmp_path, [OKD(online_module=biased)])
    with pytest.raises(ConfigError, match=r"nope.*down_proj.*q_proj"):
        fit(tmp_path, [OKD(online_module=LoraConfig(target_modules=["nope"]))])
    one, two = LoraConfig(r=2, lora_alpha=2), LoraConfig(r=4, lora_alpha=4)
    with pytest.raises(ConfigError, match="different online modules"):
        fit(tmp_path, [OKD(online_module=one), OKD(online_module=two, name="other")])


def test_any_divergence_on_either_side(tmp_path):
    method = OKD(
        divergence=JensenShannon(), teacher_divergence=ForwardKL(), online_module=CONFIGS["lora"]()
    )
    _, trainer = fit(tmp_path, [method], steps=1)
    assert float(trainer.callback_metrics["train/okd"]) > 0


def test_reverse_kl_and_an_adaptive_teacher_warn_once(tmp_path):
    reverse = {"divergence": ReverseKL(), "online_module": CONFIGS["lora"]()}
    with pytest.warns(UserWarning, match=r"was 3\.71 nats.*0\.71 without.*ForwardKL") as caught:
        fit(tmp_path, [OKD(alpha=0.1, **reverse)])
    assert sum("reverse KL" in str(warning.message) for warning in caught) == 1
    fit(tmp_path, [OKD(alpha=0.0, **reverse)])  # the teacher does not follow this student


@pytest.mark.parametrize("kind", CONFIGS)
def test_base_blocks_can_be_nested(kind):
    """The module comes back at the end of the outermost block, not of an inner one."""
    torch.manual_seed(0)
    teacher = attach_online_module(tiny.make_llama(2), CONFIGS[kind](), "online_module")
    ids, mask = torch.tensor([[3, 4, 5, 6]]), torch.ones(1, 4, dtype=torch.int64)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        adapted = head_inputs(teacher, ids, mask)
        with base_teacher(teacher):
            base = head_inputs(teacher, ids, mask)
            with base_teacher(teacher):
                pass
            assert torch.equal(head_inputs(teacher, ids, mask), base)
        assert torch.equal(head_inputs(teacher, ids, mask), adapted)
    assert not torch.equal(base, adapted)
