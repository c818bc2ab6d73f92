"""Frozen here: gradients, drift and steps of a diagnosis against direct computations.

* The exact estimator's gradient is autograd's of Σ KL, a sampled one's that of -Σ A ln p.
* Large students give the gradient of their last trained block, as a random sketch, which keeps
  inner products to the error that it states.
* Drift is that of the same steps made by hand; the weights come back bit for bit.
"""

from __future__ import annotations

import math

import pytest
import tiny
import torch

from okd_lightning.callbacks import GKD, SFT
from okd_lightning.commands.diagnose import gradients
from okd_lightning.commands.diagnose.gradients import GradientProbe
from okd_lightning.commands.diagnose.steps import StepProbe, drift_between
from okd_lightning.divergences import ReverseKL
from okd_lightning.records.batches import SOURCES, TrainingRow
from okd_lightning.records.collation import collate


def batch_of(seed: int, module=None):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(4):
        ids = torch.randint(3, tiny.NUM_IDS, (9 - index,), generator=generator).tolist()
        mask = [False] * 3 + [True] * (len(ids) - 3)
        rows.append(
            TrainingRow(index, "student", tuple(ids), tuple(mask), 3, (-1.0,) * (len(ids) - 3))
        )
    batch = collate(rows)
    if module is None:
        return batch
    with torch.no_grad():  # as if the student had drawn them just now
        student, _, ids = logprobs_at_loss(module, batch)
    batch.sampler_logprobs[:, 1:][batch.mask[:, 1:]] = (
        student.gather(-1, ids[:, None]).squeeze(-1).float()
    )
    return batch


@pytest.fixture
def module(make_module):
    module = make_module()
    module.configure_model()
    return module.eval()


def logprobs_at_loss(module, batch):
    """[positions, vocab] of both models, and the ids that stand there; with the student's graph."""
    found = []
    for model in (module.student, module.teacher):
        logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        cut = logits[:, :-1, : tiny.NUM_IDS].double().log_softmax(-1)
        found.append(cut[batch.mask[:, 1:]])
    return found[0], found[1].detach(), batch.input_ids[:, 1:][batch.mask[:, 1:]]


def test_gradients_are_autograds(module):
    batch = batch_of(1, module)
    probe = GradientProbe(module)
    for seed in (1, 2, 3):
        probe.add(batch_of(seed, module))
    student, teacher, ids = logprobs_at_loss(module, batch)
    drawn = student.gather(-1, ids[:, None]).squeeze(-1)
    log_ratio = (teacher - student).detach().gather(-1, ids[:, None]).squeeze(-1)
    value = (student.exp() * (teacher - student)).sum(-1).detach()
    losses = {
        "exact": (student.exp() * (student - teacher)).sum(),
        "centred": -(log_ratio * drawn).sum(),
        "as_published": -((log_ratio - 1) * drawn).sum(),
        "value_baseline": -((log_ratio - value) * drawn).sum(),
    }
    for name, loss in losses.items():
        parts = torch.autograd.grad(loss / len(batch), probe.part.parameters, retain_graph=True)
        direct = torch.cat([part.flatten() for part in parts])
        own = probe._found["reverse KL", name][0]
        assert (own - direct).norm() < 1e-4 * direct.norm()  # both in float32
    finding = probe.finding()
    assert (finding.batches, finding.rows) == (3, 4)
    assert finding.parameters == finding.of_parameters
    exact = finding.of("JSD", "exact")
    assert exact.along_exact == pytest.approx(1.0)
    assert exact.noise_over_exact == pytest.approx(1.0)


def products(gradients) -> torch.Tensor:
    """[estimators, estimators] inner products of one batch's gradients, over their norms."""
    rows = torch.stack([parts[0] for parts in gradients.values()]).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    return rows @ rows.T


def test_large_students_give_a_sketch_of_their_last_block(module, monkeypatch):
    batch = batch_of(1, module)
    block = list(module.student.model.layers[-1].parameters())
    whole = GradientProbe(module)
    monkeypatch.setattr(whole, "part", gradients.ProbedPart("block", tuple(block), True))
    whole.add(batch)
    monkeypatch.setattr(gradients, "MOST_PARAMETERS", 2000)
    monkeypatch.setattr(gradients, "SKETCH_SIZE", 4093)
    probe = GradientProbe(module)
    assert probe.part.name == "block 2 of 2"
    assert list(map(id, probe.part.parameters)) == list(map(id, block))
    probe.add(batch)
    assert all(p.requires_grad for p in module.student.parameters())
    assert probe._found["JSD", "exact"][0].shape == (4093,)
    # at most sqrt(2 / 4093) = 0.022 is one standard error
    assert (products(probe._found) - products(whole._found)).abs().max() < 0.09
    probe.add(batch_of(2, module))
    finding = probe.finding()
    assert (finding.part, finding.sketch) == ("block 2 of 2", 4093)
    assert finding.parameters == sum(p.numel() for p in block) < finding.of_parameters


