"""Methods, teachers and loop settings on rows with images: frozen semantics.

* OPD and OPD+: loss and gradient are those of a plain loop over the sampled tokens; rewards are
  added to every token, and see the reference answer and the images' names.
* OKD with an anchor: both sides' gradients are those of the paper's two losses and the anchor's.
* A teacher that sees the image where the student reads a caption, and the reverse.
* Hidden states are those of transformers; ensembles mix the members' distributions, and routed
  rows have their own teacher; an averaged self-teacher shares the frozen vision tower.
* Recomputed activations, micro-batches, an adapter's place, rollouts ahead of training and
  bfloat16 do what they do on text.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import vision
from forked_worker import launch_forked
from peft import LoraConfig
from plain_images import gradients, kl, logprobs, rows_of
from tiny import fit, weights

from okd_lightning.callbacks import GKD, KD, OKD, OPD, HiddenStates, OPDPlus, Reward
from okd_lightning.engines import worker_process
from okd_lightning.errors import ConfigError
from okd_lightning.rewards import AnswerMatch
from okd_lightning.teachers import AveragedSelf, RoutedTeachers, TeacherEnsemble
from okd_lightning.training.module import DistillationModule

FAMILIES = ("idefics3", "llava", "gemma3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
LIMITS = {"max_prompt_length": 250, "max_response_length": 5, "batch_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Return a folder with images, and rows as chats and as prompts with a caption."""
    folder = tmp_path_factory.mktemp("vision")
    chats = vision.image_rows(folder, 8)
    plain = []
    for number, row in enumerate(chats):
        row["who"] = "ab"[number % 2]
        parts, answer = row["messages"][0]["content"], row["messages"][1]["content"]
        paths = [part["path"] for part in parts if part["type"] == "image"]
        text = parts[-1]["text"]
        shown = "<image>" * len(paths) + text
        plain.append({"caption": "c" + text, "shown": shown, "response": answer, "images": paths})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    return folder


@pytest.fixture(scope="module")
def models(root):
    """Return a function: family → folders of a student and two teachers."""
    made: dict[str, list[str]] = {}

    def folders(family: str) -> list[str]:
        if family not in made:
            size = 32 if family in ("idefics3", "smolvlm") else 16
            places = (root / f"{family}_{seed}" for seed in (1, 2, 3))
            made[family] = [vision.save(family, p, s, size) for s, p in enumerate(places, start=1)]
        return made[family]

    return folders


@pytest.fixture
def run(root, models, tmp_path):
    """Return a function that trains in float64 and returns the module and what was recorded."""

    def train(methods, family="llava", rows="train.jsonl", teacher=None, data=None, **given):
        settings = {"learning_rate": 0.0, "dtype": "float64"}
        names = {*settings, "student_adapter", "gradient_checkpointing", "ema_decay"}
        settings |= {name: given.pop(name) for name in names & given.keys()}
        student, other, third = models(family)
        teacher = other if teacher is None else teacher(other, third)
        torch.manual_seed(0)  # of adapters
        kind = given.pop("kind", DistillationModule)
        module = kind(student, teacher, **settings)
        limits = {**LIMITS, **(data or {})}
        recorder = fit(tmp_path, module, methods, str(root / rows), data=limits, **given)
        return module, recorder

    return train


def reader(module, side="student"):
    return module.pair.images.student if side == "student" else module.pair.images.teacher


def both(module, recorder, step=0):
    """Yield each row of a step, and both models' log-probabilities at its loss tokens."""
    size, batches = module.vocabulary.size, recorder.steps[step]
    pairs = zip(rows_of(batches), rows_of(batches, "teacher"), strict=True)
    for own, other in pairs:
        log_p = logprobs(module.student, reader(module), own, size)
        with torch.no_grad():
            log_q = logprobs(module.teacher, reader(module), other, size)
        yield own, log_p, log_q


def of_drawn(table, row):
    return table.gather(-1, row.drawn[:, None])[:, 0]


def near(total, count):
    """A logged loss: the mean of a sum over ``count`` tokens."""
    return pytest.approx(float(torch.as_tensor(total).detach()) / count, rel=1e-5)


