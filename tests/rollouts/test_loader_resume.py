"""RolloutLoader: resume, and the division among ranks.

Frozen here: a state that is taken after any micro-batch resumes with the remaining batches and
reuses the generated rollout batch; two ranks together have one rank's rows; every rank gets the
same number of batches; the mean length of rollouts is that of earlier rollout batches, on any
number of ranks and after a resume on another.
"""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from loader_runs import Ranks, Scribe, make_loader, rows_of, same_batch

from okd_lightning.errors import ConfigError
from okd_lightning.records import SampledCounts
from okd_lightning.rollouts import LoaderShape, RolloutLoader, RolloutPlan

SHAPES = {
    "plain": (LoaderShape(2, 10), RolloutPlan(1.0)),
    "accumulated": (LoaderShape(2, 10, 2), RolloutPlan(1.0)),
    "chunks": (LoaderShape(2, 10, 2, prompts_per_rollout=8), RolloutPlan(0.5)),
    "one chunk, all authors": (
        LoaderShape(1, 9, 3, prompts_per_rollout=9),
        RolloutPlan(0.4, "teacher", True),
    ),
    "samples": (
        LoaderShape(2, 7, 3, prompts_per_rollout=6, samples_per_prompt=2),
        RolloutPlan(1.0),
    ),
    "stream": (LoaderShape(2, 4, 2), RolloutPlan(0.5)),
}


