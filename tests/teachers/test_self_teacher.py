"""The student as its own teacher.

Frozen here: a frozen teacher is the student at the start, whatever training does, and under an
adapter its base without a second copy; a moving average is the hand-computed one, once an optimizer
step; a live teacher is the student without dropout, and no gradient goes through its side; a
student that equals its frozen teacher does not move by a bit; nothing is stored twice; each resumes
bit for bit; what cannot work is refused.
"""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig

from okd_lightning.callbacks import GKD, KD, OKD, SFT, LastCheckpoint, OPDPlus
from okd_lightning.data import Columns, build_examples
from okd_lightning.data.teacher_prompts import TeacherPrompts
from okd_lightning.divergences import ForwardKL, ReverseKL, TopK
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.losses import DrawnLogProb, Entropy, ExactDivergence
from okd_lightning.records.collation import collate, dataset_row
from okd_lightning.teachers import AveragedSelf, FrozenSelf, LiveSelf
from okd_lightning.training.module import DistillationModule

KINDS = {"frozen": FrozenSelf, "ema": AveragedSelf, "live": LiveSelf}
TEMPLATE = {"teacher_prompt_template": "{reference}p{prompt}"}
QUANTITIES = (ExactDivergence(ForwardKL()), DrawnLogProb("teacher"), Entropy("teacher"))


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


@pytest.fixture
def make_own(dropout_folder):
    """A student with dropout that teaches itself."""

    def make(kind: str, lora: bool = False, **overrides) -> DistillationModule:
        adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.2)
        settings = {
            "student": str(dropout_folder),
            "learning_rate": 1e-2,
            "student_adapter": adapter if lora else None,
            **overrides,
        }
        return DistillationModule(**settings, teacher=KINDS[kind]())

    return make


def train(root, module, methods=None, *, data=None, **settings):
    """Train two epochs of 5 steps of 2 micro-batches."""
    return tiny.fit(
        root,
        module,
        methods or [GKD(on_policy_fraction=0.5)],
        tiny.make_rows(19),
        data={"batch_size": 2, **TEMPLATE, **(data or {})},
        accumulate_grad_batches=2,
        **{"max_epochs": 2, **settings},
    )


def some_rows(module):
    """Given rows with teacher prompts."""
    found = build_examples(
        tiny.make_rows(5),
        module.tokenizer,
        eos_id=tiny.EOS,
        columns=Columns(),
        max_prompt_length=16,
        max_response_length=8,
        on_overlong="error",
        needs_response=True,
        where="rows",
        teacher_prompts=TeacherPrompts(32, template=TEMPLATE["teacher_prompt_template"]),
    )
    return [dataset_row(example) for example in found.examples]


def some_batch(module):
    return collate(some_rows(module))


def teacher_weights(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.teacher.named_parameters()}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_frozen_is_the_student_at_the_start(lora, tmp_path, make_own):
    module, start = make_own("frozen", lora), make_own("frozen", lora)
    start.configure_model()
    start.eval()
    train(tmp_path, module)
    assert tiny.distance(tiny.weights(module), tiny.weights(start)) > 1e-4
    assert (module.teacher is None) == lora  # under an adapter there is no second copy
    module.eval()
    batch = some_batch(module)
    now, then = (m.measure(batch, QUANTITIES) for m in (module, start))
    for quantity in QUANTITIES[1:]:
        torch.testing.assert_close(now[quantity], then[quantity], atol=1e-6, rtol=1e-5)
    plain = DistillationModule(start.pair.student_source, start.pair.student_source)
    plain.configure_model()
    truth = plain.eval().measure(batch, QUANTITIES)
    for quantity in QUANTITIES:
        torch.testing.assert_close(then[quantity], truth[quantity], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "method",
    [
        KD(),
        KD(temperature=2.0),
        GKD(on_policy_fraction=1.0),
        GKD(divergence=TopK(ReverseKL(), 4), on_policy_fraction=1.0),
        OPDPlus(ForwardKL()),
        OPDPlus(),
    ],
    ids=lambda method: f"{type(method).__name__}",
)
def test_a_student_that_equals_its_teacher_stays(method, tmp_path):
    """The rounding of two forward passes would become full steps of Adam."""
    module = DistillationModule(
        tiny.make_llama(3),
        FrozenSelf(),
        tokenizer=tiny.make_tokenizer(),
        learning_rate=1e-2,
    )
    module.configure_model()
    before = tiny.weights(module)
    tiny.fit(tmp_path, module, [method], tiny.make_rows(12), max_steps=3)
    assert all(torch.equal(before[name], now) for name, now in tiny.weights(module).items())


