"""Runs that train from a teacher's cache.

Frozen here: at k = vocabulary the losses, gradients and weights of the live run, at a smaller k
those of the live run with TopK; a second run never loads the teacher, and the first one lets it go;
other data, teachers, k or precision are other entries; broken files are written anew, and a killed
writer goes on where it was; methods, stages, rewards, teacher prompts, accumulation and resuming
work; validation takes bounds under names of their own and the best checkpoint follows them; what
needs the teacher itself is refused.
"""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import PreTrainedModel

import okd_lightning.training.pair_module
from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    OPD,
    SFT,
    BestCheckpoint,
    DivergenceCallback,
    LastCheckpoint,
    PaperMeasures,
    Reward,
    Stage,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import JensenShannon, ReverseKL, TopK
from okd_lightning.errors import CacheError, ConfigError
from okd_lightning.module import DistillationModule
from okd_lightning.teacher_cache import CachedTeacher, TeacherCache

ROWS, VAL = tiny.make_rows(22), tiny.make_rows(6, seed=2)
ALL = tiny.NUM_IDS


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(CachedTeacher, "part_positions", 20)
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch) -> list[weakref.ref[PreTrainedModel]]:
    """Every teacher that is loaded, weakly."""
    found = []
    original = okd_lightning.training.pair_module.load_checked

    def load(source, option, *args, **kwargs):
        model = original(source, option, *args, **kwargs)
        if option == "--model.teacher":
            found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(okd_lightning.training.pair_module, "load_checked", load)
    return found


def sgd(parameters):
    """Adam would make much of roundings where a gradient is next to nothing."""
    return torch.optim.SGD(parameters, lr=0.1)


def train(root, make_module, methods, k=None, cache=None, rows=ROWS, dtype="float32", **settings):
    """A recorder and the module; from a cache where k is given."""
    torch.manual_seed(5)
    given = {} if k is None else {"teacher_cache": TeacherCache(str(cache), k, dtype)}
    module = make_module(optimizer=sgd, **given, **settings.pop("model", {}))
    return tiny.fit(root, module, methods, rows, **settings), module


def check_same(found, expected, loss: float, gradient: float) -> None:
    (recorder, module), (live, live_module) = found, expected
    assert len(recorder.losses) == len(live.losses) > 3
    for own, other in zip(recorder.losses, live.losses, strict=True):
        assert own == pytest.approx(other, rel=2 * loss, abs=2 * loss)  # packed another way
    distances = [
        tiny.distance(own, other)
        for own, other in zip(recorder.gradients, live.gradients, strict=True)
    ]
    assert distances[0] < gradient
    assert max(distances) < 30 * gradient, distances  # roundings that the weights have taken in
    assert tiny.distance(tiny.weights(module), tiny.weights(live_module)) < 10 * gradient


METHODS = {
    "KD": lambda: [KD()],
    "cross-entropy": lambda: [KD(cross_entropy_weight=0.3)],
    "GKD off-policy": lambda: [GKD(0.3, on_policy_fraction=0.0)],
    "stages": lambda: [Stage(SFT(), end=2), Stage(KD(divergence=ReverseKL()), start=2)],
}


@pytest.mark.parametrize("name", METHODS)
def test_with_all_ids_it_is_the_live_run(name, tmp_path, make_module, cache):
    settings = {"accumulate_grad_batches": 2, "data": {"batch_size": 2}}
    live = train(tmp_path, make_module, METHODS[name](), **settings)
    cached = train(tmp_path, make_module, METHODS[name](), k=ALL + 9, cache=cache, **settings)
    check_same(cached, live, loss=1e-6, gradient=1e-6)


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-6), ("float16", 2e-3)])
@pytest.mark.parametrize("inner", [JensenShannon(0.5), ReverseKL()], ids=repr)
def test_with_some_ids_it_is_the_live_run_with_top_k(
    inner, dtype, rounding, tmp_path, make_module, cache
):
    live = train(tmp_path, make_module, [KD(divergence=TopK(inner, 5))])
    for divergence, k in ((inner, 5), (TopK(inner, 5), 8)):
        method = [KD(divergence=divergence)]
        cached = train(tmp_path, make_module, method, k=k, cache=cache, dtype=dtype)
        check_same(cached, live, loss=rounding, gradient=5 * rounding)
    exact = train(tmp_path, make_module, [KD(divergence=inner)])
    assert exact[0].losses[0]["train/kd"] > live[0].losses[0]["train/kd"] + 0.01


