"""Every method against a slow float64 reference, through Trainer.fit.

Frozen here: the loss that is logged and the gradient that reaches the optimizer are those of the
textbook formula over the step's tokens; cross-entropy never acts on the student's own samples; the
rows come from the requested generator; the teacher's weights are unchanged.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import reference_loss as reference
import tiny
import torch

from okd_lightning.callbacks import GKD, KD, SFT, DivergenceCallback
from okd_lightning.divergences import (
    AlphaDivergence,
    ForwardKL,
    Jeffreys,
    JensenShannon,
    NeymanChiSquared,
    PearsonChiSquared,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    SquaredHellinger,
    Tempered,
    TotalVariation,
)
from okd_lightning.errors import ConfigError

DATASET, STUDENT, TEACHER = 0, 1, 2


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def forward_kl(log_p, log_q):
    return reference.kl(log_q, log_p)


DIVERGENCES = {
    ForwardKL(): forward_kl,
    ReverseKL(): reference.kl,
    Jeffreys(): lambda p, q: reference.kl(p, q) + reference.kl(q, p),
    JensenShannon(0.5): lambda p, q: reference.jsd(p, q, 0.5),
    JensenShannon(0.1): lambda p, q: reference.jsd(p, q, 0.1),
    AlphaDivergence(0.3): reference.of_u(lambda u: (u**0.3 - 1 - 0.3 * (u - 1)) / (0.3 * -0.7)),
    SquaredHellinger(): reference.of_u(lambda u: (u.sqrt() - 1) ** 2),
    PearsonChiSquared(): reference.of_u(lambda u: (u - 1) ** 2),
    NeymanChiSquared(): reference.of_u(lambda u: (u - 1) ** 2 / u),
    TotalVariation(): reference.of_u(lambda u: (u - 1).abs() / 2),
    SkewForwardKL(0.1): lambda p, q: reference.skew_forward(p, q, 0.1),
    SkewReverseKL(0.1): lambda p, q: reference.skew_reverse(p, q, 0.1),
}


def plain(divergence):
    return lambda p, q, target, source: divergence(p, q)


def mixed_with_cross_entropy(divergence, w, tau):
    """(1 - w) tau^2 D + w CE on given rows, tau^2 D on the student's own."""

    def values(p, q, target, source):
        exact = tau**2 * divergence(p, q)
        return exact if source == STUDENT else (1 - w) * exact - w * target

    return values


METHODS = {
    "SFT": (SFT, plain(None), 1.0, {DATASET}),
    "SFT, teacher writes": (lambda: SFT(seq_kd=True), None, 1.0, {TEACHER}),
    "KD": (KD, plain(forward_kl), 1.0, {DATASET}),
    "KD at 4": (
        lambda: KD(temperature=4.0),
        mixed_with_cross_entropy(forward_kl, 0.0, 4.0),
        4.0,
        {DATASET},
    ),
    "KD at 0.5 + CE": (
        lambda: KD(temperature=0.5, cross_entropy_weight=0.3),
        mixed_with_cross_entropy(forward_kl, 0.3, 0.5),
        0.5,
        {DATASET},
    ),
    "KD, teacher writes": (lambda: KD(seq_kd=True), plain(forward_kl), 1.0, {TEACHER}),
    "GKD supervised": (
        lambda: GKD(0.5, on_policy_fraction=0.0),
        plain(lambda p, q: reference.jsd(p, q, 0.5)),
        1.0,
        {DATASET},
    ),
    "GKD half": (GKD, plain(lambda p, q: reference.jsd(p, q, 0.5)), 1.0, {DATASET, STUDENT}),
    "GKD half, teacher writes": (
        lambda: GKD(0.9, seq_kd=True, temperature=2.0),
        mixed_with_cross_entropy(lambda p, q: reference.jsd(p, q, 0.9), 0.0, 2.0),
        2.0,
        {TEACHER, STUDENT},
    ),
    "GKD on-policy": (
        lambda: GKD(1.0, on_policy_fraction=1.0),
        plain(reference.kl),
        1.0,
        {STUDENT},
    ),
    "half + CE": (
        lambda: DivergenceCallback(
            ReverseKL(), temperature=2.0, cross_entropy_weight=0.4, on_policy_fraction=0.5
        ),
        mixed_with_cross_entropy(reference.kl, 0.4, 2.0),
        2.0,
        {DATASET, STUDENT},
    ),
    **{
        f"{divergence!r}": (
            lambda divergence=divergence: DivergenceCallback(divergence, on_policy_fraction=0.5),
            plain(DIVERGENCES[divergence]),
            1.0,
            {DATASET, STUDENT},
        )
        for divergence in DIVERGENCES
    },
}