class Averages(Callback):
    """The average by hand: after every optimizer step, of what the optimizer trains."""

    def __init__(self, decay: float) -> None:
        self.decay, self.num_steps, self.mean, self.seen = decay, 0, {}, []

    def on_fit_start(self, trainer, module):
        self.mean = {
            n: p.detach().double() for n, p in module.student.named_parameters() if p.requires_grad
        }

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > self.num_steps:
            self.num_steps = trainer.global_step
            for name, weight in module.student.named_parameters():
                if name in self.mean:
                    kept = self.decay * self.mean[name]
                    self.mean[name] = kept + (1 - self.decay) * weight.detach().double()
        own = dict(module.teacher.named_parameters())
        self.seen.append(tiny.distance({n: own[n].double() for n in self.mean}, self.mean))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_ema_is_the_average_over_optimizer_steps(decay, lora, tmp_path, make_own):
    module = make_own("ema", lora, ema_decay=decay)
    averages = Averages(decay or 0.99)
    train(tmp_path, module, callbacks=[averages])
    assert (averages.num_steps, len(averages.seen)) == (10, 20)
    assert max(averages.seen) < 1e-6
    students = dict(module.student.named_parameters())
    for name, own in module.teacher.named_parameters():
        assert not own.requires_grad
        assert (own is students[name]) == (not students[name].requires_grad)
        if students[name].requires_grad:
            assert not torch.equal(own, students[name])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_live_has_no_gradient_and_no_dropout_on_the_teachers_side(lora, make_own):
    module = make_own("live", lora)
    module.configure_model()
    module.train()
    batch = some_batch(module)
    measured = module.measure(batch, (*QUANTITIES, DrawnLogProb()))
    assert not measured[QUANTITIES[1]].requires_grad
    assert not measured[QUANTITIES[2]].requires_grad
    assert measured[DrawnLogProb()].requires_grad
    assert module.student.training
    assert all(
        p.requires_grad == (not lora or "lora_" in n) for n, p in module.student.named_parameters()
    )
    again = module.measure(batch, QUANTITIES)
    torch.testing.assert_close(again[QUANTITIES[1]], measured[QUANTITIES[1]], atol=0, rtol=0)
    assert not torch.equal(again[QUANTITIES[0]], measured[QUANTITIES[0]])  # the student's dropout
    module.eval()
    privileged = collate([row.teacher_row for row in some_rows(module)])
    own = module.measure(privileged, (DrawnLogProb(),))[DrawnLogProb()]
    torch.testing.assert_close(measured[QUANTITIES[1]], own.detach(), atol=1e-6, rtol=1e-5)


def test_the_gradient_of_a_live_teacher_is_that_of_a_constant_one(make_own, dropout_folder):
    """The gradient equals that with a second model of the same weights."""

    def gradients(module):
        module.configure_model()
        module.eval()
        quantity = ExactDivergence(ReverseKL())
        module.measure(some_batch(module), (quantity,))[quantity].sum().backward()
        return {n: p.grad for n, p in module.student.named_parameters()}

    other = DistillationModule(str(dropout_folder), str(dropout_folder))
    assert tiny.distance(gradients(make_own("live")), gradients(other)) < 1e-6