def assert_same_gradients(found, expected):
    found = {name.partition("student.")[2] or name: g for name, g in found.items()}
    assert found.keys() == expected.keys()
    assert any(gradient.any() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-10, rtol=1e-7, msg=name)


def log_ratio(p, q, row):
    return of_drawn(q - p, row)


def with_value(p, q, row):
    return log_ratio(p, q, row) + kl(p, q)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "smolvlm"])
@pytest.mark.parametrize(
    ("make", "advantage", "name"), [(OPD, log_ratio, "opd"), (OPDPlus, with_value, "opd_plus")]
)
def test_sampled_methods_are_a_plain_loop(family, make, advantage, name, run):
    module, recorder = run([make()], family, max_steps=2)
    assert any(batch.images for batch in recorder.steps[0])
    for step, losses in enumerate(recorder.losses):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for row, p, q in both(module, recorder, step):
            own = of_drawn(p, row)
            torch.testing.assert_close(own.detach(), row.sampler, atol=1e-5, rtol=1e-5)
            weight = (own - row.sampler).exp() * advantage(p.detach(), q, row)
            total, count = total - weight.sum(), count + len(weight)
        assert losses[f"train/{name}"] == near(total, count)
        share = recorder.token_share(step)  # divided by the mean length of earlier rollouts
        expected = gradients([module.student], total / count * share)
        assert_same_gradients(recorder.gradients[step], expected)


def test_rewards_see_the_reference_and_reach_every_token(run, root, tmp_path):
    """The second run's references are the first run's responses: AnswerMatch is 1 there."""
    module, recorder = run([OPDPlus()])
    seen = {}
    for step in range(len(recorder.steps)):
        for row in rows_of(recorder.steps[step]):
            seen[row.index] = module.tokenizer.decode(row.drawn, skip_special_tokens=True)
    chats = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for number, chat in enumerate(chats):
        chat["messages"][1]["content"] = seen[number] or "?"
    (root / "sampled.jsonl").write_text("\n".join(map(json.dumps, chats)))
    prompts: list[str] = []

    def constant(prompt, response, reference):
        prompts.append(prompt)
        return 1.0 if response == reference else 0.0

    methods = [OPDPlus(), Reward(AnswerMatch(), weight=2.0), Reward(constant, name="own")]
    module, recorder = run(methods, rows="sampled.jsonl")
    share = sum(map(bool, seen.values())) / len(seen)
    found = [losses["train/reward"] for losses in recorder.losses]
    assert sum(found) / len(found) == pytest.approx(-share)
    assert [losses["train/own"] for losses in recorder.losses] == found
    assert share > 0.5
    assert sum("<image>" in prompt for prompt in prompts) == sum("image" in str(c) for c in chats)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, p, q in both(module, recorder):
        ratio, reward = (of_drawn(p, row) - row.sampler).exp(), 3.0 * bool(seen[row.index])
        total = total - (ratio * (with_value(p.detach(), q, row) + reward)).sum()
        count += len(ratio)
    expected = gradients([module.student], total / count)
    assert_same_gradients(recorder.gradients[0], expected)


