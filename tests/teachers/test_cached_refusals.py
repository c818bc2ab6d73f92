"""Refusals of a cached teacher.

Frozen here: what needs the teacher itself is refused before anything is loaded; settings that
contradict each other, random weights and foreign loaders are refused; a row or a quantity that is
not cached is no other one.
"""

from __future__ import annotations

import pytest
import tiny
from cache_training import VAL, train
from peft import LoraConfig

from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    OPD,
    DivergenceCallback,
    PaperMeasures,
    Stage,
)
from okd_lightning.divergences import ReverseKL, TopK
from okd_lightning.errors import CacheError, ConfigError
from okd_lightning.teachers import CachedTeacher


class Adapted(DivergenceCallback):
    """A method of one's own that asks for the teacher's entropy."""

    @property
    def quantities(self):
        from okd_lightning.losses import Entropy

        return (*super().quantities, Entropy("teacher"))


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ([KD(temperature=2.0)], "kd with a cached teacher: its temperature is 2"),
        ([GKD(on_policy_fraction=0.5)], "gkd needs the teacher on responses that the student"),
        ([OPD()], "opd needs the teacher on responses that the student generates"),
        ([KD(seq_kd=True)], "kd has the teacher generate responses"),
        ([KD(divergence=TopK(ReverseKL(), 9))], "takes 9 ids, and 5 are known"),
        ([KD(divergence=TopK(ReverseKL(), 2, "student"))], "student's most likely ids"),
        ([Adapted()], "adapted with a cached teacher: it asks for Entropy"),
        ([OKD(online_module=LoraConfig(r=2))], "an online module is trained on a teacher"),
        ([Stage(KD(temperature=3.0), start=0)], "its temperature is 3"),
        ([KD(), PaperMeasures()], "PaperMeasures has the teacher generate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_needs_the_teacher_is_refused_before_anything_is_loaded(
    methods, words, tmp_path, make_module, cache, loaded
):
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, make_module, methods, k=5, cache=cache, val=VAL)
    assert not loaded
    assert not cache.exists()


def test_settings_out_of_their_range(cache):
    folder = str(cache)
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        CachedTeacher("teacher", folder, 0)
    with pytest.raises(ConfigError, match="dtype is 'int8'; expected float16 or float32"):
        CachedTeacher("teacher", folder, 5, "int8")
    with pytest.raises(ConfigError, match=r"model.teacher is a NoneType; expected a folder"):
        CachedTeacher(None, folder)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_random_weights_and_other_loaders_are_refused(tmp_path, make_module, cache, tiny_tokenizer):
    random = tiny.make_llama(2).config.to_dict()
    with pytest.raises(ConfigError, match="a config with random weights: save the model"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, model={"teacher": random})
    module = make_module(kind=lambda teacher: CachedTeacher(teacher, str(cache)))
    trainer = tiny.make_trainer(tmp_path, [KD()], limit_val_batches=0)
    with pytest.raises(ConfigError, match="reads its rows from a RolloutDataModule"):
        trainer.fit(module, train_dataloaders=[0])


def test_a_row_that_is_not_there_is_no_other_row(tmp_path, make_module, cache):
    class Swapped(tiny.Recorder):
        """Callback that changes a token of a loaded batch."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.input_ids[0, 0] = 3 + (int(batch.input_ids[0, 0]) - 2) % 16

    with pytest.raises(CacheError, match="a row of this run is not in the teacher cache"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, callbacks=[Swapped()])


def test_the_module_itself_asks_for_nothing_that_is_not_cached(tmp_path, make_module, cache):
    class Curious(tiny.Recorder):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.measure(batch, KD().quantities)

    with pytest.raises(ConfigError, match="needs more of the teacher than its 5 known ids"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, callbacks=[Curious()])
