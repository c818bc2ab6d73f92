"""Hidden states of layers as a term.

Frozen here: the distances and the layers' numbers against transformers' own hidden states; equal
models give loss and gradient exactly 0; a projector at the least-squares solution has no gradient;
packing, tiles, accumulation and gradient checkpointing change nothing; projectors are seeded,
trained without weight decay, resumed bit for bit, and in no exported model; other terms' losses
stay as they are to the last bit; what cannot work is refused before models are loaded.
"""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from okd_lightning.callbacks import GKD, KD, OKD, SFT, HiddenStates, Stage
from okd_lightning.errors import ConfigError
from okd_lightning.losses import HiddenDistance
from okd_lightning.models import Projectors
from okd_lightning.records.states import States
from okd_lightning.teachers import CachedTeacher, FrozenSelf, ServedTeacher, TeacherEnsemble
from okd_lightning.training.module import DistillationModule

LAYERS = {0: 0, 1: 2, 2: 3, -1: -1}


@pytest.fixture
def make_module(make_module):
    """Return a module in float64, so that runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64", learning_rate=1e-2)


@pytest.fixture(scope="session")
def wide_folder(tmp_path_factory, tiny_tokenizer) -> str:
    """A teacher with three layers of width 48."""
    folder = tmp_path_factory.mktemp("wide")
    tiny.make_llama(
        4, tiny.TEACHER_ROWS, hidden_size=48, num_hidden_layers=3, head_dim=8
    ).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


def run(root, module, methods, rows=12, **settings):
    return tiny.fit(root, module, methods, tiny.make_rows(rows), **settings)


def test_the_loss_is_that_of_transformers_hidden_states(tmp_path, make_module, wide_folder):
    """States are read at the positions before the loss tokens; the last block's before the norm."""
    module = make_module(teacher=wide_folder, learning_rate=0.0)
    recorder = run(tmp_path, module, [KD(), HiddenStates(LAYERS)], max_steps=1)
    (batch,) = recorder.steps[0]
    maps = {name: own.weight.detach() for name, own in module.projectors.maps.items()}
    norms = {"student": module.student.model.norm, "teacher": module.teacher.model.norm}
    total, count = 0.0, 0
    for row in range(len(batch)):
        ids = batch.input_ids[row : row + 1, : batch.lengths[row]]
        at = (batch.mask[row, 1 : batch.lengths[row]]).nonzero().squeeze(-1)
        taken = {}
        for side in ("student", "teacher"):
            model, last = getattr(module, side), []
            handle = norms[side].register_forward_pre_hook(lambda m, a, kept=last: kept.append(a))
            with torch.no_grad():
                states = list(model(ids, output_hidden_states=True).hidden_states)
            handle.remove()
            normed = states.pop()
            taken[side] = {**dict(enumerate(states)), len(states): last[0][0], -1: normed}
        for own, wanted in LAYERS.items():
            a = taken["student"][own][0, at] @ maps[f"hidden_states_{own}_{wanted}"].T
            b = taken["teacher"][wanted][0, at]
            total += float(((a - b).square().sum(-1) / b.square().sum(-1)).sum()) / len(LAYERS)
        count += len(at)
    assert recorder.losses[0]["train/hidden_states"] == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_equal_models_have_loss_and_gradient_zero(loss, tmp_path, make_module, student_folder):
    module = make_module(teacher=str(student_folder))
    states = HiddenStates({0: 0, 1: 1, 2: 2, -1: -1}, loss)
    recorder = run(tmp_path, module, [states], max_steps=2)
    assert module.projectors is None
    for step, gradients in enumerate(recorder.gradients):
        assert recorder.losses[step]["train/hidden_states"] == 0.0
        assert all(not gradient.any() for gradient in gradients.values())


def test_the_distances_by_hand():
    own = torch.tensor([[3.0, 4.0], [0.0, 2.0]], requires_grad=True)
    wanted = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    states = States({1: own}), States({2: wanted})
    rows = torch.zeros(2, dtype=torch.int64)
    for loss, expected in {"mse": [18.0, 2.0], "cosine": [0.2, 1.0]}.items():
        distance = HiddenDistance(((1, 2),), loss)
        assert distance.measure_states(*states, rows, None).tolist() == pytest.approx(expected)


def test_a_projector_at_the_least_squares_solution_has_no_gradient():
    """Weighted by 1 / ‖h_T‖²: the only stationary point, and the loss there is the residual."""
    torch.manual_seed(0)
    own, wanted = torch.randn(50, 5).double(), torch.randn(50, 3).double()
    distance = HiddenDistance(((1, 2),))
    name = distance.projector((1, 2))
    maps = Projectors({name: (5, 3)}, torch.float64)
    size = wanted.norm(dim=-1, keepdim=True)
    solved = torch.linalg.lstsq(own / size, wanted / size)
    maps.maps[name].weight.data.copy_(solved.solution.T)
    rows = torch.zeros(50, dtype=torch.int64)
    states = States({1: own}), States({2: wanted})
    total = distance.measure_states(*states, rows, maps).sum()
    total.backward()
    residual = (own / size @ solved.solution - wanted / size).square().sum()
    assert total.item() == pytest.approx(residual.item())
    assert maps.maps[name].weight.grad.abs().max() < 1e-12
    maps.maps[name].weight.data += 1e-3
    assert distance.measure_states(*states, rows, maps).sum() > total


