"""The RolloutLoader: which rows make an epoch, when they are written, and how a run goes on.

Frozen here: an epoch is a permutation of the set, or the next part of an endless row of them; a
chunk is written once, by the student of that moment, with noise of its own epoch, row and sample;
all counts are of the whole optimizer step; a state that is taken after any micro-batch resumes with
the remaining batches and re-uses the chunk that was written; two ranks see one rank's rows; every
rank gets the same number of batches; the mean length of rollouts is that of earlier rollout
batches, on any number of ranks and after a resume on another.
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace

import pytest
import torch

from okd_lightning.engines import Sampling
from okd_lightning.errors import ConfigError
from okd_lightning.records import SOURCES, Example, Response, Rollout, SampledCounts
from okd_lightning.rollouts import LoaderShape, RolloutLoader, RolloutPlan


def make_examples(num: int) -> list[Example]:
    """Row i has i % 4 + 1 prompt tokens and i % 3 + 1 response tokens."""
    return [
        Example(
            index=i,
            prompt_ids=(100 + i,) * (i % 4 + 1),
            prompt_mask=(False,) * (i % 4 + 1),
            response_ids=(200 + i,) * (i % 3 + 1),
            prompt="",
            response="",
        )
        for i in range(num)
    ]


class Scribe:
    """Writes what it was asked, when, and by whom, so that rows can be told apart."""

    def __init__(self) -> None:
        self.version = 0  # of the student's weights
        self.calls: list[tuple] = []

    def respond(self, request):
        prompts = request.prompts
        keys = [prompt.index for prompt in prompts], [prompt.sample for prompt in prompts]
        self.calls.append((request.generator, *map(tuple, keys)))
        noise = request.noise.uniform(*keys, 1)[:, 0].tolist()
        found = []
        for prompt, u in zip(prompts, noise, strict=True):
            row = (1000 + self.version, prompt.index, int(1e6 * u), prompt.sample)
            ids = row[: 3 + int(2 * u)]
            found.append(Response(ids, (-0.125,) * len(ids), "eos" if len(ids) < 4 else "length"))
        return Rollout(tuple(found))


class Ranks:
    """Collectives of ranks that run one after the other: counts are replayed from a first run."""

    def __init__(self, counts: list[torch.Tensor]) -> None:
        self._counts = iter(counts)

    def reduce_sum(self, counts):
        return next(self._counts)


def make_loader(shape: LoaderShape, plan=None, num=10, writer=None, **settings) -> RolloutLoader:
    return RolloutLoader(
        make_examples(num),
        plan or RolloutPlan(1.0),
        shape,
        writer or Scribe(),
        sampling=Sampling(),
        max_new_tokens=4,
        seed=3,
        **settings,
    )


def rows_of(batches) -> list[tuple]:
    """Every row that carries loss: index, source, ids, mask, sampler log-probs."""
    rows = []
    for batch in batches:
        for i, length in enumerate(batch.lengths.tolist()):
            if batch.mask[i].any():
                rows.append(
                    (
                        int(batch.index[i]),
                        SOURCES[int(batch.source[i])],
                        tuple(batch.input_ids[i, :length].tolist()),
                        tuple(batch.mask[i, :length].tolist()),
                        tuple(batch.sampler_logprobs[i, :length].tolist()),
                    )
                )
    return rows


def same_batch(a, b) -> bool:
    names = ("input_ids", "lengths", "mask", "source", "index", "sampler_logprobs")
    return (a.step_counts, a.sampled) == (b.step_counts, b.sampled) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in names
    )


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    loader = make_loader(LoaderShape(4, 10), RolloutPlan(0.0))
    epochs = [[row[0] for row in rows_of(loader)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    steps = [[frozenset(epoch[i : i + 4]) for i in (0, 4, 8)] for epoch in epochs]
    assert steps[0] != steps[1] != steps[2] != steps[0]


def test_given_rows_are_the_data_sets_own():
    loader = make_loader(LoaderShape(3, 10, 2), RolloutPlan(0.0))
    for index, source, ids, mask, logprobs in rows_of(loader):
        example = make_examples(10)[index]
        assert source == "dataset"
        assert ids == example.prompt_ids + example.response_ids
        assert mask == (False,) * len(example.prompt_ids) + (True,) * len(example.response_ids)
        assert set(logprobs) == {0.0}


def test_own_rows_are_what_the_student_wrote_with_its_logprobs():
    loader = make_loader(LoaderShape(3, 10, 2))
    rows = rows_of(loader)
    assert sorted(row[0] for row in rows) == list(range(10))
    for index, source, ids, mask, logprobs in rows:
        num_prompt = len(make_examples(10)[index].prompt_ids)
        assert source == "student"
        assert ids[num_prompt : num_prompt + 2] == (1000, index)
        num_written = len(ids) - num_prompt
        assert mask == (False,) * num_prompt + (True,) * num_written
        assert logprobs == (0.0,) * num_prompt + (-0.125,) * num_written


def test_the_next_epoch_is_written_with_new_noise():
    loader = make_loader(LoaderShape(4, 10))
    first, second = ({row[0]: row[2] for row in rows_of(loader)} for _ in range(2))
    assert sum(first[i] != second[i] for i in range(10)) > 5
    again = {row[0]: row[2] for row in rows_of(make_loader(LoaderShape(4, 10)))}
    assert again == first


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("num", [1, 5, 12, 13])
def test_lengths_counts_and_the_short_last_step(accumulate, num):
    shape = LoaderShape(4, num, accumulate)
    loader = make_loader(shape, RolloutPlan(0.0), num)
    batches = list(loader)
    assert len(batches) == len(loader) == shape.steps_per_epoch * accumulate
    assert shape.steps_per_epoch == -(-num // (4 * accumulate))
    for start in range(0, len(batches), accumulate):
        step = batches[start : start + accumulate]
        tokens = sum(int(batch.mask[:, 1:].sum()) for batch in step)
        assert all(batch.step_counts == (tokens, 0, 0) for batch in step)
        assert all(len(batch) <= 4 for batch in step)
    assert sorted(row[0] for row in rows_of(batches)) == list(range(num))


def test_prompts_per_epoch_walk_through_the_set():
    loader = make_loader(LoaderShape(2, 4), RolloutPlan(0.0))
    epochs = [[row[0] for row in rows_of(loader)] for _ in range(5)]
    assert [len(epoch) for epoch in epochs] == [4] * 5
    stream = [i for epoch in epochs for i in sorted(epoch)]
    assert Counter(stream) == Counter(list(range(10)) * 2)
    assert len(set(epochs[0]) | set(epochs[1])) == 8


def test_more_prompts_than_the_set_repeats_them_with_other_samples():
    writer = Scribe()
    loader = make_loader(LoaderShape(25, 25), writer=writer)
    rows = rows_of(loader)
    assert sorted(Counter(row[0] for row in rows).values()) == [2] * 5 + [3] * 5
    _, index, sample = writer.calls[0]
    assert len(set(zip(index, sample, strict=True))) == 25


def test_samples_per_prompt_stand_in_one_step_with_different_noise():
    writer = Scribe()
    loader = make_loader(LoaderShape(4, 9, 2, samples_per_prompt=4), writer=writer)
    assert len(loader) == 2 * 5
    batches = list(loader)
    for start in range(0, len(batches), 2):
        rows = rows_of(batches[start : start + 2])
        assert set(Counter(row[0] for row in rows).values()) == {4}
        assert len({row[2] for row in rows}) == len(rows)
    assert all(sorted(set(call[2])) == [0, 1, 2, 3] for call in writer.calls)


@pytest.mark.parametrize("per_rollout", [None, 4, 8, 100])
def test_a_chunk_is_written_once_by_the_student_of_that_moment(per_rollout):
    writer = Scribe()
    shape = LoaderShape(2, 10, 2, prompts_per_rollout=per_rollout)
    loader, versions = make_loader(shape, writer=writer), []
    for i, batch in enumerate(loader):
        versions += [row[2][len(make_examples(10)[row[0]].prompt_ids)] for row in rows_of([batch])]
        if i % 2 == 1:
            writer.version += 1  # an optimizer step
    per_chunk = per_rollout or 4
    assert len(writer.calls) == -(-10 // per_chunk)
    assert [len(call[1]) for call in writer.calls] == [
        min(per_chunk, 10 - start) for start in range(0, 10, per_chunk)
    ]
    assert versions == [1000 + i // per_chunk * (per_chunk // 4) for i in range(10)]


def test_who_writes_is_the_plans_to_say():
    writer = Scribe()
    loader = make_loader(LoaderShape(2, 10), RolloutPlan(0.5, "teacher"), writer=writer)
    plan, steps = loader.plan, [batch for _ in range(3) for batch in loader]
    expected = [plan.assign(3, step, 1)[0] for step in range(15)]
    assert [{row[1] for row in rows_of([batch])} for batch in steps] == [{s} for s in expected]
    assert [call[0] for call in writer.calls] == expected
    assert len(set(expected)) == 2


def test_mixed_steps_count_each_source_on_its_own():
    writer = Scribe()
    loader = make_loader(LoaderShape(4, 8, 2), RolloutPlan(0.5, "teacher", True), writer=writer)
    batches = list(loader)
    rows = rows_of(batches)
    counted = Counter(row[1] for row in rows)
    assert counted == {"student": 4, "teacher": 4}
    tokens = [sum(sum(row[3]) for row in rows if row[1] == source) for source in SOURCES]
    assert all(batch.step_counts == tuple(tokens) for batch in batches)
    assert {call[0] for call in writer.calls} == {"student", "teacher"}
    written = sum(batch.metrics.get("rollout/tokens", 0) for batch in batches)
    assert written == tokens[1] + tokens[2]


def test_the_making_of_a_chunk_is_reported_once():
    loader = make_loader(LoaderShape(2, 8, 2, prompts_per_rollout=8))
    batches = list(loader)
    reported = [batch.metrics for batch in batches]
    assert [bool(metrics) for metrics in reported] == [True, False, False, False]
    rows = rows_of(batches)
    num_tokens = sum(sum(row[3]) for row in rows)
    assert reported[0]["rollout/tokens"] == num_tokens
    assert reported[0]["rollout/mean_length"] == num_tokens / 8
    assert reported[0]["rollout/eos_share"] == sum(sum(row[3]) < 4 for row in rows) / 8


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
    with pytest.raises(ConfigError, match=r"--data.global_batch_size 4"):
        make_loader(LoaderShape(3, 10)).load_state_dict(loader.state_dict())
    make_loader(LoaderShape(4, 10)).load_state_dict(loader.state_dict())


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
    """Two ranks stop within the third rollout batch, one goes on."""
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
