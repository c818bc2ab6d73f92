"""Faults of one process, and what is kept of a run.

Frozen here: a disk that is full while a checkpoint is written leaves the previous one without
further files, and one clear error; a broken checkpoint is named with what to take in its place; the
last k checkpoints and the best k by any measure stay; an engine that times out is named with its
prompts, and the run resumes; a row of metrics.csv holds what its step has logged and no older
values; an online module whose stage begins late has an optimizer and a schedule that begin with it;
stages, turns and rewards that have no effect are refused or not used.
"""

from __future__ import annotations

import csv
import errno
import resource
import signal
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig

from okd_lightning import durable_files
from okd_lightning.callbacks import (
    GKD,
    KD,
    OKD,
    SFT,
    BestCheckpoint,
    LastCheckpoint,
    OPDPlus,
    Preemption,
    Reward,
    Stage,
)
from okd_lightning.checkpoints.files import newest_checkpoint, read_checkpoint
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import TransformersEngine
from okd_lightning.errors import (
    CheckpointError,
    ConfigError,
    OutputError,
    RolloutTimeoutError,
)
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.run_records import RunCSVLogger


def files(root) -> list[str]:
    return sorted(path.name for path in (root / "checkpoints").iterdir())


# ---------------------------------------------------------------- the disk


@contextmanager
def small_disk():
    """Limit the size of files to 20 kB: the kernel refuses more, as on a full disk.

    Only as long as a checkpoint is written: what the tests themselves are logged to is such a file.
    """
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


