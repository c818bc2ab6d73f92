"""TeacherEnsemble in runs.

Frozen here: weights (1, 0) are the first teacher alone, to the last bit, and the other is not
loaded; KD's loss and OPD+'s advantages are those of the mixed distribution, row by row, for models
of different architectures; generation samples from it; OKD trains the first model's module alone;
weights, kinds and members that do not fit are refused in one line; a run resumes with the same
ensemble only; validation measures the mixed distribution.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig

from okd_lightning.callbacks import GKD, KD, OKD, LastCheckpoint, OPDPlus
from okd_lightning.divergences import ReverseKL
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.requests import Prompt, Request
from okd_lightning.records.sampling import Sampling
from okd_lightning.teachers import (
    CachedTeacher,
    FrozenSelf,
    LoadedTeacher,
    RoutedTeachers,
    ServedTeacher,
    TeacherEnsemble,
)
from okd_lightning.training.generation import MixtureEngine
from okd_lightning.training.module import DistillationModule

ROWS = tiny.make_rows(12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, str]:
    root = tmp_path_factory.mktemp("ensemble")
    models = {
        "student": tiny.make_llama(1),
        "llama": tiny.make_llama(2, tiny.TEACHER_ROWS),
        "gpt2": tiny.make_gpt2(3),
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in models}


def make(folders, teacher) -> DistillationModule:
    torch.manual_seed(3)
    return DistillationModule(folders["student"], teacher, dtype="float64")


def both(folders, weights=None, kind="mixture") -> TeacherEnsemble:
    return TeacherEnsemble([folders["llama"], folders["gpt2"]], weights, kind)


def train(root: Path, module, methods, **settings) -> tiny.Recorder:
    return tiny.fit(root, module, methods, ROWS, **{"max_steps": 2, **settings})


@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_weight_one_is_that_teacher_alone(kind, folders, tmp_path):
    alone = make(folders, folders["llama"])
    expected = train(tmp_path / "a", alone, [KD()]).losses
    ensemble = TeacherEnsemble([folders["llama"], "no/such-model"], [1.0, 0.0], kind)
    module = make(folders, ensemble)
    found = train(tmp_path / "b", module, [KD()]).losses
    assert found == expected
    assert len(module.pair.teacher.models) == 1
    assert all(torch.equal(p, tiny.weights(alone)[n]) for n, p in tiny.weights(module).items())


def mixed_logprobs(module: DistillationModule, ids: torch.Tensor) -> torch.Tensor:
    """[seq, ids] of the ensemble, in a formula of its own."""
    teacher = module.pair.teacher
    parts = [
        model(ids[None]).logits[0, :, : tiny.NUM_IDS].log_softmax(-1) for model in teacher.models
    ]
    if teacher.kind == "product":
        total = sum(w * part for w, part in zip(teacher.weights, parts, strict=True))
        return total.log_softmax(-1)
    return sum(w * part.exp() for w, part in zip(teacher.weights, parts, strict=True)).log()


def rows_of(module: DistillationModule, batch):
    """(log p, log q, targets) at the loss positions of each row."""
    for row, length in enumerate(batch.lengths.tolist()):
        ids, mask = batch.input_ids[row, :length], batch.mask[row, 1:length]
        own = module.student(ids[None]).logits[0, :-1, : tiny.NUM_IDS].log_softmax(-1)
        yield own[mask], mixed_logprobs(module, ids)[:-1][mask], ids[1:][mask]


@pytest.mark.parametrize("weights", [None, [0.2, 0.8]])
@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_the_loss_is_that_of_the_mixed_distribution(kind, weights, folders, tmp_path):
    recorder = train(tmp_path, make(folders, both(folders, weights, kind)), [KD()], max_steps=1)
    start = make(folders, both(folders, weights, kind))
    start.configure_model()
    total, count = 0.0, 0
    with torch.no_grad():
        for log_p, log_q, targets in rows_of(start, recorder.steps[0][0]):
            total += float((log_q.exp() * (log_q - log_p)).sum())
            count += len(targets)
    assert recorder.losses[0]["train/kd"] == pytest.approx(total / count, rel=1e-9)


def test_opd_plus_reads_the_mixed_distribution(folders, tmp_path):
    method = OPDPlus(ReverseKL())
    recorder = train(tmp_path, make(folders, both(folders)), [method], max_steps=1)
    start = make(folders, both(folders))
    start.configure_model()
    total, count = 0.0, 0
    with torch.no_grad():
        for log_p, log_q, targets in rows_of(start, recorder.steps[0][0]):
            ratio = (log_q - log_p).gather(-1, targets[:, None])
            total, count = total + float(ratio.sum()), count + len(targets)
    logged = recorder.losses[0]["train/opd_plus_log_ratio"]
    assert logged == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("kind", ["mixture", "product"])
def test_it_samples_from_the_mixed_distribution(kind, folders):
    module = make(folders, both(folders, [0.25, 0.75], kind))
    module.configure_model()
    prompt = (5, 9, 4)
    prompts = tuple(Prompt(prompt, 0, sample) for sample in range(3000))
    request = Request(prompts, Sampling(), NoiseStream(0, 0), 1, generator="teacher")
    responses = module.respond(request)
    with torch.no_grad():
        expected = mixed_logprobs(module, torch.tensor(prompt))[-1]
    for response in list(responses)[:20]:
        assert response.logprobs[0] == pytest.approx(float(expected[response.ids[0]]), abs=1e-5)
    counts = torch.bincount(torch.tensor([r.ids[0] for r in responses]), minlength=tiny.NUM_IDS)
    shares = counts.double() / len(prompts)
    assert float((shares - expected.exp()).abs().sum()) < 0.1


def test_a_mixture_with_the_student_holds_all_models(folders):
    module = make(folders, both(folders, [0.25, 0.75]))
    module.configure_model()
    prompt = (5, 9, 4)
    engine = MixtureEngine(module, 0.4, module)
    prompts = tuple(Prompt(prompt, 0, sample) for sample in range(20))
    responses = engine.respond(Request(prompts, Sampling(), NoiseStream(0, 0), 1))
    ids = torch.tensor(prompt)
    with torch.no_grad():
        own = module.student(ids[None]).logits[0, -1, : tiny.NUM_IDS].softmax(-1)
        expected = (0.6 * own + 0.4 * mixed_logprobs(module, ids)[-1].exp()).log()
    for response in responses:
        assert response.logprobs[0] == pytest.approx(float(expected[response.ids[0]]), abs=1e-5)


def test_its_cache_holds_the_mixed_distribution(folders, tmp_path):
    expected = train(tmp_path / "a", make(folders, both(folders, [0.2, 0.8])), [KD()])
    cache = str(tmp_path / "cache")

    def cached(weights) -> tiny.Recorder:
        teacher = CachedTeacher(both(folders, weights), cache, tiny.NUM_IDS, "float32")
        return train(tmp_path / "b", make(folders, teacher), [KD()])

    found = cached([0.2, 0.8])
    for mine, theirs in zip(found.losses, expected.losses, strict=True):
        assert mine["train/kd"] == pytest.approx(theirs["train/kd"], rel=1e-5)
    entries = set((tmp_path / "cache").iterdir())
    cached([0.2, 0.8])
    assert set((tmp_path / "cache").iterdir()) == entries
    cached([0.8, 0.2])
    assert set((tmp_path / "cache").iterdir()) > entries
    with pytest.raises(ConfigError, match="RoutedTeachers has none"):
        CachedTeacher(RoutedTeachers({"a": folders["llama"]}), cache)


def test_okd_trains_the_first_models_module(folders, tmp_path):
    module = make(folders, both(folders, [0.5, 0.5]))
    okd = OKD(0.3, online_module=LoraConfig(r=2, target_modules=["q_proj"]), learning_rate=0.1)
    recorder = train(tmp_path, module, [okd], val=ROWS[:4], max_epochs=1, max_steps=-1)
    names = {name for name in recorder.gradients[-1] if name.startswith("teacher.")}
    assert names
    assert all(name.startswith("teacher.0.") and "lora_" in name for name in names)
    measures = module.trainer.callback_metrics
    assert measures["val/adapted_teacher_shift"] > 0
    assert measures["val/adapted_teacher_cross_entropy"] < measures["val/teacher_cross_entropy"]


def test_another_ensemble_does_not_resume(folders, tmp_path):
    first = make(folders, both(folders, [0.25, 0.75]))
    train(tmp_path, first, [GKD(on_policy_fraction=0.5)], callbacks=[LastCheckpoint(1)])
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    stored = DistillationModule.load_from_checkpoint(last)
    assert stored.pair.given_teacher.mark == first.pair.given_teacher.mark
    for other in (
        both(folders, [0.5, 0.5]),
        both(folders, [0.25, 0.75], "product"),
        TeacherEnsemble([folders["gpt2"], folders["llama"]], [0.25, 0.75]),
        folders["llama"],
    ):
        with pytest.raises(CheckpointError, match=r"teacher is TeacherEnsemble .*resume with the"):
            train(tmp_path, make(folders, other), [GKD(on_policy_fraction=0.5)], ckpt_path=last)


MISTAKES = {
    "no teachers": (lambda f: TeacherEnsemble([]), "has no teachers"),
    "weights": (lambda f: both(f, [1.0]), r"expected one weight per teacher \(2\), got 1"),
    "negative": (lambda f: both(f, [2.0, -1.0]), "at least 0"),
    "zeros": (lambda f: both(f, [0.0, 0.0]), "one above 0"),
    "nan": (lambda f: both(f, [float("nan"), 1.0]), "at least 0"),
    "no shares": (lambda f: both(f, [2.0, 2.0]), r"sum to 1, and these to 4; give \[0\.5, 0\.5\]"),
    "kind": (lambda f: both(f, None, "sum"), "expected mixture or product"),
    "self": (lambda f: TeacherEnsemble([FrozenSelf(), f["llama"]]), "holds a FrozenSelf"),
    "served": (
        lambda f: TeacherEnsemble([f["llama"], ServedTeacher("http://x:1")]),
        "holds a ServedTeacher",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_one_line(name, folders):
    wrong, message = MISTAKES[name]
    with pytest.raises(ConfigError, match=message) as raised:
        wrong(folders)
    assert "\n" not in str(raised.value)


def test_a_product_takes_any_weights(folders):
    assert both(folders, [2.0, 1.0], "product").weights == (2.0, 1.0)


def test_too_long_rows_name_the_member(folders, tmp_path, tiny_tokenizer):
    short = tiny.make_llama(5, max_position_embeddings=8)
    short.save_pretrained(tmp_path / "short")
    tiny_tokenizer.save_pretrained(tmp_path / "short")
    ensemble = TeacherEnsemble([folders["llama"], LoadedTeacher(tmp_path / "short")])
    with pytest.raises(ConfigError, match="context of the teacher short is 8"):
        train(tmp_path, make(folders, ensemble), [KD()])


@pytest.mark.parametrize(
    ("class_path", "settings", "words"),
    [
        ("HostTeacher", {}, "class_path HostTeacher is not a class of teacher; did you mean"),
        (
            "LoadedTeacher",
            {"modle": "x"},
            "LoadedTeacher has no setting modle; it has mod",
        ),
        (
            "LoadedTeacher",
            {"model": "x", "residence": "disk"},
            "is 'disk'; expected device or",
        ),
        ("LoadedTeacher", {}, "missing 1 required positional argument: 'model'"),
    ],
)
def test_a_member_of_a_config_says_what_is_wrong_with_it(class_path, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        TeacherEnsemble([{"class_path": class_path, "init_args": settings}])