def saved(loader: RolloutLoader) -> dict:
    """The state after a trip to disk, as Lightning loads it."""
    buffer = io.BytesIO()
    torch.save(loader.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", SHAPES)
def test_resuming_after_any_micro_batch(name):
    shape, plan = SHAPES[name]

    def run(loader, writer, num):
        """``num`` batches over epochs, with the weights changing after every optimizer step."""
        found = []
        while len(found) < num:
            for batch in loader:
                found.append(batch)
                if len(found) == num:
                    break
                if loader.state_dict()["delivered"] % shape.accumulate_grad_batches == 0:
                    writer.version += 1
        return found

    length = len(make_loader(shape, plan))
    num = 2 * length + 1
    writer = Scribe()
    truth = run(make_loader(shape, plan, writer=writer), writer, num)
    calls = writer.calls
    for at in range(1, num):
        writer = Scribe()
        loader = make_loader(shape, plan, writer=writer)
        run(loader, writer, at)
        state = saved(loader)
        resumed_writer = Scribe()
        resumed_writer.version = writer.version + (at % shape.accumulate_grad_batches == 0)
        resumed = make_loader(shape, plan, writer=resumed_writer)
        resumed.load_state_dict(state)
        rest = run(resumed, resumed_writer, num - at)
        assert all(same_batch(a, b) for a, b in zip(rest, truth[at:], strict=True)), at
        assert writer.calls + resumed_writer.calls == calls, at


def test_a_state_does_not_change_with_its_loader():
    loader = make_loader(LoaderShape(2, 10))
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    before = repr(state)
    list(iterator)
    assert repr(state) == before


def test_another_number_of_rows_a_step_is_refused():
    loader = make_loader(LoaderShape(2, 10, 2))
    next(iter(loader))
    advice = {
        LoaderShape(3, 10): "size 4 --data.batch_size 1 --trainer.accumulate_grad_batches 4",
        LoaderShape(4, 10, 2): "size 4 --data.batch_size 4 --trainer.accumulate_grad_batches 1",
        LoaderShape(4, 10, 1, 2): "size 4 --data.batch_size 2 --trainer.accumulate_grad_batches 1",
        LoaderShape(4, 10, 1, 3): "a number of ranks that divides 4",
    }
    for shape, words in advice.items():
        with pytest.raises(ConfigError, match=words):
            make_loader(shape).load_state_dict(loader.state_dict())
    for batch_size, accumulation in ((1, 4), (4, 1)):
        loader_of = make_loader(LoaderShape(batch_size, 10, accumulation))
        loader_of.load_state_dict(loader.state_dict())


def two_ranks(shape: LoaderShape, plan: RolloutPlan, num: int) -> list[list]:
    """Both ranks' batches, run after each other twice: the first time to learn the counts."""
    counts: list[list[torch.Tensor]] = [[], []]
    for rank in range(2):
        of_rank = replace(shape, world_size=2, rank=rank)

        def keep(found, seen=counts[rank]):
            seen.append(found)
            return found

        list(make_loader(of_rank, plan, num, reduce_sum=keep))
    total = [a + b for a, b in zip(*counts, strict=True)]
    return [
        list(
            make_loader(
                replace(shape, world_size=2, rank=rank),
                plan,
                num,
                reduce_sum=Ranks(total).reduce_sum,
            )
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize("num", [1, 5, 8, 10])
@pytest.mark.parametrize(
    "plan", [RolloutPlan(0.0), RolloutPlan(1.0), RolloutPlan(0.5, "dataset", True)], ids=str
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_see_one_ranks_rows(num, plan, accumulate):
    ranks = two_ranks(LoaderShape(2, num, accumulate), plan, num)
    alone = list(make_loader(LoaderShape(4, num, accumulate), plan, num))
    assert len(ranks[0]) == len(ranks[1]) == len(alone)
    for start in range(0, len(alone), accumulate):
        window = slice(start, start + accumulate)
        together = rows_of(ranks[0][window]) + rows_of(ranks[1][window])
        assert sorted(together) == sorted(rows_of(alone[window]))
        seen = ranks[0][window] + ranks[1][window] + alone[window]
        stamps = {(b.step_counts, b.sampled) for b in seen}
        assert len(stamps) == 1
        for batch in ranks[0][window] + ranks[1][window]:
            assert len(batch) <= 2


def folded(history: list[tuple[int, int]]) -> float:
    """The mean over (tokens, rollouts) of earlier batches: each lets older ones count less."""
    tokens = rollouts = 0.0
    for own_tokens, own_rollouts in history:
        kept = 256 / (256 + own_rollouts)
        tokens, rollouts = kept * tokens + own_tokens, kept * rollouts + own_rollouts
    return tokens / rollouts


@pytest.mark.parametrize("per_rollout", [4, 8])
@pytest.mark.parametrize("plan", [RolloutPlan(1.0), RolloutPlan(0.5, "dataset", True)], ids=str)
def test_the_mean_length_is_that_of_earlier_rollout_batches(plan, per_rollout):
    loader = make_loader(LoaderShape(4, 12, prompts_per_rollout=per_rollout), plan, 12)
    history: list[tuple[int, int]] = []
    for _ in range(3):
        epoch = list(loader)
        for start in range(0, len(epoch), per_rollout // 4):
            chunk = epoch[start : start + per_rollout // 4]
            rollouts = [int((batch.source == 1).sum()) for batch in chunk]
            own = sum(batch.step_counts[1] for batch in chunk), sum(rollouts)
            mean = folded(history or [own])  # the first one has no other
            for batch, number in zip(chunk, rollouts, strict=True):
                assert batch.sampled == SampledCounts(number, mean, 4)
            history.append(own)
    assert len({folded(history[:n]) for n in range(1, len(history))}) > 1


def test_a_resume_on_another_number_of_ranks_keeps_the_mean_length():
    """Two ranks stop within the third rollout batch, and one rank resumes."""
    alone = make_loader(LoaderShape(4, 16, prompts_per_rollout=8), num=16)
    expected = [batch.sampled for _ in range(2) for batch in alone]
    shape = LoaderShape(2, 16, prompts_per_rollout=8, world_size=2)
    states, counts = [], []
    for rank in range(2):
        seen: list[torch.Tensor] = []
        counts.append(seen)
        own = replace(shape, rank=rank)

        def keep(found, seen=seen):
            seen.append(found)
            return found

        list(make_loader(own, num=16, reduce_sum=keep))
    total = [a + b for a, b in zip(*counts, strict=True)]
    for rank in range(2):
        own = replace(shape, rank=rank)
        loader = make_loader(own, num=16, reduce_sum=Ranks(total).reduce_sum)
        batches = iter(loader)
        found = [next(batches).sampled for _ in range(3)]
        assert found == expected[:3]
        states.append(saved(loader))
    state = states[0] | {n: states[0][n] + states[1][n] for n in ("written", "credits")}
    resumed = make_loader(LoaderShape(4, 16, prompts_per_rollout=8), num=16)
    resumed.load_state_dict(state)
    assert [batch.sampled for _ in range(2) for batch in resumed] == expected[3:]


def test_samples_of_one_prompt_do_not_overload_a_rank():
    ranks = two_ranks(LoaderShape(2, 6, 1, 2, samples_per_prompt=4), RolloutPlan(1.0), 6)
    assert sum(len(rows_of(rank)) for rank in ranks) == 24
    assert max(len(batch) for rank in ranks for batch in rank) <= 2


def test_shapes_that_cannot_be_cut():
    with pytest.raises(ConfigError, match="samples_per_prompt 3"):
        LoaderShape(4, 10, samples_per_prompt=3)
    with pytest.raises(ConfigError, match="prompts_per_rollout 6"):
        LoaderShape(4, 10, prompts_per_rollout=6)
