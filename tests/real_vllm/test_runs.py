"""Training with a student and a teacher on real vLLM servers.

Frozen here: GKD, OPD and OPD+ train on what the server generates; every rollout has the log-probs
of the student as it was then, to float32's rounding; a served teacher gives the losses and weights
of a loaded one; a run that was cut resumes to the same weights, bit for bit; a server that crashes
between two steps and comes back changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import served_models
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from served_models import STUDENT, TEACHER

from okd_lightning.callbacks import GKD, OPD, LastCheckpoint, OPDPlus
from okd_lightning.divergences import JensenShannon, TopK
from okd_lightning.engines import VLLMServer
from okd_lightning.teachers import ServedTeacher
from okd_lightning.training.module import DistillationModule

pytestmark = pytest.mark.real_vllm

K, STEPS = 6, 4
LAST = Path("checkpoints/last.ckpt")


class Watched(DistillationModule):
    """Callback that records each rollout's largest distance from the student's log-probs."""

    def respond(self, request):
        rollout = super().respond(request)
        found = self.__dict__.setdefault("gaps", [])
        rows = ((p.ids, r.ids, r.logprobs) for p, r in zip(request.prompts, rollout, strict=True))
        for prompt, ids, logprobs in rows if request.generator == "student" else ():
            with torch.no_grad():
                logits = self.student(torch.tensor([[*prompt, *ids]])).logits[0]
            known = self.vocabulary.cut(logits[len(prompt) - 1 : -1]).log_softmax(-1)
            own = known.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            found.append(float((own - torch.tensor(logprobs)).abs().max()))
        return rollout


@pytest.fixture
def train(vllm_servers, tmp_path):
    """Train in a folder of ``tmp_path``; returns the recorder and the module."""

    def run(method, folder="run", *, served=True, callbacks=(), ckpt_path=None, steps=STEPS):
        teacher = ServedTeacher(vllm_servers.url(TEACHER), k=K) if served else None
        root = tmp_path / folder
        engine = VLLMServer(
            vllm_servers.url(STUDENT),
            str(root / "weights"),
            timeout_seconds=60.0,
            num_retries=30,  # four minutes: a start takes half of one where nothing else runs
        )
        module = Watched(
            served_models.make_student(),
            teacher or served_models.make_teacher(),
            tokenizer=tiny.make_tokenizer(),
            engine=engine,
            learning_rate=3e-2,
        )
        recorder = tiny.fit(
            root,
            module,
            [method],
            tiny.make_rows(16),
            callbacks=[LastCheckpoint(every_n_steps=1), *callbacks],
            ckpt_path=ckpt_path,
            max_steps=steps,
            accumulate_grad_batches=2,
            data={"batch_size": 2},
        )
        return recorder, module

    return run


METHODS = {
    "GKD": lambda of: GKD(divergence=of, on_policy_fraction=1.0),
    "OPD": lambda of: OPD(),
    "OPD+": lambda of: OPDPlus(JensenShannon(), "centred"),
}


@pytest.mark.parametrize("name", METHODS)
def test_both_sides_are_served(name, train, tmp_path):
    recorder, module = train(METHODS[name](JensenShannon()))
    assert len(module.gaps) == 16
    assert max(module.gaps) < 2e-5
    assert not list((tmp_path / "run" / "weights").glob("okd-*"))  # read and deleted
    live, same = train(METHODS[name](TopK(JensenShannon(), K)), "live", served=False)
    for own, other in zip(recorder.losses, live.losses, strict=True):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-5)
    start = dict(served_models.make_student().named_parameters())
    moved = tiny.distance(tiny.weights(module), {n: p.detach() for n, p in start.items()})
    assert tiny.distance(tiny.weights(module), tiny.weights(same)) < 1e-3 * moved


def assert_same_weights(one: DistillationModule, other: DistillationModule) -> None:
    found, expected = tiny.weights(one), tiny.weights(other)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_cut_run_resumes_bit_for_bit(train, tmp_path):
    method = METHODS["OPD+"]
    _, whole = train(method(None), "whole")
    train(method(None), "cut", steps=2)
    _, resumed = train(method(None), "cut", ckpt_path=str(tmp_path / "cut" / LAST))
    assert_same_weights(resumed, whole)


class Crash(Callback):
    """Callback that crashes the student's server after a step and restarts it during the wait."""

    def __init__(self, pool) -> None:
        self.pool = pool

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and batch_idx == 3:
            self.pool.kill(STUDENT)
            self.pool.url(STUDENT, is_awaited=False)


def test_a_server_that_crashes_between_steps_changes_nothing(train, vllm_servers):
    method = METHODS["OPD+"]
    _, whole = train(method(None), "whole")
    _, crashed = train(method(None), "crashed", callbacks=[Crash(vllm_servers)])
    assert max(crashed.gaps) < 2e-5
    assert_same_weights(crashed, whole)