def test_the_teacher_is_let_go_and_not_loaded_again(
    tmp_path, make_module, cache, loaded, recwarn, caplog
):
    caplog.set_level("INFO")
    first, module = train(tmp_path, make_module, [KD()], k=5, cache=cache, val=VAL)
    gc.collect()
    assert module.teacher is None
    assert [teacher() for teacher in loaded] == [None]
    assert "written to its cache, 5 ids a token" in caplog.text
    caplog.clear()
    second, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache, val=VAL)
    assert len(loaded) == 1
    assert "read from its cache" in caplog.text
    assert second.losses == first.losses
    assert not [w for w in recwarn if "cache" in str(w.message)]


def entries(cache: Path) -> set[str]:
    return {path.parent.name for path in cache.glob("*/index.json")}


def test_whatever_changes_what_it_says_is_another_entry(
    tmp_path, make_module, cache, loaded, tiny_tokenizer
):
    def new_entries(**settings) -> int:
        before = entries(cache)
        train(tmp_path, make_module, [KD()], **{"k": 5, "cache": cache, **settings})
        return len(entries(cache) - before)

    other = tmp_path / "other"
    tiny.make_llama(9, tiny.TEACHER_ROWS).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    changed = [dict(ROWS[0], response=ROWS[0]["response"] + "a"), *ROWS[1:]]
    assert new_entries() == 1
    assert new_entries() == 0
    assert new_entries(rows=changed) == 1
    assert new_entries(data={"max_response_length": 3}) == 1
    assert new_entries(k=6) == 1
    assert new_entries(dtype="float16") == 1
    assert new_entries(model={"teacher": str(other)}) == 1
    assert new_entries(model={"teacher_dtype": "bfloat16"}) == 1
    assert new_entries(precision="bf16-mixed") == 1
    tiny.make_llama(10, tiny.TEACHER_ROWS).save_pretrained(other)  # in the same place
    assert new_entries(model={"teacher": str(other)}) == 1
    assert new_entries(model={"teacher": str(other)}) == 0
    num_loaded = len(loaded)
    assert new_entries(val=VAL) == 1  # the validation set has one of its own
    assert new_entries() == 0
    assert len(loaded) == num_loaded + 1


def test_a_teacher_that_moves_or_is_in_memory_is_the_same_one(
    tmp_path, make_module, cache, loaded, teacher_folder
):
    train(tmp_path, make_module, [KD()], k=5, cache=cache)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in teacher_folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    train(tmp_path, make_module, [KD()], k=5, cache=cache, model={"teacher": str(moved)})
    assert len(loaded) == 1
    in_memory = {"teacher": tiny.make_llama(2, tiny.TEACHER_ROWS)}
    for _ in range(2):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, model=in_memory)
    assert len(loaded) == 2
    assert len(entries(cache)) == 2


def test_a_broken_file_is_written_anew_and_said(tmp_path, make_module, cache, loaded):
    expected, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache)
    files = sorted(cache.glob("*/part-*.npy"))
    assert len(files) > 3
    untouched = files[0].stat().st_mtime_ns
    files[1].write_bytes(files[1].read_bytes()[:-2])
    with pytest.warns(UserWarning, match=r"part-00001.npy is missing or cut short: .* anew"):
        found, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache)
    assert len(loaded) == 2
    assert found.losses == expected.losses
    assert files[0].stat().st_mtime_ns == untouched
    content = bytearray(files[1].read_bytes())
    content[-1] ^= 1
    files[1].write_bytes(content)
    with pytest.raises(CacheError, match="is not what was written there; delete it"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache)


class Killed(Exception):
    """What ends a run in the middle."""


def test_a_killed_writer_goes_on_where_it_was(tmp_path, make_module, cache, monkeypatch):
    expected, _ = train(tmp_path, make_module, [KD()], k=5, cache=tmp_path / "whole")
    replaced: list[Path] = []
    original = os.replace

    def replace(source: Path, target: Path) -> None:
        if "part-" in source.name:
            if len(replaced) == 3:
                raise Killed
            replaced.append(target)
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train(tmp_path, make_module, [KD()], k=5, cache=cache)
    assert not entries(cache)
    assert len(list(cache.glob("*/part-*.npy"))) == 3
    stamps = [path.stat().st_mtime_ns for path in replaced]
    found, _ = train(tmp_path, make_module, [KD()], k=5, cache=cache)
    assert [path.stat().st_mtime_ns for path in replaced] == stamps
    assert found.losses == expected.losses
    assert not list(cache.glob("*/.*.new"))