class FillsUp(LastCheckpoint):
    """The disk is full from the third step on."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=1)

    def save_now(self, trainer):
        with small_disk() if trainer.global_step >= 3 else nullcontext():
            super().save_now(trainer)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, make_module):
    with pytest.raises(OutputError, match=r"last\.ckpt cannot be written \(File too large\)"):
        tiny.fit(tmp_path, make_module(), [KD()], tiny.make_rows(16), callbacks=[FillsUp()])
    assert files(tmp_path) == ["last.ckpt"]
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert read_checkpoint(str(last))["global_step"] == 2


def test_a_device_without_space(tmp_path, monkeypatch):
    """The error is the same where the last bytes are refused (ENOSPC) at the flush."""
    path = tmp_path / "kept"
    durable_files.write_whole(path, "before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable_files.os, "fsync", full)
    with pytest.raises(OutputError, match=r"kept cannot be written \(No space left on device\)"):
        durable_files.write_whole(path, "behind")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_the_resumed_run_after_a_full_disk(tmp_path, make_module):
    torch.manual_seed(0)
    whole = make_module()
    tiny.fit(tmp_path / "a", whole, [GKD(0.5)], tiny.make_rows(16))
    torch.manual_seed(0)
    with pytest.raises(OutputError):
        tiny.fit(
            tmp_path / "b",
            make_module(),
            [GKD(0.5)],
            tiny.make_rows(16),
            callbacks=[FillsUp()],
        )
    resumed = make_module()
    last = newest_checkpoint(tmp_path / "b")
    tiny.fit(tmp_path / "b", resumed, [GKD(0.5)], tiny.make_rows(16), ckpt_path=last)
    assert tiny.distance(tiny.weights(resumed), tiny.weights(whole)) == 0


# ---------------------------------------------------------------- what is kept


def keep_three(root, make_module, **settings):
    saver = LastCheckpoint(every_n_steps=1, keep=3)
    return tiny.fit(root, make_module(), [KD()], tiny.make_rows(24), callbacks=[saver], **settings)


def test_the_last_ones_are_kept(tmp_path, make_module):
    keep_three(tmp_path, make_module)
    assert files(tmp_path) == ["last-step=4.ckpt", "last-step=5.ckpt", "last.ckpt"]
    for name, step in (("last-step=4", 4), ("last-step=5", 5), ("last", 6)):
        path = tmp_path / "checkpoints" / f"{name}.ckpt"
        assert read_checkpoint(str(path))["global_step"] == step
    before = str(tmp_path / "checkpoints" / "last-step=4.ckpt")
    keep_three(tmp_path, make_module, ckpt_path=before)
    assert files(tmp_path) == ["last-step=4.ckpt", "last-step=5.ckpt", "last.ckpt"]


def test_a_broken_checkpoint_is_passed_over(tmp_path, make_module):
    assert newest_checkpoint(tmp_path) is None
    keep_three(tmp_path, make_module)
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(tmp_path) == str(folder / "last.ckpt")
    whole = (folder / "last.ckpt").read_bytes()
    (folder / "last.ckpt").unlink()
    (folder / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"last\.ckpt' is cut off.*take another: .*step=4"):
        read_checkpoint(str(folder / "last.ckpt"))
    with pytest.warns(UserWarning, match=r"last\.ckpt cannot be read.*continues from .*step=5"):
        assert newest_checkpoint(tmp_path) == str(folder / "last-step=5.ckpt")
    for path in folder.iterdir():
        path.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* can be read"):
        newest_checkpoint(tmp_path)


def best(root, make_module, saver: BestCheckpoint | None = None, **settings) -> list[str]:
    saver = saver or BestCheckpoint(**settings)
    tiny.fit(
        root,
        make_module(),
        [KD()],
        tiny.make_rows(24),
        val=tiny.make_rows(3),
        callbacks=[saver],
        val_check_interval=1,
        num_sanity_val_steps=0,
    )
    return files(root)


def test_the_best_of_a_second_trainer_is_its_own(tmp_path, make_module):
    saver = BestCheckpoint(metric="val/cross_entropy")
    first = best(tmp_path / "first", make_module, saver)
    saver.best_model_score = torch.tensor(0.0)  # nothing of the second run is as good
    saver.best_k_models = dict.fromkeys(saver.best_k_models, torch.tensor(0.0))
    assert best(tmp_path / "second", make_module, saver) == first
    assert files(tmp_path / "first") == first
    assert Path(saver.best_model_path) == tmp_path / "second" / "checkpoints" / first[0]


def test_the_best_ones_by_any_measure(tmp_path, make_module):
    assert len(best(tmp_path / "a", make_module, keep=2)) == 2
    (worst,) = best(tmp_path / "b", make_module, metric="val/cross_entropy", mode="max")
    (low,) = best(tmp_path / "c", make_module, metric="val/cross_entropy")
    assert worst != low
    with pytest.raises(ConfigError, match=r"'val/bleu' was not logged.*val/cross_entropy"):
        best(tmp_path / "d", make_module, metric="val/bleu")
    with pytest.raises(ConfigError, match="expected min or max"):
        BestCheckpoint(mode="low")
    with pytest.raises(ConfigError, match="keep must be at least 1"):
        LastCheckpoint(keep=0)


def test_a_relative_folder_is_one_folder(tmp_path, make_module, monkeypatch):
    """The folder stays the same if the process changes its working folder while it trains."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    class Leaves(SFT):
        def on_train_start(self, trainer, pl_module):
            monkeypatch.chdir(tmp_path / "elsewhere")

    tiny.fit("run", make_module(), [Leaves()], tiny.make_rows(8), callbacks=[LastCheckpoint(1)])
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not list((tmp_path / "elsewhere").iterdir())


# ---------------------------------------------------------------- engines


class LateEngine(TransformersEngine):
    """Does not answer while ``is_late`` says how often it has been asked."""

    asked, late_at = 0, 3

    def respond(self, request):
        LateEngine.asked += 1
        if LateEngine.asked == LateEngine.late_at:
            raise TimeoutError("no answer in 600 s")
        return super().respond(request)


class LateModule(DistillationModule):
    def build_engine(self, model):
        return LateEngine(model, self.vocabulary, self.eos_ids)


def test_an_engine_that_times_out(tmp_path, student_folder, teacher_folder):
    def run(root, **settings):
        torch.manual_seed(0)
        module = LateModule(str(student_folder), str(teacher_folder), learning_rate=1e-2)
        callbacks = [LastCheckpoint(every_n_steps=1)]
        tiny.fit(root, module, [OPDPlus()], tiny.make_rows(16), callbacks=callbacks, **settings)
        return tiny.weights(module)

    LateEngine.asked, LateEngine.late_at = 0, -1
    whole = run(tmp_path / "a")
    LateEngine.asked, LateEngine.late_at = 0, 3
    with pytest.raises(TimeoutError, match="did not answer in time") as caught:
        run(tmp_path / "b")
    assert isinstance(caught.value, RolloutTimeoutError)
    for text in (
        "the student generated responses to 4 prompts (rows ",
        "no answer in 600 s",
        "resume",
    ):
        assert text in str(caught.value)
    resumed = run(tmp_path / "b", ckpt_path=newest_checkpoint(tmp_path / "b"))
    assert tiny.distance(resumed, whole) == 0


