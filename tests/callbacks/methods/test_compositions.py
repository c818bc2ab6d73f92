"""Several methods on one run, at the same time and one after the other.

Frozen here: the gradient is the sum of the parts; in each stage the methods that act determine the
generator, and nothing else is logged; a run may not continue after its last stage.
"""

from __future__ import annotations

from functools import partial

import pytest
import tiny

from okd_lightning.callbacks import GKD, KD, OKD, SFT, OPDPlus, Reward, Stage
from okd_lightning.divergences import ForwardKL, JensenShannon
from okd_lightning.errors import ConfigError

DATASET, STUDENT = 0, 1


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


def single_gradients(tmp_path, make_module, methods, **settings):
    module = make_module(learning_rate=0.0)
    data = {"batch_size": 8, **settings}
    return tiny.fit(tmp_path, module, methods, tiny.make_rows(16), data=data)


COMPOSITIONS = {
    "KD + OPD+": lambda: [KD(weight=0.5), OPDPlus(JensenShannon(0.5), weight=2.0)],
    "GKD + reward": lambda: [
        GKD(1.0, on_policy_fraction=1.0, weight=0.7),
        Reward(length_of, weight=0.3),
    ],
    "KD + OPD+ + reward": lambda: [KD(), OPDPlus(), Reward(length_of, weight=0.1)],
    "OKD on rollouts": lambda: [OKD(on_policy_fraction=0.5)],
    "OKD + OPD+": lambda: [OKD(), OPDPlus(ForwardKL())],
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_the_gradient_is_the_sum_of_the_parts(name, tmp_path, make_module):
    """Each part alone on the same rows (others at a weight that vanishes), then all together."""
    together = single_gradients(tmp_path, make_module, COMPOSITIONS[name]())
    parts = []
    for chosen in range(len(COMPOSITIONS[name]())):
        methods = COMPOSITIONS[name]()
        for i, method in enumerate(methods):
            if i != chosen:
                method.weight = 1e-30
        parts.append(single_gradients(tmp_path, make_module, methods))
    for step, whole in enumerate(together.gradients):
        rows = together.rows(step)
        assert all(part.rows(step) == rows for part in parts)
        total = {n: sum(part.gradients[step][n] for part in parts) for n in whole}
        assert tiny.distance(whole, total) < 1e-5
        assert all(
            float(sum(g.abs().sum() for g in part.gradients[step].values())) > 0 for part in parts
        )


def test_methods_follow_one_another(tmp_path, make_module):
    """SFT, then GKD on-policy, then OPD+ together with a KD of falling weight, in one fit."""
    methods = [
        Stage(SFT(), end=2),
        Stage(GKD(on_policy_fraction=1.0), start=2, end=4),
        Stage(OPDPlus(), start=4),
        Stage(KD(weight=0.5), start=4, end=6, first_factor=1.0, last_factor=0.2),
    ]
    module = make_module(learning_rate=0.0)
    recorder = tiny.fit(tmp_path, module, methods, tiny.make_rows(32))
    assert recorder.sources()[:4] == [{DATASET}] * 2 + [{STUDENT}] * 2
    assert recorder.sources()[4:6] == [{DATASET, STUDENT}] * 2
    assert recorder.sources()[6:] == [{STUDENT}] * 2
    named = [{name for name in losses if name in METHOD_NAMES} for losses in differences(recorder)]
    assert (
        named
        == [{"train/sft"}] * 2
        + [{"train/gkd"}] * 2
        + [{"train/opd_plus", "train/kd"}] * 2
        + [{"train/opd_plus"}] * 2
    )
    for step, factor in ((4, 1.0), (5, 0.2)):
        losses = recorder.losses[step]
        expected = losses["train/opd_plus"] + 0.5 * factor * losses["train/kd"]
        assert losses["train/loss"] == pytest.approx(expected, rel=1e-5)


METHOD_NAMES = {"train/sft", "train/gkd", "train/kd", "train/opd_plus"}


def differences(recorder):
    """Values logged in each step: a Trainer keeps the last value of what is no longer logged."""
    before: dict[str, float] = {}
    for losses in recorder.losses:
        yield {n: v for n, v in losses.items() if before.get(n) != v}
        before = losses


def test_a_run_beyond_its_last_stage_is_refused(tmp_path, make_module):
    with pytest.raises(ConfigError, match=r"no method acts from optimizer step 2 on.*max_steps 2"):
        tiny.fit(tmp_path, make_module(), [Stage(SFT(), end=2)], tiny.make_rows(32))
