"""UNC, ExAccErr and the spread of logits against slow references in plain Python.

* UNC of a response is the mean over its tokens of 1 - probability of the target; difficulty is the
  *teacher's* UNC, and the thirds cover every response once.
* ExAccErr is 0 where both kinds of prefixes are equally hard, 100 where the student's own are twice
  as hard; each author's divergences go into its own sum; steps that few responses reach do not
  count.
* The standard deviation of log-probabilities is that of the logits; ids that do not exist are left
  out.
* A metric that is fed in pieces gives what it gives at once.
"""

import math
import random
import statistics

import pytest
import torch

from okd_lightning.losses.quantities import Tile
from okd_lightning.metrics import (
    DIFFICULTIES,
    ExcessAccumulatedError,
    LogitStd,
    Uncertainty,
    by_difficulty,
    excess_accumulated_error,
    logit_std,
    response_uncertainty,
)


def test_uncertainty_of_responses():
    logprobs = [-0.1, -2.0, -0.7, -3.0, -0.01]
    row = [0, 0, 2, 2, 2]
    found = response_uncertainty(torch.tensor(logprobs), torch.tensor(row), 3).tolist()
    for number in (0, 2):
        own = [1 - math.exp(v) for v, r in zip(logprobs, row, strict=True) if r == number]
        assert found[number] == pytest.approx(statistics.mean(own))
    assert math.isnan(found[1])


@pytest.mark.parametrize("num", [3, 7, 9])
def test_thirds_are_by_the_teacher(num):
    rng = random.Random(num)
    student = [rng.random() for _ in range(num)]
    teacher = [rng.random() for _ in range(num)]
    metric = Uncertainty()
    for s, t in zip(student, teacher, strict=True):
        metric.update(torch.tensor([s]), torch.tensor([t]))
    found = {name: float(value) for name, value in metric.compute().items()}
    ranked = [s for _, s in sorted(zip(teacher, student, strict=True))]
    sizes = [num // 3 + (i < num % 3) for i in range(3)]
    for name, size in zip(DIFFICULTIES, sizes, strict=True):
        own, ranked = ranked[:size], ranked[size:]
        assert found[name] == pytest.approx(statistics.mean(own))
    assert found["all"] == pytest.approx(statistics.mean(student))


def test_ties_keep_their_order():
    found = by_difficulty(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3))
    assert [float(found[name]) for name in DIFFICULTIES] == [1, 2, 3]


def test_excess_accumulated_error():
    teacher = torch.tensor([0.5, 0.25, 0.25])
    assert float(excess_accumulated_error(teacher, teacher)) == 0
    assert float(excess_accumulated_error(2 * teacher, teacher)) == pytest.approx(100)
    regret, length = 0.1 + 0.6 + 0.8, 3
    epsilon = (0.5 + 0.25 + 0.25) / length
    expected = (regret - length * epsilon) / (length * epsilon) * 100
    found = excess_accumulated_error(torch.tensor([0.1, 0.6, 0.8]), teacher)
    assert float(found) == pytest.approx(expected)


@pytest.mark.parametrize("pieces", [1, 4])
def test_excess_accumulated_error_of_ragged_responses(pieces):
    rng = random.Random(0)
    lengths = {"student": [1, 2, 4, 4, 5], "teacher": [3, 3, 4, 1, 6]}
    kls = {who: [[rng.random() for _ in range(n)] for n in ns] for who, ns in lengths.items()}
    metric = ExcessAccumulatedError(max_steps=6)
    for who, responses in kls.items():
        flat = [(value, step) for response in responses for step, value in enumerate(response)]
        for start in range(pieces):
            part = flat[start::pieces]
            metric.update(
                torch.tensor([value for value, _ in part]),
                torch.tensor([step for _, step in part]),
                is_student_prefix=who == "student",
            )

    def mean(who, step):
        return statistics.mean(r[step] for r in kls[who] if len(r) > step)

    steps = range(3)  # 3 of 5 students reach step 2, 3 of 5 teachers too; 2 of 5 teachers step 3
    regret = sum(mean("student", step) for step in steps)
    expected = sum(mean("teacher", step) for step in steps)
    assert float(metric.compute()) == pytest.approx((regret - expected) / expected * 100)


def test_logit_std():
    logits = 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) + 4
    expected = [statistics.pstdev(row) for row in logits.tolist()]
    assert logit_std(logits.log_softmax(-1)).tolist() == pytest.approx(expected, rel=1e-5)
    padded = torch.cat([logits, torch.full((5, 2), float("-inf"))], dim=1)
    assert logit_std(padded.log_softmax(-1)).tolist() == pytest.approx(expected, rel=1e-5)


def test_logit_std_asks_for_the_right_model():
    student, teacher = torch.randn(2, 5), 7 * torch.randn(2, 5)
    tile = Tile(student, teacher, torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(
        LogitStd("teacher").measure(tile), teacher.std(-1, correction=0), rtol=1e-4, atol=1e-4
    )
    assert not LogitStd("student").needs_teacher
    assert LogitStd("teacher").needs_teacher
