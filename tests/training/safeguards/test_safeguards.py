"""The callbacks that a DistillationModule brings into a Trainer from Python.

* FiniteGuard, HealthWarnings and StepIntervals come where the Trainer has none, once, also in a
  second fit and with a second Trainer; a user's own of such a class, or of a subclass, stays.
* A subclass of the module may add further callbacks.
* A run that becomes NaN raises and saves nothing broken.
* Methods set up before the models are built, other callbacks after; an interval is refused early.
"""

from __future__ import annotations

import lightning
import pytest
import tiny
from lightning.pytorch.callbacks import Callback, LambdaCallback, ModelCheckpoint

from okd_lightning.callbacks import KD
from okd_lightning.errors import ConfigError, NonFiniteError
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.safeguards import SAFEGUARDS, ModelsFirst, StepIntervals
from okd_lightning.training.safeguards.health_warnings import HealthWarnings
from okd_lightning.training.step import FiniteGuard


def data(**settings) -> tiny.RolloutDataModule:
    defaults = {"batch_size": 4, "max_response_length": 8, "val_rollouts": 0}
    return tiny.RolloutDataModule(tiny.make_rows(8), **{**defaults, **settings})


def kinds_of(trainer: lightning.Trainer) -> list[type]:
    return sorted((type(c) for c in trainer.callbacks), key=lambda kind: kind.__name__)


def test_safeguards_come_once(tmp_path, make_module):
    module, first = make_module(), tiny.make_trainer(tmp_path, [KD()])
    first.fit(module, data())
    once = kinds_of(first)
    assert once == sorted((KD, ModelsFirst, *SAFEGUARDS), key=lambda kind: kind.__name__)
    first.fit_loop.max_epochs = 2
    first.fit(module, data())
    assert kinds_of(first) == once
    assert first.global_step == 4
    second = tiny.make_trainer(tmp_path, [KD()])
    second.fit(module, data())
    assert kinds_of(second) == once
    assert not {id(c) for c in first.callbacks} & {id(c) for c in second.callbacks}
    for run in (second.validate, second.test, second.predict):
        run(module, data(val=tiny.make_rows(4)))
    assert kinds_of(second) == once


class Counting(FiniteGuard):
    """A user's subclass."""

    def __init__(self) -> None:
        self.steps = 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps += 1
        super().on_before_optimizer_step(trainer, pl_module, optimizer)


def test_a_users_own_safeguard_stays(tmp_path, make_module):
    guard, health = Counting(), HealthWarnings(every_n_steps=3, length_growth=9.0)
    module, trainer = make_module(), tiny.make_trainer(tmp_path, [guard, KD(), health])
    trainer.fit(module, data())
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, data())
    assert guard.steps == trainer.global_step == 4
    for kind, own in ((FiniteGuard, guard), (HealthWarnings, health)):
        assert [c for c in trainer.callbacks if isinstance(c, kind)] == [own]
    assert sum(isinstance(c, StepIntervals) for c in trainer.callbacks) == 1


class Brings(DistillationModule):
    """A user's module with a callback and a safeguard of its own."""

    def configure_callbacks(self):
        others = [c for c in super().configure_callbacks() if not isinstance(c, FiniteGuard)]
        return [*others, Counting(), Ended()]


class Ended(Callback):
    def __init__(self) -> None:
        self.times = 0

    def on_train_end(self, trainer, pl_module):
        self.times += 1


def test_a_module_may_bring_callbacks_of_its_own(tmp_path, student_folder, teacher_folder):
    module = Brings(str(student_folder), str(teacher_folder))
    trainer = tiny.make_trainer(tmp_path, [KD()])
    trainer.fit(module, data())
    (guard,) = (c for c in trainer.callbacks if isinstance(c, FiniteGuard))
    (ended,) = (c for c in trainer.callbacks if isinstance(c, Ended))
    assert type(guard) is Counting
    assert (guard.steps, ended.times) == (2, 1)


def test_a_run_that_becomes_nan_raises(tmp_path, make_module):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    settings = {"max_epochs": 9, "enable_checkpointing": True}
    trainer = tiny.make_trainer(tmp_path, [KD(), saving], **settings)
    with pytest.raises(NonFiniteError, match=r"is (nan|inf) at step \d"):
        trainer.fit(make_module(learning_rate=1e30), data())
    assert trainer.global_step < 18


def test_methods_set_up_before_the_models_and_others_after(tmp_path, make_module):
    seen = {}

    class Early(Callback):
        precedes_models = True

        def setup(self, trainer, pl_module, stage):
            seen["early"] = pl_module.student is None, bool(pl_module.terms)

    late = LambdaCallback(
        setup=lambda trainer, module, stage: seen.update(
            late=(module.student is None, bool(module.terms))
        )
    )
    tiny.make_trainer(tmp_path, [late, Early(), KD()]).fit(make_module(), data())
    assert seen["early"][0]
    assert seen["late"] == (False, True)


def test_an_interval_of_no_steps_is_refused(tmp_path, make_module):
    trainer = tiny.make_trainer(tmp_path, [KD()])
    trainer.val_check_interval = 0
    with pytest.raises(ConfigError, match=r"val_check_interval must be at least 1 .* got 0"):
        trainer.fit(make_module(), data(val=tiny.make_rows(4)))
