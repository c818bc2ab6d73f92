"""Rewards with micro-batches without responses, and baselines that need several samples.

Frozen here: a reward together with a method on dataset responses does not depend on how a step's
rows are cut into micro-batches, also where one of them holds no response of the student's; a batch
without scores is refused by name; a baseline over samples is refused where there is one of each;
what fails on one rank stops all of them.
"""

from functools import partial

import pytest
import tiny

from okd_lightning.callbacks import KD, Reward
from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.records import Response
from okd_lightning.records.batches import Example
from okd_lightning.rollouts.scoring import SampledResponse, TermScorer


@pytest.fixture
def make_module(make_module):
    """Return a module in float64: runs agree to 1e-9 on every processor."""
    return partial(make_module, dtype="float64")


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


def test_a_micro_batch_without_a_response_of_the_student(tmp_path, make_module):
    runs = [
        tiny.fit(
            tmp_path / str(size),
            make_module(learning_rate=0.0),
            [KD(), Reward(length_of)],
            tiny.make_rows(8),
            data={"batch_size": size},
            accumulate_grad_batches=8 // size,
        )
        for size in (8, 1)
    ]
    whole, cut = (run.gradients[0] for run in runs)
    assert any(set(batch.source.tolist()) == {0} for batch in runs[1].steps[0])
    assert tiny.distance(cut, whole) < 1e-5
    assert runs[1].losses[0]["train/reward"] == pytest.approx(
        runs[0].losses[0]["train/reward"], rel=1e-4
    )


def test_batches_that_nobody_scored_are_refused(tmp_path, make_module):
    module, reward = make_module(), Reward(length_of)
    reward.scorer = None
    with pytest.raises(ConfigError, match=r"reward: the batch holds no advantages.*DistillBatch"):
        tiny.fit(tmp_path, module, [reward], tiny.make_rows(4))


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_a_baseline_over_one_sample_is_refused(baseline, tmp_path, make_module):
    with pytest.raises(ConfigError, match=rf"reward: baseline {baseline}.*samples_per_prompt 2"):
        tiny.fit(tmp_path, make_module(), [Reward(length_of, baseline)], tiny.make_rows(4))


@pytest.mark.parametrize("broken", [0, 1])
def test_what_fails_on_one_rank_stops_both(broken):
    """Each rank sends its part before it raises, so that no rank waits for the other."""
    handed: list = []

    def gather(part):
        handed.append(part)
        other = ([], [], None) if broken == 0 else ([], [], "reward Own raised KeyError: on rank 1")
        return [part, other]

    def function(prompt, response, reference):
        return {}["here"] if broken == 0 else 1.0

    scorer = TermScorer([Reward(function).term], str, 1, gather, rank=0)
    example = Example(0, (3,), (False,), (), "a", "")
    response = Response((4, 1), (-1.0, -1.0), "eos")
    with pytest.raises(RewardError, match="raised KeyError"):
        scorer([SampledResponse(example, 0, response, 0)])
    assert len(handed) == 1