# ---------------------------------------------------------------- what is logged


def test_a_row_holds_its_own_step_alone(tmp_path, make_module):
    methods = [Stage(SFT(), end=2), Stage(GKD(0.5, on_policy_fraction=1.0), start=2)]
    logger = RunCSVLogger(str(tmp_path))
    data = {"prompts_per_rollout": 8}
    tiny.fit(
        tmp_path,
        make_module(),
        methods,
        tiny.make_rows(24),
        logger=logger,
        log_every_n_steps=1,
        data=data,
    )
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(6))
    assert [bool(row["train/sft"]) for row in rows] == [True] * 2 + [False] * 4
    assert [bool(row["train/gkd"]) for row in rows] == [False] * 2 + [True] * 4
    written = [bool(row["rollout/mean_length"]) for row in rows]
    assert written == [False, False, True, False, True, False]
    assert all(row["train/loss"] for row in rows)


# ---------------------------------------------------------------- stages


def online(module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.teacher.named_parameters() if "lora_" in n}


class Watch(tiny.Recorder):
    """The optimizer's steps and rates of the online module, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        counts = {int(optimizer.state[p].get("step", 0)) for p in online_parameters(pl_module)}
        assert len(counts) == 1
        self.seen.append((counts.pop(), optimizer.param_groups[-1]["lr"]))


def online_parameters(module):
    return module.trained_parameters(module.teacher)


@pytest.mark.parametrize("end", [None, 6])
def test_an_online_module_that_begins_late_begins_again(end, tmp_path, make_module):
    """Stage(OKD) from step 3: its Adam and its warm-up are those of a run that begins there."""
    okd = OKD(online_module=LoraConfig(r=2), learning_rate=0.1, warmup_steps=2, schedule="linear")
    methods = [Stage(SFT()), Stage(okd, start=3, end=end)]
    module, watch = make_module(), Watch()
    tiny.fit(tmp_path, module, methods, tiny.make_rows(28), callbacks=[watch])
    counts = [count for count, _ in watch.seen]
    rates = [rate for _, rate in watch.seen]  # of the step to come
    assert counts == ([0, 0, 0, 1, 2, 3, 4] if end is None else [0, 0, 0, 1, 2, 3, 3])
    assert rates[2:4] == pytest.approx([0.05, 0.1])
    assert rates[5] == pytest.approx(0.05 if end is None else 0.0)


def test_a_stage_after_the_end_is_refused(tmp_path, make_module):
    methods = [SFT(), Stage(KD(), start=4)]
    with pytest.raises(ConfigError, match=r"Stage of kd: it begins at step 4, .* ends at step 4"):
        tiny.fit(tmp_path, make_module(), methods, tiny.make_rows(16))
    tiny.fit(tmp_path, make_module(), [SFT(), Stage(KD(), start=3)], tiny.make_rows(16))


def test_turns_without_tools_are_refused():
    with pytest.raises(ConfigError, match=r"max_turns 2 has no effect.*--data\.tools"):
        RolloutDataModule(tiny.make_rows(2), max_turns=2)
    assert RolloutDataModule(tiny.make_rows(2)).max_turns == 4


def test_rewards_are_asked_where_their_stage_acts(tmp_path, make_module):
    """A chunk of four steps, of which the reward acts in two."""
    asked = []

    def reward(prompt, response, reference):
        asked.append(response)
        return float(len(response))

    methods = [OPDPlus(), Stage(Reward(reward), start=1, end=3)]
    recorder = tiny.fit(
        tmp_path, make_module(), methods, tiny.make_rows(16), data={"prompts_per_rollout": 16}
    )
    assert len(asked) == 8
    given = [bool(b.credits["reward"].any()) for step in recorder.steps for b in step]
    assert given == [False, True, True, False]


def test_signals_are_given_back(tmp_path, make_module):
    before = signal.getsignal(signal.SIGTERM)
    tiny.fit(
        tmp_path,
        make_module(),
        [KD()],
        tiny.make_rows(8),
        callbacks=[LastCheckpoint(1), Preemption()],
    )
    assert signal.getsignal(signal.SIGTERM) == before