def length_of(prompt: str, response: str, reference: str) -> float:
    return float(len(response))


def test_beside_a_reward_on_the_student_s_own_responses(tmp_path, make_module, cache):
    settings = {"data": {"samples_per_prompt": 2}, "accumulate_grad_batches": 2}

    def methods():
        return [KD(), Reward(length_of, "leave_one_out", weight=0.05)]

    live = train(tmp_path, make_module, methods(), **settings)
    cached = train(tmp_path, make_module, methods(), k=ALL, cache=cache, **settings)
    assert cached[0].sources()[0] == {0, 1}
    check_same(cached, live, loss=1e-5, gradient=1e-4)


def test_a_teacher_with_prompts_of_its_own(tmp_path, make_module, cache, loaded):
    templates = [{"teacher_prompt_template": t} for t in ("{reference}p{prompt}", "{prompt}p")]
    for number, data in enumerate(templates, start=1):
        live = train(tmp_path, make_module, [KD()], data=data)
        del loaded[:]
        cached = train(tmp_path, make_module, [KD()], k=ALL, cache=cache, data=data)
        assert len(loaded) == 1
        assert len(entries(cache)) == number
        check_same(cached, live, loss=1e-6, gradient=1e-6)


def test_validation_and_the_best_checkpoint(tmp_path, make_module, cache):
    best = BestCheckpoint(tmp_path / "checkpoints")
    recorder, module = train(
        tmp_path,
        make_module,
        [KD()],
        k=5,
        cache=cache,
        val=VAL,
        callbacks=[best],
        data={"val_rollouts": 3},
    )
    measured = best.best_model_score
    trainer = tiny.make_trainer(tmp_path)
    data = RolloutDataModule(
        ROWS, VAL, batch_size=4, max_prompt_length=16, max_response_length=8, seed=7, val_rollouts=3
    )
    live = trainer.validate(module, data, verbose=False)
    exact = {name: value for part in live for name, value in part.items()}
    assert module.teacher is not None
    bounds = torch.load(best.best_model_path, weights_only=True)["okd_lightning"]["metrics"]
    assert bounds.keys() == {
        "val/agreement",
        "val/cross_entropy",
        "val/on_policy_entropy",
        "val/top_k_forward_kl",
        "val/top_k_jsd",
        "val/top_k_reverse_kl",
    }
    assert float(measured) == pytest.approx(bounds["val/top_k_reverse_kl"])
    for name in ("agreement", "cross_entropy", "on_policy_entropy"):
        assert bounds[f"val/{name}"] == pytest.approx(exact[f"val/{name}"], rel=1e-4)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        assert 0 < bounds[f"val/top_k_{name}"] < exact[f"val/{name}"]
    assert "val/on_policy_reverse_kl" in exact
    assert len(recorder.losses) == 6
    again = tiny.fit(tmp_path, module, [KD()], ROWS)  # trains on: the teacher goes again
    assert module.teacher is None
    assert again.losses[0]["train/kd"] < recorder.losses[0]["train/kd"]


