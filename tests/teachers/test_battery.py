"""One battery for every kind of teacher (``teacher_kinds.KINDS``).

Frozen here, for each: the first step's loss is that of the teacher's own distribution, computed row
by row from full logits; gradients reach the student and the teacher's trained parameters alone; it
generates, or refuses methods that have it generate; a resumed run is the uninterrupted one, with
the teacher's weights; a checkpoint's module has the same teacher; two ranks train as one; a method
that it cannot serve is refused before training; every class of teacher is in the battery.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from fake_vllm_server import FakeVLLM, serving
from lightning.pytorch.callbacks import Callback
from parallel_runs import spawn
from teacher_kinds import ALL, KINDS, Kind, Place
from torch import nn

from okd_lightning import teachers
from okd_lightning.callbacks import KD, LastCheckpoint
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Side
from okd_lightning.teachers import Teacher
from okd_lightning.training.arguments import stored_arguments
from okd_lightning.training.module import DistillationModule

TEMPLATE = {"teacher_prompt_template": "{reference}p{prompt}"}
ROWS = [{**row, "of": "ab"[i % 2]} for i, row in enumerate(tiny.make_rows(12))]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer) -> Path:
    """Folders of a student with more rows than the tokenizer has ids, and of a teacher without."""
    root = tmp_path_factory.mktemp("kinds")
    teacher = tiny.make_llama(2, ALL)
    for name, model in (
        ("student", tiny.make_llama(1)),
        ("teacher", teacher),
        ("copy", teacher),
    ):
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    tiny.make_tokenizer(tiny.LETTERS[::-1]).save_pretrained(root / "teacher tokenizer")
    return root


@pytest.fixture(scope="module")
def urls(tiny_tokenizer):
    """Addresses of the teacher with the student's tokenizer, and with another one."""
    with ExitStack() as open_servers:
        tokenizers = tiny_tokenizer, tiny.make_tokenizer(tiny.LETTERS[::-1])
        engines = [
            open_servers.enter_context(serving(FakeVLLM(tiny.make_llama(2, ALL).double(), one)))
            for one in tokenizers
        ]
        yield [engine.url for engine in engines]


def place_of(models: Path, cache: Path, urls: list[str]) -> Place:
    folders = str(models / "teacher"), str(cache)
    return Place(*folders, urls[0], str(models / "copy"), foreign_url=urls[1])


@pytest.fixture
def place(models, urls, tmp_path) -> Place:
    return place_of(models, tmp_path / "cache", urls)


def make(kind: Kind, place: Place) -> DistillationModule:
    student = str(Path(place.teacher).parent / "student")
    torch.manual_seed(3)
    return DistillationModule(
        student,
        kind.make(place),
        dtype="float64",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        **kind.model,
    )


def train(root: Path, kind: Kind, module: DistillationModule, methods, **settings):
    """Three steps of four rows, in which the teacher reads prompts of its own."""
    given = {"max_steps": 3, "callbacks": [LastCheckpoint(1)], **settings}
    return tiny.fit(root, module, methods, ROWS, data={**TEMPLATE, **kind.data}, **given)


def divergence_of(module: DistillationModule, batch, teacher, has_cells=False) -> float:
    """KL(teacher || student) per loss token, in nats, from full logits of one row at a time.

    With ``has_cells`` between {token, any other}, for tokens that are one to one.
    """
    total, count = 0.0, 0
    student = module.student
    for row in range(len(batch)):
        sides = []
        for model, reads in ((student, batch.student_reads), (teacher, batch.teacher_reads)):
            length = int(reads.lengths[row])
            ids, mask = reads.input_ids[row, :length], reads.mask[row, 1:length]
            logits = model(ids[None]).logits[0, :-1, :ALL]
            logprobs = logits[mask].log_softmax(-1)
            if has_cells:
                one = logprobs.gather(-1, ids[1:][mask][:, None])
                logprobs = torch.cat([one, (-one.expm1()).log()], -1)
            sides.append(logprobs)
        log_p, log_q = sides
        total += float((log_q.exp() * (log_q - log_p)).sum())
        count += len(log_p)
    return total / count


class Start(Callback):
    """Callback that copies all parameters before the first step."""

    def on_train_start(self, trainer, pl_module):
        self.parameters = {n: p.clone() for n, p in pl_module.named_parameters()}


@dataclass(frozen=True)
class Whole:
    """Three uninterrupted steps."""

    place: Place
    module: DistillationModule
    recorder: tiny.Recorder
    before: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(models, urls, tmp_path_factory) -> Callable[[str], Whole]:
    """The run of a kind, made when a test first asks for it."""
    made: dict[str, Whole] = {}

    def run_of(name: str) -> Whole:
        if name not in made:
            kind, root, start = KINDS[name], tmp_path_factory.mktemp("whole"), Start()
            place = place_of(models, root / "cache", urls)
            module = make(kind, place)
            recorder = train(root, kind, module, [kind.method(), start])
            made[name] = Whole(place, module, recorder, start.parameters)
        return made[name]

    return run_of