def cross_entropy(p, q, target, source):
    return -target


@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_of_every_step(name, tmp_path, make_module):
    make_method, values, temperature, sources = METHODS[name]
    values = cross_entropy if name.startswith("SFT") else values
    module = make_module(learning_rate=0.0)
    method = make_method()
    recorder = tiny.fit(tmp_path, module, [method], tiny.make_rows(21), accumulate_grad_batches=2)
    assert len(recorder.losses) == 3
    if "half" not in name and "DivergenceCallback" not in str(type(method)):
        assert all(step == sources for step in recorder.sources())
    assert all(len(step) == 1 for step in recorder.sources())
    assert set.union(*recorder.sources()) <= sources
    student, teacher = reference.double(module.student), reference.double(module.teacher)
    for i, losses in enumerate(recorder.losses):
        loss = reference.mean_loss(
            student, recorder.rows(i), values, tiny.NUM_IDS, teacher, temperature
        )
        assert losses["train/loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert losses[f"train/{method.name}"] == losses["train/loss"]
        (source,) = recorder.sources()[i]
        expected = reference.gradients(student, loss * recorder.token_share(i, source))
        found = {n.removeprefix("student."): g for n, g in recorder.gradients[i].items()}
        assert tiny.distance(found, expected) < 5e-5


def test_rows_are_the_data_sets_and_the_responses_of_the_requested_generator(tmp_path, make_module):
    rows = tiny.make_rows(12)
    ids = {c: 3 + i for i, c in enumerate(tiny.LETTERS)}
    expected = [
        ([ids[c] for c in row["prompt"]], [ids[c] for c in row["response"]] + [tiny.EOS])
        for row in rows
    ]
    for method, source in (
        (KD(), DATASET),
        (GKD(on_policy_fraction=1.0), STUDENT),
        (SFT(seq_kd=True), TEACHER),
    ):
        module = make_module(learning_rate=0.0)
        recorder = tiny.fit(tmp_path, module, [method], rows)
        author = module.teacher if source == TEACHER else module.student.eval()
        seen = set()
        for step in recorder.steps:
            for batch in step:
                for i, index in enumerate(batch.index.tolist()):
                    prompt, response = expected[index]
                    row = batch.input_ids[i, : batch.lengths[i]].tolist()
                    mask = batch.mask[i, : batch.lengths[i]].tolist()
                    assert row[: len(prompt)] == prompt
                    assert mask == [False] * len(prompt) + [True] * (len(row) - len(prompt))
                    if source == DATASET:
                        assert row[len(prompt) :] == response
                    else:
                        check_drawn_by(author, batch, i)
                    seen.add(index)
        assert seen == set(range(12))


def check_drawn_by(author, batch, i) -> None:
    """The sampler's log-probs are the author's own."""
    ids = batch.input_ids[i, : batch.lengths[i]]
    with torch.no_grad():
        logprobs = reference.row_logprobs(author, ids.tolist(), tiny.NUM_IDS)
    drawn = logprobs.gather(-1, ids[1:, None])[:, 0]
    start = int(batch.prompt_lengths[i])
    found = batch.sampler_logprobs[i, start : len(ids)]
    torch.testing.assert_close(found.double(), drawn[start - 1 :], rtol=1e-6, atol=1e-6)


def test_two_terms_add_up_each_with_its_own_count(tmp_path, make_module):
    module = make_module(learning_rate=0.0)
    kd, gkd = KD(weight=0.5), GKD(1.0, on_policy_fraction=1.0, weight=2.0)
    recorder = tiny.fit(tmp_path, module, [kd, gkd], tiny.make_rows(16), data={"batch_size": 8})
    student, teacher = reference.double(module.student), reference.double(module.teacher)

    def on(wanted, divergence):
        return lambda p, q, target, source: divergence(p, q) if source == wanted else None

    for i, losses in enumerate(recorder.losses):
        rows = recorder.rows(i)
        assert recorder.sources()[i] == {DATASET, STUDENT}
        given = reference.mean_loss(student, rows, on(DATASET, forward_kl), 19, teacher)
        own = reference.mean_loss(student, rows, on(STUDENT, reference.kl), 19, teacher)
        expected = {
            "train/kd": given.item(),
            "train/gkd": own.item(),
            "train/loss": 0.5 * given.item() + 2 * own.item(),
        }
        found = {name: losses[name] for name in expected}
        assert found == pytest.approx(expected, rel=2e-5)
        shared = 2 * own * recorder.token_share(i)
        gradient = reference.gradients(student, 0.5 * given + shared)
        found = {n.removeprefix("student."): g for n, g in recorder.gradients[i].items()}
        assert tiny.distance(found, gradient) < 5e-5


class HalfFinite(torch.nn.Module):
    """A head that gives some ids no mass at all."""

    def __init__(self, head, dead):
        super().__init__()
        self.head, self.dead = head, dead

    @property
    def weight(self):
        return self.head.weight

    def forward(self, hidden):
        return self.head(hidden).index_fill(-1, torch.tensor(self.dead), -math.inf)


def test_a_teacher_that_rules_ids_out_is_no_nan(tmp_path, tiny_pair, tiny_tokenizer):
    """Forward KL and JSD are finite there, and so is every gradient."""
    from okd_lightning.training.module import DistillationModule

    student, teacher = tiny_pair
    teacher.lm_head = HalfFinite(teacher.lm_head, [4, 5, 6])
    for divergence, values in ((ForwardKL(), forward_kl), (JensenShannon(0.5), None)):
        values = values or (lambda p, q: reference.jsd(p, q, 0.5))
        module = DistillationModule(student, teacher, tokenizer=tiny_tokenizer, learning_rate=0.0)
        recorder = tiny.fit(tmp_path, module, [KD(divergence)], tiny.make_rows(8))
        truth = reference.mean_loss(
            reference.double(student),
            recorder.rows(0),
            plain(values),
            19,
            reference.double(teacher),
        )
        assert recorder.losses[0]["train/loss"] == pytest.approx(truth.item(), rel=1e-5)
        assert all(g.isfinite().all() for g in recorder.gradients[0].values())


REFUSED = {
    "weight": (lambda: KD(weight=0.0), "weight"),
    "weight nan": (lambda: KD(weight=math.nan), "weight"),
    "temperature": (lambda: KD(temperature=0.0), "temperature"),
    "temperature inf": (lambda: GKD(temperature=math.inf), "temperature"),
    "w above 1": (lambda: KD(cross_entropy_weight=1.1), "cross_entropy_weight"),
    "w = 1": (lambda: KD(cross_entropy_weight=1.0), "use the method SFT"),
    "lambda": (lambda: GKD(on_policy_fraction=-0.1), "on_policy_fraction"),
    "lambda nan": (lambda: GKD(on_policy_fraction=math.nan), "on_policy_fraction"),
    "beta": (lambda: GKD(1.5), "beta"),
    "beta and divergence": (lambda: GKD(0.5, divergence=ForwardKL()), "not both"),
    "two temperatures": (
        lambda: KD(temperature=2.0, divergence=Tempered(ForwardKL(), 3.0)),
        "one of them",
    ),
    "CE with nothing given": (
        lambda: DivergenceCallback(cross_entropy_weight=0.5, on_policy_fraction=1.0),
        "has no effect",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_are_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        make()
