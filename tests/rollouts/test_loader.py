"""RolloutLoader: the rows of an epoch, and the time of their generation.

Frozen here: an epoch is a permutation of the set, or the next part of an endless row of them; a
rollout batch is generated once, by the student of that moment, with noise of its own epoch, row and
sample; all counts are of the whole optimizer step. (Resume and ranks: test_loader_resume.py.)
"""

from __future__ import annotations

from collections import Counter

import pytest
from loader_runs import Scribe, make_examples, make_loader, rows_of

from okd_lightning.records import SOURCES
from okd_lightning.rollouts import LoaderShape, RolloutPlan


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


def test_the_next_epoch_is_generated_with_new_noise():
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
def test_a_rollout_batch_is_generated_once_by_the_student_of_that_moment(per_rollout):
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


def test_the_plan_decides_the_generator():
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


def test_generation_of_a_rollout_batch_is_reported_once():
    loader = make_loader(LoaderShape(2, 8, 2, prompts_per_rollout=8))
    batches = list(loader)
    reported = [batch.metrics for batch in batches]
    assert [bool(metrics) for metrics in reported] == [True, False, False, False]
    rows = rows_of(batches)
    num_tokens = sum(sum(row[3]) for row in rows)
    assert reported[0]["rollout/tokens"] == num_tokens
    assert reported[0]["rollout/mean_length"] == num_tokens / 8
    assert reported[0]["rollout/eos_share"] == sum(sum(row[3]) < 4 for row in rows) / 8
