"""Rollout batches ahead of training: the weights that generate each row, with fake models.

Frozen here: rollout batch n is generated with the weights at the start of batch n - lag, the first
ones by the initial weights, also over epochs and with several optimizer steps per rollout batch; a
state that is taken after any micro-batch holds what is in flight, and resumes with the same rows;
one that is taken after the deadline of a stop discards it, with a warning, and the rows are
generated again with the present weights; another lag at a resume is applied; rows are redistributed
to another number of ranks; the sources of a batch are chosen at its request; an engine with one set
of weights is given new ones only when nothing is in flight; a generation that fails raises where it
is due.
"""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace

import pytest
from loader_runs import Scribe, make_loader, rows_of, same_batch
from test_loader_resume import saved

from okd_lightning.engines.ahead import AheadEngine, Answer, Generated, ThreadEngine
from okd_lightning.errors import PreemptedError, WorkerError
from okd_lightning.rollouts import LoaderShape, RolloutLoader, RolloutPlan
from okd_lightning.rollouts.ahead import RolloutsAhead
from okd_lightning.rollouts.generation import StopRequest

SHAPES = {
    "one step per batch": (LoaderShape(2, 10), RolloutPlan(1.0)),
    "two steps per batch": (LoaderShape(2, 10, 2, prompts_per_rollout=8), RolloutPlan(1.0)),
    "half of the steps": (LoaderShape(2, 9, 2), RolloutPlan(0.5)),
    "half of the rows": (LoaderShape(2, 9, 2), RolloutPlan(0.5, "dataset", True)),
    "two samples": (
        LoaderShape(2, 7, 3, prompts_per_rollout=6, samples_per_prompt=2),
        RolloutPlan(1.0),
    ),
}


class Ahead(AheadEngine):
    """Fake engine that answers at once with the present version; or never, or with an error."""

    def __init__(self, scribe: Scribe, *, is_slow: bool = False) -> None:
        self.scribe, self.is_slow = scribe, is_slow
        self.error: WorkerError | None = None
        self.is_closed = False

    def begin(self, request):
        answer = Answer()
        if self.error is not None:
            answer.fail(self.error)
        elif not self.is_slow:
            answer.finish(Generated(self.scribe.respond(request), 1.0))
        return answer

    def close(self):
        self.is_closed = True


def lagged(shape, plan, writer: Scribe, lag: int, **settings) -> RolloutLoader:
    engine = settings.pop("engine", None) or Ahead(writer)
    ahead = RolloutsAhead(lag, lambda: engine) if lag else None
    return make_loader(shape, plan, writer=writer, ahead=ahead, **settings)


def run(loader: RolloutLoader, writer: Scribe, num: int) -> list:
    """``num`` batches over epochs; the weights change after every optimizer step."""
    found = []
    while len(found) < num:
        for batch in loader:
            found.append(batch)
            if len(found) % loader.shape.accumulate_grad_batches == 0:
                writer.version += 1
            if len(found) == num:
                break
    return found


def versions(batches) -> set[int]:
    """Return the weights' versions of the student's rows, with which each response begins."""
    rows = [row for row in rows_of(batches) if row[1] == "student"]
    return {ids[mask.index(True)] - 1000 for _, _, ids, mask, _ in rows}


@pytest.mark.parametrize("lag", [0, 1, 2, 5])
@pytest.mark.parametrize("name", ["one step per batch", "two steps per batch"])
def test_weights_are_those_of_lag_rollout_batches_before(name, lag):
    shape, plan = SHAPES[name]
    writer = Scribe()
    accumulate, size = shape.accumulate_grad_batches, shape.steps_per_rollout
    batches = run(lagged(shape, plan, writer, lag), writer, 3 * shape.steps_per_epoch * accumulate)
    starts = []  # the version at the start of each rollout batch
    for epoch in range(3):
        for first in range(0, shape.steps_per_epoch, size):
            starts.append(epoch * shape.steps_per_epoch + first)
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else 3 * shape.steps_per_epoch
        own = batches[start * accumulate : end * accumulate]
        assert versions(own) == {starts[max(0, number - lag)]}, number
        lags = [b.metrics["rollout/lag"] for b in own if "rollout/lag" in b.metrics]
        assert lags == ([float(min(number, lag))] if lag else [])