def test_a_live_teacher_learns_with_the_student(tmp_path, make_own):
    module = make_own("live")
    before = make_own("live")
    before.configure_model()
    train(tmp_path, module)
    assert module.teacher is None
    batch = some_batch(module)
    module.eval()
    before.eval()
    now, then = (m.measure(batch, QUANTITIES)[QUANTITIES[1]] for m in (module, before))
    assert not torch.allclose(now, then, atol=1e-3)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_what_cannot_be_made_again(kind, lora, tmp_path, make_own):
    module = make_own(kind, lora)
    train(tmp_path, module, callbacks=[LastCheckpoint(1)], max_steps=1)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    own = {n for n in saved["state_dict"] if n.startswith("teacher.")}
    students = {n for n in saved["state_dict"] if n.startswith("student.")}
    expected = {n.replace("student.", "teacher.", 1) for n in students} if kind == "ema" else set()
    assert own == expected
    assert students
    assert not lora or all("lora_" in n for n in students)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("killed_at", [3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(killed_at, kind, lora, tmp_path, make_own):
    def trained(root, max_steps, ckpt_path=None):
        torch.manual_seed(5 if ckpt_path is None else 99)
        module = make_own(kind, lora, ema_decay=0.7 if kind == "ema" else None)
        callbacks = [LastCheckpoint(1)]
        train(root, module, callbacks=callbacks, max_steps=max_steps, ckpt_path=ckpt_path)
        return module

    torch.manual_seed(5)
    whole = trained(tmp_path / "a", 8)
    trained(tmp_path / "b", killed_at)
    last = str(tmp_path / "b" / "checkpoints" / "last.ckpt")
    resumed = trained(tmp_path / "b", 8, last)
    assert tiny.distance(tiny.weights(resumed), tiny.weights(whole)) == 0
    if whole.teacher is not None:
        assert tiny.distance(teacher_weights(resumed), teacher_weights(whole)) == 0


@pytest.mark.parametrize("source", ["random", "memory"])
def test_a_frozen_start_that_cannot_be_loaded_again_is_kept(source, tmp_path, tiny_tokenizer):
    def make():
        config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16}
        config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": tiny.EOS}
        student = config if source == "random" else in_memory
        return DistillationModule(
            student, FrozenSelf(), tokenizer=tiny_tokenizer, learning_rate=1e-2
        )

    in_memory = tiny.make_llama(1)
    torch.manual_seed(1)
    module = make()
    train(tmp_path, module, callbacks=[LastCheckpoint(1)], max_steps=3)
    torch.manual_seed(2)
    resumed = make()  # of a model that has been trained, or of another seed
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    train(tmp_path, resumed, callbacks=[LastCheckpoint(1)], max_steps=4, ckpt_path=last)
    assert tiny.distance(teacher_weights(resumed), teacher_weights(module)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_may_write_and_validation_measures(kind, tmp_path, make_own):
    module = make_own(kind)
    data = {"val_rollouts": 2}
    rows = tiny.make_rows(4, seed=2)
    recorder = train(tmp_path, module, [KD(seq_kd=True)], data=data, val=rows, max_steps=2)
    assert recorder.sources() == [{2}, {2}]
    assert recorder.steps[0][0].teacher_input_ids is not None
    with module.pair.teacher.as_base():
        assert module.measure(some_batch(module), QUANTITIES)[QUANTITIES[0]].isfinite().all()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_okd_trains_a_module_on_its_own_copy_of_a_frozen_start(lora, tmp_path, make_own):
    module = make_own("frozen", lora)
    method = OKD(online_module=LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    recorder = train(tmp_path, module, [method], max_steps=2)
    names = set(recorder.gradients[-1])
    assert any(n.startswith("teacher.") and "lora_" in n for n in names)
    assert all("lora_" in n for n in names if n.startswith("teacher.") or lora)
    assert not {id(p) for p in module.teacher.parameters()} & {
        id(p) for p in module.student.parameters()
    }


def test_what_cannot_work_is_refused(tmp_path, make_own, student_folder, make_module):
    folder = str(student_folder)
    for decay in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            make_own("ema", ema_decay=decay)
    with pytest.raises(ConfigError, match="has no effect"):
        make_own("live", ema_decay=0.9)
    with pytest.raises(ConfigError, match="teacher_dtype"):
        make_own("frozen", teacher_dtype="bfloat16")
    with pytest.raises(ConfigError, match="16-bit formats"):
        make_own("ema", dtype="bfloat16")
    no_prompts = {"teacher_prompt_template": None}
    with pytest.raises(ConfigError, match="LiveSelf without teacher prompts"):
        train(tmp_path, make_own("live"), data=no_prompts)
    for kind in ("ema", "live"):
        with pytest.raises(ConfigError, match=f"{KINDS[kind].__name__} follows the student"):
            train(tmp_path, make_own(kind), [OKD()])
    train(tmp_path, make_own("ema"), callbacks=[LastCheckpoint(1)], max_steps=1)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match="teacher is AveragedSelf, this run's is FrozenSelf"):
        train(tmp_path, make_own("frozen"), max_steps=2, ckpt_path=last)
    assert DistillationModule(folder).has_teacher is False


def test_divergence_from_oneself_is_zero_at_first(tmp_path, make_module):
    """Without teacher prompts a frozen teacher holds the student to its start."""
    module = make_module(teacher=FrozenSelf())
    data = {"teacher_prompt_template": None}
    recorder = train(tmp_path, module, [KD(), SFT()], data=data, max_steps=3)
    measured = [losses["train/kd"] for losses in recorder.losses]
    assert measured[0] == pytest.approx(0, abs=1e-6)
    assert measured[-1] > 1e-4
