"""User-defined methods with typical mistakes.

Frozen here: a quantity, source, name or gradient that is missing or wrong is one error that names
the method and what to do, never a run that learns nothing or a loss that depends on the division of
batches.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import tiny

from okd_lightning.advantages import Advantage, reward_to_go
from okd_lightning.callbacks import SFT, AdvantageCallback, DistillationCallback, Stage
from okd_lightning.errors import ConfigError
from okd_lightning.losses import DrawnLogProb, Entropy, Quantity
from okd_lightning.losses.reduction import loss_output


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


@dataclass(frozen=True)
class Forgetful(Quantity):
    def measure(self, tile):
        return tile.student_logprobs.amax(-1)


class Changing(Forgetful):
    needs_teacher = False
    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class Own(DistillationCallback):
    on_policy_fraction = 0.0
    sources = ("dataset",)
    quantities = (DrawnLogProb(),)

    def loss(self, measured):
        return loss_output(self.values(measured), measured.mask(self.sources))

    def values(self, measured):
        return -measured[DrawnLogProb()]


class NoNeeds(Own):
    quantities = (Forgetful(),)


class NewQuantities(Own):
    @property
    def quantities(self):
        return (Changing(),)


class TextSource(Own):
    sources = "dataset"


class NoSuchSource(Own):
    sources = ("datset",)


class Undeclared(Own):
    def values(self, measured):
        return measured[Entropy()]


class PlainTensor(Own):
    def loss(self, measured):
        return self.values(measured).sum()


class NoGradient(Own):
    def values(self, measured):
        return super().values(measured).detach()


class Centred(Own):
    """Method whose loss is not positionwise, without is_positionwise = False."""

    def values(self, measured):
        values = super().values(measured)
        return (values - values.mean()).square()


class ToGo(Advantage):
    """Method whose loss is not positionwise, without is_positionwise = False."""

    def credit(self, student_logprobs, teacher_logprobs, mask, state_value=None):
        return reward_to_go(teacher_logprobs - student_logprobs, mask, 1.0)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (NoNeeds(), r"no_needs: Forgetful\(\) is not a Quantity with needs_teacher"),
        (NewQuantities(), r"new_quantities: quantities are not.*frozen dataclass"),
        (TextSource(), r"text_source: sources is 'dataset'; expected a tuple"),
        (NoSuchSource(), r"no_such_source: sources is \('datset',\); expected"),
        (Undeclared(), r"Entropy\(role='student'\) was not measured; add it"),
        (PlainTensor(), r"plain_tensor: loss returns Tensor; expected a LossOutput"),
        (NoGradient(), r"no_gradient: its loss carries no gradient"),
        (Centred(), r"centred: its loss over \d+ positions.*is_positionwise = False"),
        (AdvantageCallback(ToGo()), r"advantage_callback: its loss over.*is_positionwise = False"),
        (SFT(name="loss"), r"cannot be called 'loss'"),
    ],
    ids=lambda value: value.name if isinstance(value, DistillationCallback) else "",
)
def test_what_is_easily_forgotten(method, words, tmp_path, make_module):
    with pytest.raises(ConfigError, match=words):
        tiny.fit(tmp_path, make_module(), [method], tiny.make_rows(4))


@pytest.mark.parametrize("kind", [Centred, ToGo])
def test_what_says_so_is_right(kind, tmp_path, make_module):
    """With is_positionwise = False the loss is the same for any tile."""
    losses = []
    for tile in (1, 100):
        if kind is ToGo:
            advantage = ToGo()
            advantage.is_positionwise = False
            method = AdvantageCallback(advantage)
        else:
            method = Centred()
            method.is_positionwise = False
        module = make_module(tile_positions=tile)
        recorder = tiny.fit(tmp_path / str(tile), module, [method], tiny.make_rows(4))
        losses.append(recorder.losses[0]["train/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Masked(Own):
    """Method whose mask omits tokens that are in its divisor."""

    def loss(self, measured):
        values = self.values(measured)
        return loss_output(values, measured.mask(self.sources) & (measured.row > 0))


def test_a_later_stage_is_looked_at_as_well(tmp_path, make_module):
    methods = [Stage(SFT(), end=2), Stage(Masked(), start=2)]
    with pytest.raises(ConfigError, match="masked sums over"):
        tiny.fit(tmp_path, make_module(), methods, tiny.make_rows(16))
