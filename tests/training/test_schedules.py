"""Learning-rate schedules.

Frozen here: warm-up rises from 1/n to 1; the rate then stays, or falls to 0 at the last step along
a line or half a cosine; an unknown name is an error and not another schedule.
"""

from __future__ import annotations

import math

import pytest

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.online_module import check_schedule
from okd_lightning.training.optimizers import schedule_factor


def factors(name, warmup_steps=4, total_steps=12):
    return [schedule_factor(name, step, warmup_steps, total_steps) for step in range(13)]


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_warm_up_and_ends(name):
    found = factors(name)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    assert found[12] == pytest.approx(1.0 if name == "constant" else 0.0)
    assert schedule_factor(name, 99, 4, 12) == pytest.approx(found[12])
    assert schedule_factor(name, 0, 0, 12) == 1.0


def test_the_way_down():
    assert factors("linear")[4:] == pytest.approx([1 - i / 8 for i in range(9)])
    half_cosine = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert factors("cosine")[4:] == pytest.approx(half_cosine)


def test_a_run_that_is_all_warm_up():
    assert schedule_factor("linear", 3, 5, 5) == 0.8
    assert schedule_factor("linear", 5, 5, 5) == 1.0


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match=r"schedule.*'linaer'.*constant, linear, cosine"):
        check_schedule("linaer")
