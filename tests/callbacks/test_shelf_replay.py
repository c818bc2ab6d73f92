"""DistiLLM's share and its replay.

Frozen here: the share rises by the validation loss alone, and what it was at a step stays; a step
that replays trains on the last responses to its prompts and generates none for them; a resumed run
is the uninterrupted one, bit for bit, with the kept responses.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import shelf
import tiny
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks import LastCheckpoint
from okd_lightning.engines import NoiseStream, Sampling, hashed_uniform
from okd_lightning.errors import ConfigError
from okd_lightning.records import PromptBatch, Request, Response, Rollout
from okd_lightning.rollouts import KeptResponses

STUDENT = 1
VAL = tiny.make_rows(4, seed=1)


def validated(method, losses, every=10) -> None:
    """Pass validation losses to the method as the Trainer does, every so many steps."""
    for number, loss in enumerate(losses, 1):
        trainer = SimpleNamespace(
            sanity_checking=False,
            state=SimpleNamespace(fn="fit"),
            callback_metrics={"val/cross_entropy": torch.tensor(loss)},
            global_step=number * every,
        )
        method.on_validation_end(trainer, None)


def test_the_share_rises_when_the_validation_loss_does():
    method = shelf.method("distillm.DistiLLM", rise=0.3)
    validated(method, [2.0, 1.5, 2.05, 2.2, 2.2, 2.35, 9.0, 20.0, 40.0])
    shares = [method.share_at(step) for step in (0, 39, 40, 59, 60, 69, 70, 80, 90, 1000)]
    assert shares == pytest.approx([0, 0, 0.3, 0.3, 0.6, 0.6, 0.9, 1, 1, 1])
    other = shelf.method("distillm.DistiLLM", rise=0.3)
    other.load_state_dict(method.state_dict())
    assert [other.share_at(step) for step in (39, 60, 1000)] == pytest.approx([0, 0.6, 1])


class Pretended(Callback):
    """Callback that makes validation losses rise, so that the share rises too."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/cross_entropy", float(trainer.global_step))


class Writing(Callback):
    """Engine that counts the prompts of its requests for training."""

    def __init__(self) -> None:
        self.prompts = {}

    def on_fit_start(self, trainer, pl_module):
        respond = pl_module.respond

        def counted(request):
            if trainer.training:
                self.prompts.setdefault(trainer.global_step, []).append(
                    tuple(prompt.index for prompt in request.prompts)
                )
            return respond(request)

        pl_module.respond = counted


def test_replayed_steps(tmp_path, make_module):
    method, writing = shelf.method("distillm.DistiLLM", share=1.0), Writing()
    settings = {"val": VAL, "callbacks": [writing], "max_epochs": 6}
    recorder = tiny.fit(tmp_path, make_module(), [method], tiny.make_rows(8), **settings)
    last, replayed = {}, []
    for step in range(12):
        rows = {
            int(batch.index[i]): batch.input_ids[i, : int(batch.lengths[i])].tolist()
            for batch in recorder.steps[step]
            for i in range(len(batch))
        }
        assert recorder.sources()[step] == {STUDENT}
        if step >= 2 and hashed_uniform(0x5245504C, 7, step) < step / 12:
            replayed.append(step)
            assert rows == {index: last[index] for index in rows}
            assert step not in writing.prompts
        else:
            (asked,) = writing.prompts[step]
            assert sorted(asked) == sorted(rows)
        last.update(rows)
    assert 2 < len(replayed) < 10
    assert len(method.kept) == 8


class Killed(Exception):
    pass


class Killer(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("step", [3, 6, 9])
def test_a_resumed_run_is_the_uninterrupted_one(step, tmp_path, make_module):
    def run(root, killer=None, **settings):
        module, method = make_module(), shelf.method("distillm.DistiLLM", share=0.4, rise=0.2)
        callbacks = [Pretended(), LastCheckpoint(every_n_steps=1), *([killer] if killer else [])]
        settings = {"val": VAL, "callbacks": callbacks, "max_epochs": 6, **settings}
        recorder = tiny.fit(root, module, [method], tiny.make_rows(8), **settings)
        return module, method, recorder

    whole, method, recorder = run(tmp_path / "whole")
    assert {source for found in recorder.sources() for source in found} == {0, STUDENT}
    with pytest.raises(Killed):
        run(tmp_path / "killed", Killer(step))
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    resumed, again, seen = run(tmp_path / "killed", ckpt_path=str(last))
    assert len(seen.losses) == 12 - step
    assert again.rises == method.rises != []
    assert tiny.distance(tiny.weights(resumed), tiny.weights(whole)) == 0
    assert str(again.kept.state_dict()) == str(method.kept.state_dict())


def test_a_prompt_that_stands_twice_has_two_responses():
    def generate(request: Request) -> Rollout:
        asked.append(tuple(prompt.index for prompt in request.prompts))
        ids = [(index, len(asked), i) for i, index in enumerate(asked[-1])]
        return Rollout(tuple(Response(row, (0.0,) * 3, "eos") for row in ids))

    def request(*columns) -> Request:
        return Request(PromptBatch(*columns), Sampling(), NoiseStream(0, 0), 3)

    asked, kept = [], KeptResponses()
    prompts = request(((1,), (2,), (1,)), (5, 6, 5), (0, 0, 1))
    first = kept.respond(prompts, generate, replays=True)
    assert first.response_ids == ((5, 1, 0), (6, 1, 1), (5, 1, 2))
    more = request(((1,), (3,), (1,)), (5, 7, 5), (2, 0, 3))
    second = kept.respond(more, generate, replays=True)
    assert second.response_ids == ((5, 1, 0), (7, 2, 0), (5, 1, 2))
    assert asked == [(5, 6, 5), (7,)]
    other = KeptResponses()
    other.load_state_dict(kept.state_dict())
    assert other.respond(more, generate, replays=True) == second
    assert kept.respond(prompts, generate, replays=False).response_ids[2] == (5, 3, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "follows the validation loss; give --data.val"),
        ({"val": VAL, "data": {"prompts_per_rollout": 8}}, "leave data.prompts_per_rollout 8 out"),
        ({"val": VAL, "max_epochs": -1, "max_steps": -1}, "set max_steps or max_epochs"),
    ],
)
def test_runs_that_are_refused(settings, message, tmp_path, make_module):
    method = shelf.method("distillm.DistiLLM")
    with pytest.raises(ConfigError, match=message):
        tiny.fit(tmp_path, make_module(), [method], tiny.make_rows(8), **settings)