@pytest.mark.parametrize("lag", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_resuming_after_any_micro_batch(name, lag):
    shape, plan = SHAPES[name]
    num = 2 * len(make_loader(shape, plan)) + 1
    writer = Scribe()
    truth = run(lagged(shape, plan, writer, lag), writer, num)
    for at in range(1, num):
        writer = Scribe()
        loader = lagged(shape, plan, writer, lag)
        first = run(loader, writer, at)
        assert all(same_batch(a, b) for a, b in zip(first, truth, strict=False))
        resumed_writer = Scribe()
        resumed_writer.version = writer.version
        resumed = lagged(shape, plan, resumed_writer, lag)
        resumed.load_state_dict(saved(loader))
        offset = at % shape.accumulate_grad_batches
        rest = []
        for batch in continued(resumed, num - at):
            rest.append(batch)
            if (offset + len(rest)) % shape.accumulate_grad_batches == 0:
                resumed_writer.version += 1
        assert all(same_batch(a, b) for a, b in zip(rest, truth[at:], strict=True)), at


def continued(loader: RolloutLoader, num: int):
    while num:
        for batch in loader:
            num -= 1
            yield batch
            if not num:
                return


def test_without_a_lag_the_state_is_as_before():
    shape, plan = SHAPES["one step per batch"]
    writer = Scribe()
    loader = lagged(shape, plan, writer, 0)
    run(loader, writer, 2)
    assert not {"ahead", "planned"} & loader.state_dict().keys()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(2, 0, [2, 3, 6, 7]), (2, 1, [2, 3, 5, 6]), (0, 2, [4, 4, 4, 5])],
)
def test_another_lag_at_a_resume_acts(old, new, expected):
    shape, plan = SHAPES["one step per batch"]
    writer = Scribe()
    loader = lagged(shape, plan, writer, old)
    run(loader, writer, 4)  # batch 4 comes; with lag 2, it and batch 5 are in flight
    resumed = lagged(shape, plan, writer, new)
    resumed.load_state_dict(saved(loader))
    assert [versions([batch]) for batch in run(resumed, writer, 4)] == [{v} for v in expected]


def test_an_abandoned_wait_keeps_the_batch_that_was_due():
    shape, plan = SHAPES["one step per batch"]
    writer, stop = Scribe(), StopRequest()
    engine = Ahead(writer, is_slow=True)
    loader = lagged(shape, plan, writer, 1, engine=engine, stop=stop)
    batches = iter(loader)
    next(batches)
    writer.version = 1
    threading.Timer(0.2, lambda: setattr(stop, "is_made", True)).start()
    with pytest.raises(PreemptedError):
        next(batches)
    begun = loader.ahead.get(1)
    begun.answer.finish(Generated(replace_version(writer, 0).respond(begun.request), 1.0))
    resumed = lagged(shape, plan, writer, 1)
    resumed.load_state_dict(saved(loader))
    assert [versions([b]) for b in run(resumed, writer, 2)] == [{0}, {1}]


def replace_version(writer: Scribe, version: int) -> Scribe:
    other = Scribe()
    other.version = version
    return other