def test_the_cut_of_a_step_changes_nothing(tmp_path, make_module, wide_folder):
    """Micro-batches, packing and recomputation, with rows of both sources."""
    cuts = {
        "whole": {"data": {"batch_size": 8}},
        "cut": {"data": {"batch_size": 2}, "accumulate_grad_batches": 4},
        "padded": {"data": {"batch_size": 8}},
        "recomputed": {"data": {"batch_size": 8}},
    }
    found = {}
    for name, settings in cuts.items():
        module = make_module(
            teacher=wide_folder,
            packing=name != "padded",
            gradient_checkpointing=name == "recomputed",
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
            learning_rate=None,
        )
        methods = [GKD(on_policy_fraction=0.5), HiddenStates(LAYERS, weight=0.5)]
        recorder = run(tmp_path / name, module, methods, max_steps=3, **settings)
        found[name] = recorder.gradients, recorder.losses
    for gradients, losses in found.values():
        for own, expected in zip(gradients, found["whole"][0], strict=True):
            assert tiny.distance(own, expected) < 1e-9
        for own, expected in zip(losses, found["whole"][1], strict=True):
            assert own == pytest.approx(expected, rel=1e-5)


def test_other_terms_stay_as_they_are(tmp_path, make_module):
    """Their logged sums, and the gradient without the term's own, are equal to the last bit."""
    alone = run(tmp_path / "1", make_module(learning_rate=0.0), [KD()], max_steps=2)
    with_states = [KD(), HiddenStates({1: 1}, weight=1e-300)]
    beside = run(tmp_path / "2", make_module(learning_rate=0.0), with_states, max_steps=2)
    for own, expected in zip(beside.losses, alone.losses, strict=True):
        assert own["train/kd"] == expected["train/kd"]
    for own, expected in zip(beside.gradients, alone.gradients, strict=True):
        assert all(torch.equal(own[name], value) for name, value in expected.items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_projectors_are_seeded_and_resume_bit_for_bit(tmp_path, make_module, wide_folder):
    def fit(folder, **settings):
        module = make_module(teacher=wide_folder, dtype="float32", weight_decay=0.1)
        torch.manual_seed(len(str(folder)))  # what was drawn before does not matter
        torch.rand(3)
        torch.manual_seed(5)
        saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=1, save_top_k=-1)
        methods = [SFT(), HiddenStates({1: 2, -1: -1}, "cosine")]
        run(folder, module, methods, callbacks=[saver], **settings)
        return module

    whole = fit(tmp_path / "whole", max_steps=5)
    fit(tmp_path / "cut", max_steps=2)
    resumed = fit(tmp_path / "cut", max_steps=5, ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert len(whole.projectors.maps) == 2
    for own, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(own, expected)
    checkpoint = torch.load(tmp_path / "whole" / "last.ckpt", weights_only=True)
    names = [name for name in checkpoint["state_dict"] if name.startswith("projectors.")]
    assert len(names) == 2
    (group,) = [
        group
        for group in checkpoint["optimizer_states"][0]["param_groups"]
        if group["name"] == "projectors"
    ]
    assert group["weight_decay"] == 0.0
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "whole" / "last.ckpt", strict=True)
    assert loaded.projectors is None
    assert tiny.distance(tiny.weights(loaded), tiny.weights(whole)) == 0


def test_stages_and_an_online_module(tmp_path, make_module, wide_folder):
    """Projectors wait for their stage; alone it trains what its layers depend on."""
    module = make_module(teacher=wide_folder)
    methods = [Stage(HiddenStates({1: 2}), end=2), Stage(OKD(), start=1)]
    recorder = run(tmp_path, module, methods, max_steps=3, gradient_clip_val=0.5)
    first, second, third = recorder.gradients
    head = "student.lm_head.weight"
    moved = [any(name.startswith("projectors.") for name in step) for step in (first, second)]
    assert moved == [True, True]
    assert not first[head].any()
    assert second[head].any()
    assert all(not own.any() for name, own in third.items() if name.startswith("projectors."))


def test_the_student_as_its_own_teacher(tmp_path, make_module):
    module = make_module(teacher=FrozenSelf())
    recorder = run(tmp_path, module, [KD(), HiddenStates({1: 1, -1: -1})], max_steps=2)
    assert recorder.losses[0]["train/hidden_states"] == 0.0
    assert recorder.losses[1]["train/hidden_states"] >= 0.0


def test_settings_that_are_refused(tmp_path, make_module, wide_folder, student_folder):
    for layers in ({}, [1, 2], {1: "2"}, {1.0: 2}, {True: 1}):
        with pytest.raises(ConfigError, match=r"hidden_states: layers is .*such as \{2: 4, -1"):
            HiddenStates(layers)
    with pytest.raises(ConfigError, match="loss is 'l1'; expected mse or cosine"):
        HiddenStates({1: 1}, "l1")
    for layers, side in (({3: 1}, "student"), ({1: 4}, "teacher"), ({-2: 1}, "student")):
        with pytest.raises(ConfigError, match=rf"the {side} has no layer .*0 \(embeddings\), 1 to"):
            run(tmp_path, make_module(teacher=wide_folder), [KD(), HiddenStates(layers)])
    teachers = {
        "CachedTeacher": CachedTeacher(model=wide_folder, folder=str(tmp_path / "cache")),
        "ServedTeacher": ServedTeacher(url="http://localhost:1", model=None),
        "TeacherEnsemble": TeacherEnsemble([wide_folder, str(student_folder)]),
    }
    for name, teacher in teachers.items():
        with pytest.raises(ConfigError, match=rf"layers, and {name} gives none.*folder or hub id"):
            run(tmp_path, make_module(teacher=teacher), [KD(), HiddenStates({1: 1})])
    with pytest.raises(ConfigError, match="needs a teacher"):
        run(tmp_path, make_module(teacher=None), [SFT(), HiddenStates({1: 1})])