def test_the_sketch_is_linear_and_keeps_inner_products():
    generator = torch.Generator().manual_seed(1)
    num = 3 * gradients.SKETCH_SIZE + 1000
    one, other = torch.randn(2, num, generator=generator)
    other = other + one
    sketch = gradients.Sketch(num, 5, torch.device("cpu"))
    whole = sketch([one])
    torch.testing.assert_close(sketch(one.split([7, 70_000, num - 70_007])), whole)
    torch.testing.assert_close(
        sketch([one + 2 * other]), whole + 2 * sketch([other]), atol=1e-4, rtol=1e-4
    )
    error = (float(whole @ sketch([other])) - float(one @ other)) / float(one.norm() * other.norm())
    assert abs(error) < 4 * (2 / gradients.SKETCH_SIZE) ** 0.5


def test_a_student_with_few_trained_parameters_gives_them_all(module, monkeypatch):
    for parameter in module.student.parameters():
        parameter.requires_grad_(False)
    first = module.student.model.layers[0]
    for parameter in first.parameters():
        parameter.requires_grad_(True)
    assert gradients.probed_part(module.student).name == "all trained parameters"
    monkeypatch.setattr(gradients, "MOST_PARAMETERS", 100)
    part = gradients.probed_part(module.student)
    assert part.name == "block 1 of 2"  # the last one that is trained
    assert part.parameters == tuple(first.parameters())


def test_drift_is_that_of_steps_made_by_hand(module):
    probe, steps = batch_of(1), [[batch_of(2)], [batch_of(3)]]
    before = tiny.weights(module)
    found = StepProbe(module, clip_norm=0.5).drift(probe, steps)
    assert all(torch.equal(before[name], now) for name, now in tiny.weights(module).items())
    assert all(p.grad is None for p in module.student.parameters())
    assert [drift.steps for drift in found] == [1, 2]
    with torch.no_grad():
        first, _, ids = logprobs_at_loss(module, probe)
    optimizer = torch.optim.AdamW(module.student.parameters(), lr=1e-2, weight_decay=0.0)
    for number, (batch,) in enumerate(steps):
        student, teacher, _ = logprobs_at_loss(module, batch)
        optimizer.zero_grad()
        (student.exp() * (student - teacher)).sum(-1).mean().backward()
        torch.nn.utils.clip_grad_norm_(module.student.parameters(), 0.5)
        optimizer.step()
        with torch.no_grad():
            now, _, _ = logprobs_at_loss(module, probe)
        moved = (now - first).gather(-1, ids[:, None]).abs().mean()
        assert found[number].mean_log_ratio == pytest.approx(float(moved), rel=1e-2)


def test_a_method_is_measured_with_its_further_terms(make_module):
    """Each term is divided by the tokens of its own rows in both micro-batches."""
    module = make_module(dtype="float64")
    module.configure_model()
    module.eval()
    method = GKD(divergence=ReverseKL(), on_policy_fraction=1.0, weight=2.0)
    method.further_terms = (SFT(weight=0.5, name="beside"),)
    dataset = SOURCES.index("dataset")
    batches = []
    for seed in (2, 3):
        batch = batch_of(seed)
        batch.source[:seed] = dataset
        batches.append(batch)
    optimizer = torch.optim.AdamW(module.student.parameters(), lr=1e-2, weight_decay=0.0)
    steps = StepProbe(module, None)
    with steps.kept():
        assert list(steps.take(method, [batches])) == [1]
        taken = tiny.weights(module)
    sums, counts = {}, {}
    for batch in batches:
        student, teacher, ids = logprobs_at_loss(module, batch)
        is_given = (batch.source[:, None].expand_as(batch.mask)[:, 1:] == dataset)[
            batch.mask[:, 1:]
        ]
        exact = (student.exp() * (student - teacher)).sum(-1)[~is_given]
        drawn = student.gather(-1, ids[:, None])[is_given]
        for name, values in (("exact", exact), ("given", -drawn)):
            sums[name] = sums.get(name, 0) + values.sum()
            counts[name] = counts.get(name, 0) + len(values)
    (2 * sums["exact"] / counts["exact"] + 0.5 * sums["given"] / counts["given"]).backward()
    optimizer.step()
    assert tiny.distance(taken, tiny.weights(module)) < 1e-9


def test_drift_between():
    before = torch.zeros(4, dtype=torch.float64)
    after = torch.tensor([0.0, 0.0, math.log(2), -math.log(2)], dtype=torch.float64)
    found = drift_between(3, before, after)
    assert found.mean_log_ratio == pytest.approx(math.log(2) / 2)
    assert found.outside == 0.5
    assert found.effective_share == pytest.approx(4.5**2 / (4 * 6.25))


def test_memory_counts_weights_gradients_and_moments(module):
    numbers = sum(p.numel() for p in module.student.parameters())
    found = StepProbe(module, None).memory()
    assert found["student"] == found["gradients"] == 4 * numbers
    assert found["optimizer (AdamW)"] == 8 * numbers