def test_all_ids_measure_what_the_live_validation_does(tmp_path, make_module, cache):
    best = BestCheckpoint(tmp_path / "checkpoints")
    _, module = train(tmp_path, make_module, [KD()], k=ALL, cache=cache, val=VAL, callbacks=[best])
    bounds = torch.load(best.best_model_path, weights_only=True)["okd_lightning"]["metrics"]
    data = RolloutDataModule(
        None, VAL, batch_size=4, max_prompt_length=16, max_response_length=8, val_rollouts=0
    )
    exact = tiny.make_trainer(tmp_path).validate(module, data, verbose=False)[0]
    for name in ("forward_kl", "reverse_kl", "jsd"):
        assert bounds[f"val/top_k_{name}"] == pytest.approx(exact[f"val/{name}"], rel=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, make_module, cache, loaded):
    whole = train(tmp_path, make_module, [KD()], k=5, cache=cache, max_epochs=2)
    callbacks = [LastCheckpoint(every_n_steps=1)]
    train(tmp_path, make_module, [KD()], k=5, cache=cache, callbacks=callbacks, max_steps=3)
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    held = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not [name for name in held if name.startswith("teacher")]
    resumed = train(
        tmp_path, make_module, [KD()], k=5, cache=cache, ckpt_path=checkpoint, max_epochs=2
    )
    assert tiny.distance(tiny.weights(resumed[1]), tiny.weights(whole[1])) == 0
    assert resumed[0].losses == whole[0].losses[3:]
    assert len(loaded) == 1


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
        ([GKD(on_policy_fraction=0.5)], "gkd asks the teacher about responses that the student"),
        ([OPD()], "opd asks the teacher about responses that the student writes"),
        ([KD(seq_kd=True)], "kd has the teacher write responses"),
        ([KD(divergence=TopK(ReverseKL(), 9))], "takes 9 ids, and 5 are known"),
        ([KD(divergence=TopK(ReverseKL(), 2, "student"))], "student's likeliest ids"),
        ([Adapted()], "adapted with a cached teacher: it asks for Entropy"),
        ([OKD(online_module=LoraConfig(r=2))], "an online module is trained on a teacher"),
        ([Stage(KD(temperature=3.0), start=0)], "its temperature is 3"),
        ([KD(), PaperMeasures()], "PaperMeasures has the teacher write"),
    ],
    ids=str,
)
def test_what_needs_the_teacher_is_refused_before_anything_is_loaded(
    methods, words, tmp_path, make_module, cache, loaded
):
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, make_module, methods, k=5, cache=cache, val=VAL)
    assert not loaded
    assert not cache.exists()


def test_settings_that_contradict_each_other(make_module, student_folder, cache):
    folder = str(cache)
    with pytest.raises(ConfigError, match="k must be at least 1, got 0"):
        TeacherCache.of(TeacherCache(folder, 0))
    with pytest.raises(ConfigError, match="dtype is 'int8'; expected float16 or float32"):
        TeacherCache.of(TeacherCache(folder, 5, "int8"))
    with pytest.raises(ConfigError, match=r"model.teacher_cache has no teacher to keep"):
        make_module(teacher=None, teacher_cache=folder)
    with pytest.raises(ConfigError, match=r"model.self_teacher frozen makes the student its own"):
        make_module(teacher=None, self_teacher="frozen", teacher_cache=folder)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_random_weights_and_other_loaders_are_refused(tmp_path, make_module, cache, tiny_tokenizer):
    random = tiny.make_llama(2).config.to_dict()
    with pytest.raises(ConfigError, match="a config with random weights: save the model"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, model={"teacher": random})
    module = make_module(teacher_cache=str(cache))
    trainer = tiny.make_trainer(tmp_path, [KD()], limit_val_batches=0)
    with pytest.raises(ConfigError, match="reads its rows from a RolloutDataModule"):
        trainer.fit(module, train_dataloaders=[0])


def test_a_row_that_is_not_there_is_no_other_row(tmp_path, make_module, cache):
    class Swapped(tiny.Recorder):
        """Changes a token behind the loader's back."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.input_ids[0, 0] = 3 + (int(batch.input_ids[0, 0]) - 2) % 16

    with pytest.raises(CacheError, match="a row of this run is not in the teacher's cache"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, callbacks=[Swapped()])


def test_the_module_itself_asks_for_nothing_that_is_not_cached(tmp_path, make_module, cache):
    class Curious(tiny.Recorder):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.measure(batch, KD().quantities)

    with pytest.raises(ConfigError, match="was asked of a teacher of whom 5 ids are known"):
        train(tmp_path, make_module, [KD()], k=5, cache=cache, callbacks=[Curious()])


def test_methods_over_whole_sequences(tmp_path, make_module, cache):
    """Terms that are not positionwise take the other path of the loss layer."""

    class Whole(KD):
        is_positionwise = False

    live = train(tmp_path, make_module, [KD(divergence=TopK(ReverseKL(), 5), name="whole")])
    method = [Whole(divergence=ReverseKL(), name="whole")]
    cached = train(tmp_path, make_module, method, k=5, cache=cache)
    check_same(cached, live, loss=2e-6, gradient=2e-6)


def test_lora_student_and_bfloat16_teacher(tmp_path, make_module, cache):
    settings = {
        "model": {
            "student_adapter": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
            "teacher_dtype": "bfloat16",
        }
    }
    live = train(tmp_path, make_module, [KD()], **settings)
    cached = train(tmp_path, make_module, [KD()], k=ALL, cache=cache, **settings)
    check_same(cached, live, loss=5e-3, gradient=5e-2)  # batches are cut otherwise, in bfloat16
    assert isinstance(cached[1], DistillationModule)