def test_what_is_late_at_a_stop_is_discarded_and_generated_again():
    shape, plan = SHAPES["one step per batch"]
    writer, stop = Scribe(), StopRequest()
    loader = lagged(shape, plan, writer, 2, engine=Ahead(writer, is_slow=True), stop=stop)
    next(iter(loader))
    # the signal comes during the wait
    threading.Timer(0.1, lambda: setattr(stop, "deadline", time.monotonic() + 0.1)).start()
    with pytest.warns(UserWarning, match="2 rollout batches in flight .*grace_seconds"):
        state = loader.state_dict()
    assert not state["ahead"]
    writer.version = 1
    resumed = lagged(shape, plan, writer, 2)
    resumed.load_state_dict(state)
    assert [versions([b]) for b in run(resumed, writer, 4)] == [{1}, {1}, {1}, {2}]


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1)])
def test_rows_in_flight_go_to_another_number_of_ranks(old, new):
    shape, plan = LoaderShape(4, 24, 1), RolloutPlan(0.5, "dataset", True)

    def ranks(number: int, num_ranks: int, writer: Scribe) -> list[RolloutLoader]:
        own = replace(shape, batch_size=4 // num_ranks, world_size=num_ranks)
        return [
            lagged(
                replace(own, rank=rank), plan, writer, 2, reduce_sum=lambda counts: counts * 0 + 1
            )
            for rank in range(num_ranks)
        ]

    writer = Scribe()
    loaders = ranks(0, old, writer)
    for loader in loaders:
        next(iter(loader))
    states = [loader.state_dict() for loader in loaders]
    state = states[0]
    state["written"] = [part for own in states for part in own["written"]]
    state["credits"] = [part for own in states for part in own["credits"]]
    for i, entry in enumerate(state["ahead"]):
        entry["written"] = [own["ahead"][i]["written"][0] for own in states]
    writer.version = 1
    resumed = ranks(0, new, writer)
    found: list[list] = [[], [], []]
    for loader in resumed:
        loader.load_state_dict(state)
        for step, batch in zip(range(3), loader, strict=False):
            found[step] += rows_of([batch])
    single = Scribe()
    truth = lagged(shape, plan, single, 2, reduce_sum=lambda counts: counts * 0 + 1)
    expected = [rows_of([batch]) for _, batch in zip(range(4), truth, strict=False)][1:3]
    assert [sorted(rows) for rows in found[:2]] == [sorted(rows) for rows in expected]


def test_sources_are_chosen_at_the_request():
    shares = {"now": 0.0}
    plan = RolloutPlan(0.5, share_at=lambda step: shares["now"])
    writer = Scribe()
    loader = lagged(LoaderShape(2, 10), plan, writer, 1)
    batches = iter(loader)
    kinds = []
    for step in range(4):
        kinds.append({source for _, source, *_ in rows_of([next(batches)])})
        if step == 0:
            shares["now"] = 1.0
            state = saved(loader)
    assert kinds == [{"dataset"}, {"dataset"}, {"student"}, {"student"}]
    resumed = lagged(LoaderShape(2, 10), plan, writer, 1)
    resumed.load_state_dict(state)
    again = [{source for _, source, *_ in rows_of([b])} for b in run(resumed, writer, 3)]
    assert again == kinds[1:]


def test_another_constant_share_at_a_resume_discards_what_it_was_not_planned_for():
    writer = Scribe()
    loader = lagged(LoaderShape(2, 10), RolloutPlan(1.0), writer, 1)
    run(loader, writer, 1)
    resumed = lagged(LoaderShape(2, 10), RolloutPlan(0.0), writer, 1)
    resumed.load_state_dict(saved(loader))
    assert {source for _, source, *_ in rows_of(run(resumed, writer, 2))} == {"dataset"}


def test_an_engine_with_one_set_of_weights_is_given_new_ones_when_nothing_is_in_flight():
    writer, log = Scribe(), []

    def prepare(request):
        log.append(("weights", writer.version))
        version = writer.version

        def generate():
            time.sleep(0.02)
            log.append(("answered", version))
            return replace_version(writer, version).respond(request)

        return generate

    loader = lagged(LoaderShape(2, 10), RolloutPlan(1.0), writer, 1, engine=ThreadEngine(prepare))
    found = run(loader, writer, 4)
    assert [versions([b]) for b in found] == [{0}, {0}, {1}, {2}]
    loader.ahead.settle()
    assert log == [(what, v) for v in (0, 1, 2, 3) for what in ("weights", "answered")]


def test_a_failed_generation_is_raised_where_it_is_due():
    writer = Scribe()
    engine = Ahead(writer)
    engine.error = WorkerError("the process has ended")
    batches = iter(lagged(LoaderShape(2, 10), RolloutPlan(1.0), writer, 1, engine=engine))
    next(batches)
    with pytest.raises(WorkerError, match="the process has ended"):
        next(batches)


def test_the_engine_ends_with_the_rollouts():
    writer = Scribe()
    engine = Ahead(writer)
    loader = lagged(LoaderShape(2, 10), RolloutPlan(1.0), writer, 1, engine=engine)
    next(iter(loader))
    loader.ahead.close()
    assert engine.is_closed


class Late(Ahead):
    """Fake engine that answers after 0.3 seconds, and reports one second for each generation."""

    def begin(self, request):
        answer, generated = Answer(), Generated(self.scribe.respond(request), 1.0)
        threading.Timer(0.3, answer.finish, [generated]).start()
        return answer


def test_the_sums_count_each_generation_once_and_the_waits_of_checkpoints(caplog):
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    writer = Scribe()
    engine = Late(writer)
    loader = lagged(LoaderShape(2, 10), RolloutPlan(1.0), writer, 1, engine=engine)
    batches = iter(loader)
    next(batches)
    loader.state_dict()  # waits for the second batch
    next(batches)
    loader.ahead.close()
    generated, waited = re.search(r"lag 1\): (\S+) seconds .* for (\S+)", caplog.text).groups()
    assert generated == "1.0"
    assert float(waited) >= 0.2