class Shaken(OKD):
    """OKD whose online module is moved before the first step: LoRA starts as the identity."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in pl_module.trained_parameters(pl_module.teacher):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter += 0.1 * noise


def test_okd_with_an_anchor_has_the_gradients_of_its_three_losses(run):
    module, recorder = run([Shaken(alpha=0.3, anchor_weight=0.7)], "qwen2_vl", max_steps=1)
    size, total, count = module.vocabulary.size, torch.zeros((), dtype=torch.float64), 0
    for row in rows_of(recorder.steps[0]):
        p = logprobs(module.student, reader(module), row, size)
        q = logprobs(module.teacher, reader(module), row, size)
        with torch.no_grad(), module.pair.teacher.as_base():
            base = logprobs(module.teacher, reader(module), row, size)
        assert float(kl(base, q.detach()).max()) > 1e-3
        cross_entropy = -of_drawn(q, row)
        module_loss = 0.3 * kl(p.detach(), q) + 0.7 * cross_entropy + 0.7 * kl(base, q)
        total = total + (kl(q.detach(), p) + module_loss).sum()
        count += len(cross_entropy)
    assert recorder.losses[0]["train/loss"] == pytest.approx(
        float(total.detach()) / count, rel=1e-5
    )
    found = {n.replace("teacher.", "student."): g for n, g in recorder.gradients[0].items()}
    assert_same_gradients(found, gradients([module.student, module.teacher], total / count))


@pytest.mark.parametrize("sees", ["teacher", "student"])
@pytest.mark.parametrize("make", [KD, OPDPlus])
def test_one_side_sees_the_image_and_the_other_a_caption(sees, make, run):
    columns = ("caption", "shown") if sees == "teacher" else ("shown", "caption")
    data = dict(zip(("prompt_column", "teacher_prompt_column"), columns, strict=True))
    module, recorder = run([make()], rows="plain.jsonl", data=data, max_steps=1)
    (batch,) = recorder.steps[0]
    images = {"student": batch.images, "teacher": batch.teacher_images}
    assert any(images.pop(sees))
    assert not any(*images.values())
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, p, q in both(module, recorder):
        values = kl(q, p)
        if make is OPDPlus:
            weight = (of_drawn(p, row) - row.sampler).exp()
            values = -weight * with_value(p.detach(), q, row)
        total, count = total + values.sum(), count + len(values)
    assert recorder.losses[0]["train/loss"] == pytest.approx(
        float(total.detach()) / count, rel=1e-5
    )
    expected = gradients([module.student], total / count)
    assert_same_gradients(recorder.gradients[0], expected)


def test_hidden_states_are_those_of_transformers(run):
    module, recorder = run([KD(), HiddenStates({1: 1})], max_steps=1)
    total, count = 0.0, 0
    for row in rows_of(recorder.steps[0]):
        states = []
        for model in (module.student, module.teacher):
            taken: list[torch.Tensor] = []
            layer = model.get_decoder().layers[0]
            handle = layer.register_forward_hook(lambda m, a, out, kept=taken: kept.append(out))
            with torch.no_grad():
                logprobs(model, reader(module), row, module.vocabulary.size)
            handle.remove()
            (found,) = taken
            found = found[0] if isinstance(found, tuple) else found
            states.append(found.reshape(-1, found.shape[-1])[:-1][row.mask[1:]])
        own, wanted = states
        total += float(((own - wanted).square().sum(-1) / wanted.square().sum(-1)).sum())
        count += len(own)
    assert recorder.losses[0]["train/hidden_states"] == pytest.approx(total / count, rel=1e-6)


def test_an_ensemble_is_the_mixture_of_its_members(run):
    weighted = [0.25, 0.75]
    module, recorder = run(
        [KD()], "smolvlm", teacher=lambda *pair: TeacherEnsemble(list(pair), weighted), max_steps=1
    )
    size, total, count = module.vocabulary.size, 0.0, 0
    for row in rows_of(recorder.steps[0]):
        with torch.no_grad():
            p = logprobs(module.student, reader(module), row, size)
            members = [logprobs(m, reader(module), row, size) for m in module.pair.teacher.models]
        q = sum(w * m.exp() for w, m in zip(weighted, members, strict=True)).log()
        total, count = total + float(kl(q, p).sum()), count + len(p)
    assert recorder.losses[0]["train/kd"] == near(total, count)


def test_routed_rows_have_their_own_teacher(run):
    names = {"teacher": lambda a, b: RoutedTeachers({"a": a, "b": b}), "max_steps": 1}
    module, recorder = run([KD()], data={"teacher_column": "who"}, **names)
    found: dict[str, list[float]] = {"a": [], "b": []}
    for row in rows_of(recorder.steps[0]):
        who = "ab"[row.index % 2]
        teacher = module.pair.teacher.models[row.index % 2]
        with torch.no_grad():
            p, q = (
                logprobs(model, reader(module), row, module.vocabulary.size)
                for model in (module.student, teacher)
            )
        found[who] += kl(q, p).tolist()
    for who, values in found.items():
        expected = pytest.approx(sum(values) / len(values), rel=1e-5)
        assert recorder.losses[0][f"train/kd/{who}"] == expected


def test_an_averaged_self_teacher_shares_the_vision_tower(run, models):
    data = {"prompt_column": "caption", "teacher_prompt_column": "shown"}
    module, recorder = run(
        [GKD(1.0, on_policy_fraction=0.5)],
        rows="plain.jsonl",
        teacher=lambda *_: AveragedSelf(),
        data=data,
        learning_rate=1e-2,
        ema_decay=0.75,
        max_steps=1,
    )
    assert recorder.losses[0]["train/gkd"] > 1e-3
    start = vision.AutoModelForImageTextToText.from_pretrained(models("llava")[0]).double()
    trained = 0
    for (name, own), (_, new), (_, old) in zip(
        module.teacher.named_parameters(),
        module.student.named_parameters(),
        start.named_parameters(),
        strict=True,
    ):
        if new.requires_grad:
            torch.testing.assert_close(own, 0.75 * old + 0.25 * new, msg=name)
            trained += int(not torch.equal(new, old))
        else:
            assert own is new, name
    assert trained


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_nothing(family, run):
    """Rows of the vision tower too: its projector and, unfrozen, its layers learn."""
    runs = [
        run([OKD()], family, gradient_checkpointing=recomputes, max_steps=1)[1]
        for recomputes in (False, True)
    ]
    plain, recomputed = (recorder.gradients[0] for recorder in runs)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-10, rtol=1e-7, msg=name)


def test_gradient_with_rollouts_does_not_depend_on_micro_batches(run):
    found = []
    for rows in (8, 2):
        data = {"batch_size": rows, "global_batch_size": 8}
        found.append(run([OPDPlus()], "qwen2_5_vl", data=data)[1].gradients)
    for name, gradient in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], gradient, atol=1e-12, rtol=1e-8, msg=name)


def test_an_adapter_of_the_student_is_on_its_language_model(run):
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    _, recorder = run([GKD()], student_adapter=adapter, max_steps=1)
    names = set(recorder.gradients[0])
    assert names
    assert all("language_model" in name and "lora_" in name for name in names)


class OldWeights(DistillationModule):
    """The plain loop: a rollout batch is generated by the weights of the batch before."""

    def respond(self, request):
        if request.generator != "student":
            return super().respond(request)
        kept = vars(self).setdefault("kept", [])
        kept.append(weights(self))
        self.put(kept[max(0, len(kept) - 2)])
        rollout = super().respond(request)
        self.put(kept[-1])
        return rollout

    @torch.no_grad()
    def put(self, kept):
        for name, parameter in self.student.named_parameters():
            parameter.copy_(kept[name])


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_rollouts_ahead_of_training_are_those_of_a_loop_with_old_copies(family, run, monkeypatch):
    """LLaVA's tower reads hidden states by hooks of transformers, which no copy may lack."""
    monkeypatch.setattr(worker_process, "launch", launch_forked)
    settings = {"learning_rate": 1e-2, "max_epochs": 2}
    plain, _ = run([GKD(0.5, on_policy_fraction=1.0)], family, kind=OldWeights, **settings)
    lag = {"rollout_lag": 1}
    lagged, _ = run([GKD(0.5, on_policy_fraction=1.0)], family, data=lag, **settings)
    found, before = weights(lagged), plain.kept[0]
    for name, expected in weights(plain).items():
        assert torch.equal(found[name], expected), name
    assert any(not torch.equal(found[name], before[name]) for name in found)


def test_bfloat16_is_near_float32(run):
    settings = {"dtype": "float32", "max_steps": 1}
    exact, near = (
        run([KD()], "qwen2_vl", precision=precision, **settings)[1]
        for precision in ("32-true", "bf16-mixed")
    )
    expected = exact.losses[0]["train/kd"]
    assert near.losses[0]["train/kd"] == pytest.approx(expected, rel=0.03)
    assert near.losses[0]["train/kd"] != expected


def test_teachers_with_different_processors_are_refused(run, root, models):
    wide = vision.save("llava", root / "llava_wide", 4, 24)
    with pytest.raises(ConfigError, match="different processors or chat templates") as error:
        run([KD()], teacher=lambda a, _: TeacherEnsemble([a, wide]), max_steps=1)
    assert "give teachers of one family" in str(error.value)