@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_that_of_its_distribution(name, place, whole):
    kind, recorder = KINDS[name], whole(name).recorder
    start = make(KINDS["loaded"], place)
    start.configure_model()
    reference = start.student if kind.is_student else start.teacher
    batch = recorder.steps[0][0]
    assert batch.teacher_input_ids is not None
    with torch.no_grad():
        expected = divergence_of(start, batch, reference.eval(), kind.has_cells)
    assert expected > 0.01
    assert recorder.losses[0][kind.logged] == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_gradient_reaches_the_student_and_trained_parameters_alone(name, whole):
    kind, found = KINDS[name], whole(name)
    module, before = found.module, found.before
    (*_, last) = found.recorder.gradients
    own = {name for name in last if name.startswith("teacher.")}
    assert last.keys() - own
    assert bool(own) == bool(kind.trained)
    assert all(kind.trained in name for name in own)
    assert {id(p) for p in module.pair.teacher.trained_parameters()} == {
        id(p) for n, p in module.named_parameters() if n in own
    }
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before.get(n, p))}
    assert any(n.startswith("student.") for n in moved)
    assert any(n.startswith("teacher.") for n in moved) == kind.moves


@pytest.mark.parametrize("name", KINDS)
def test_it_generates_or_says_that_it_cannot(name, place, tmp_path):
    kind = KINDS[name]
    module = make(kind, place)
    if kind.generates:
        recorder = train(tmp_path, kind, module, [KD(seq_kd=True)], max_steps=1)
        assert recorder.sources() == [{2}]
        return
    with pytest.raises(
        ConfigError, match=r"has the teacher generate responses; give --model\.teach"
    ):
        train(tmp_path, kind, module, [KD(seq_kd=True)])


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(name, whole, tmp_path):
    kind, place = KINDS[name], whole(name).place
    expected, uncut = whole(name).recorder, whole(name).module
    first, second = (make(kind, place) for _ in range(2))
    train(tmp_path / "cut", kind, first, [kind.method()], max_steps=2)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    found = train(tmp_path / "cut", kind, second, [kind.method()], ckpt_path=str(last))
    assert found.losses == expected.losses[2:]
    for one, other in ((uncut.student, second.student), (uncut.teacher, second.teacher)):
        assert (one is None) == (other is None)
        if one is not None:
            states = one.state_dict(), other.state_dict()
            assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    stored = DistillationModule.load_from_checkpoint(str(last))
    given, kept = make(kind, place).pair.given_teacher, stored.pair.given_teacher
    assert type(kept) is type(given)
    assert stored_arguments({"teacher": kept}) == stored_arguments({"teacher": given})


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].refuses])
def test_what_it_cannot_serve_is_refused_before_training(name, place, tmp_path):
    kind = KINDS[name]
    method, words = kind.refuses
    methods = [method(), *([kind.method()] if kind.trained else [])]
    for second in methods[1:]:
        second.name = "second"
    module = make(kind, place)
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, kind, module, methods)
    assert module.student is None


def test_every_class_is_in_the_battery():
    made = {type(kind.make(Place("t", "c", "http://x", "d"))) for kind in KINDS.values()}
    classes = {getattr(teachers, name) for name in teachers.__all__}
    kinds = {c for c in classes if isinstance(c, type) and issubclass(c, Teacher)}
    assert made == kinds - {Teacher, teachers.NoTeacher}


class Uniform(Teacher):
    """The example of ``Teacher``: all ids are equally likely."""

    generates = False
    arguments = {}

    def side(self, batch, quantities):
        positions = len(batch.teacher_reads.targets)
        return Side(torch.zeros(positions, self.run.vocabulary.size), nn.Identity())


def test_a_kind_of_ones_own_is_one_class(place, tmp_path):
    kind = Kind(lambda at: Uniform())
    module = make(kind, place)
    recorder = train(tmp_path, kind, module, [KD()], max_steps=1)
    start = make(KINDS["loaded"], place)
    start.configure_model()

    def uniform(ids):
        return SimpleNamespace(logits=torch.zeros(*ids.shape, ALL, dtype=torch.float64))

    with torch.no_grad():
        expected = divergence_of(start, recorder.steps[0][0], uniform)
    assert recorder.losses[0]["train/kd"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(
        ConfigError, match=r"Uniform generates none: give --model\.teacher a folder"
    ):
        train(tmp_path, kind, make(kind, place), [KD(seq_kd=True)])


# ------------------------------------------------------------------- two ranks


def run(root: Path, devices: int, name: str, urls: list[str]) -> dict[str, torch.Tensor]:
    kind = KINDS[name]
    module = make(kind, place_of(root, root / f"cache {name}", urls))
    trainer = tiny.make_trainer(
        root / f"{name} {devices}",
        [kind.method()],
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=2,
        limit_val_batches=0,
    )
    options = {"batch_size": 4 // devices, "max_response_length": 8, "seed": 7, "val_rollouts": 0}
    trainer.fit(module, RolloutDataModule(ROWS, **options, **TEMPLATE, **kind.data))
    return {n: p.detach().clone() for n, p in module.named_parameters()}


def of_one_rank(rank: int, root: Path) -> None:
    """Body of a spawned process."""
    urls = (root / "urls").read_text().split()
    torch.save({name: run(root, 2, name, urls) for name in KINDS}, root / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(models, urls):
    (models / "urls").write_text("\n".join(urls))
    spawn(of_one_rank, models)
    return [torch.load(models / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_train_as_one(name, ranks, models, urls):
    alone = run(models, 1, name, urls)
    for rank in ranks:
        assert tiny.distance(rank[name], alone) < 1e-9
