"""Every callback of Lightning on a distillation: its effect, and a teacher that stays as it is.

Frozen here:
* all classes of ``lightning.pytorch.callbacks`` are in the table, and each does what it is for;
* the frozen teacher is bit-identical afterwards, whatever averages, prunes or unfreezes weights;
* averages are those of plain arithmetic on the student's weights of each step or epoch;
* an averaged copy shares the teacher's memory, and checkpoints do not hold the teacher;
* adapters: what averages and prunes touches what is trained alone;
* fsdp2 refuses by name what needs whole models in ``setup``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import pytest
import tiny
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BasePredictionWriter,
    BatchSizeFinder,
    Callback,
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    OnExceptionCheckpoint,
    ProgressBar,
    RichModelSummary,
    RichProgressBar,
    SpikeDetection,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch import Tensor

from okd_lightning import KD, OKD, DistillationModule, RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.training.safeguards.models_first import ModelsFirst

pytestmark = pytest.mark.filterwarnings("ignore")


class WithBackbone(DistillationModule):
    """What BackboneFinetuning asks for: an attribute ``backbone``, there in ``setup``."""

    @property
    def backbone(self) -> torch.nn.Module:
        assert self.student is not None
        return self.student.model


class FirstLayer(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.student.model.layers[0])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            layer = pl_module.student.model.layers[0]
            self.unfreeze_and_add_param_group(layer, optimizer, lr=1e-2)


class Weights(Callback):
    """The student's weights after every step and epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.steps.append(weights(pl_module.student))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(weights(pl_module.student))


class Predictions(BasePredictionWriter):
    def __init__(self) -> None:
        super().__init__("batch")
        self.records: list[Any] = []

    def write_on_batch_end(self, trainer, pl_module, prediction, *args):
        self.records += prediction


class Percent(ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def disable(self):
        pass

    def enable(self):
        pass

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((batch_idx + 1) / self.total_train_batches)


class Spikes(SpikeDetection):
    def __init__(self, path: str) -> None:
        super().__init__(exclude_batches_path=path, warmup=1)
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.losses.append(float(self.running_mean.compute()))


class Stop(Exception):
    pass


class Raises(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            raise Stop


@dataclass
class Run:
    """A finished run, to look at its effect."""

    trainer: lightning.Trainer
    module: DistillationModule
    data: RolloutDataModule
    callback: Callback
    weights: Weights
    folder: Path
    output: str


@dataclass(frozen=True)
class Case:
    """One callback: how it is made, what it must have done, and how the Trainer is set."""

    make: Callable[[Path], Callback]
    effect: Callable[[Run], bool]
    settings: dict[str, Any] = field(default_factory=dict)
    module: type[DistillationModule] = DistillationModule


def weights(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def close(model, wanted: dict[str, Tensor]) -> bool:
    found = weights(model)
    return all(torch.allclose(found[n], w, atol=1e-6) for n, w in wanted.items())


def mean(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]).mean(0) for name in rows[0]}


def moving_average(rows: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    average = rows[0]
    for row in rows[1:]:
        average = {n: decay * average[n] + (1 - decay) * row[n] for n in average}
    return average


def zeros(model) -> float:
    values = [value for name, value in model.named_parameters() if "mask" not in name]
    return sum(int((v == 0).sum()) for v in values) / sum(v.numel() for v in values)


def layer_at(run: Run, epoch: int) -> Tensor:
    return run.weights.epochs[epoch]["model.layers.0.mlp.up_proj.weight"]


def unfroze(run: Run) -> bool:
    start = tiny.make_llama(1).model.layers[0].mlp.up_proj.weight
    return torch.equal(layer_at(run, 0), start) and not torch.equal(layer_at(run, 1), start)


def logged(run: Run, part: str) -> bool:
    rows = (Path(run.trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()
    return part in rows[0]


def plain_callback(folder: Path) -> Callback:
    callback = Callback()
    callback.on_train_end = lambda trainer, module: (folder / "ended").touch()
    return callback


CASES: dict[type[Callback], Case] = {
    BackboneFinetuning: Case(
        lambda f: BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2),
        unfroze,
        module=WithBackbone,
    ),
    BaseFinetuning: Case(lambda f: FirstLayer(), unfroze),
    BasePredictionWriter: Case(lambda f: Predictions(), lambda r: len(r.callback.records) == 4),
    BatchSizeFinder: Case(
        lambda f: BatchSizeFinder(steps_per_trial=1, max_trials=2, init_val=1),
        lambda r: r.data.batch_size == 2,
    ),
    Callback: Case(plain_callback, lambda r: (r.folder / "ended").exists()),
    Checkpoint: Case(lambda f: Checkpoint(), lambda r: r.callback is r.trainer.callbacks[-1]),
    DeviceStatsMonitor: Case(
        lambda f: DeviceStatsMonitor(cpu_stats=True), lambda r: logged(r, "DeviceStatsMonitor")
    ),
    EarlyStopping: Case(
        lambda f: EarlyStopping(
            "train/loss", stopping_threshold=1e9, check_on_train_epoch_end=True
        ),
        lambda r: r.trainer.global_step == 2,
    ),
    LambdaCallback: Case(
        lambda f: LambdaCallback(on_train_end=lambda *_: (f / "ended").touch()),
        lambda r: (r.folder / "ended").exists(),
    ),
    LearningRateFinder: Case(
        lambda f: LearningRateFinder(num_training_steps=25, early_stop_threshold=None),
        lambda r: (
            r.callback.optimal_lr.suggestion() == r.module.learning_rate
            and r.trainer.optimizers[0].param_groups[0]["lr"] == r.module.learning_rate
        ),
        {"max_epochs": 20, "max_steps": 2},
    ),
    LearningRateMonitor: Case(lambda f: LearningRateMonitor("step"), lambda r: logged(r, "lr-")),
    ModelCheckpoint: Case(
        lambda f: ModelCheckpoint(f, "{step}", save_top_k=-1),
        lambda r: {p.name for p in r.folder.glob("*.ckpt")} == {"step=2.ckpt", "step=4.ckpt"},
    ),
    ModelPruning: Case(
        lambda f: ModelPruning("l1_unstructured", amount=0.5),
        lambda r: abs(zeros(r.module.student) - 0.75) < 0.01,  # half, and half of the rest
    ),
    ModelSummary: Case(
        lambda f: ModelSummary(),
        lambda r: "teacher" in r.output and f"{total(r):.1f} K" in r.output,
    ),
    RichModelSummary: Case(
        lambda f: RichModelSummary(),
        lambda r: "teacher" in r.output and f"{total(r):.1f} K" in r.output,
    ),
    ProgressBar: Case(
        lambda f: Percent(),
        lambda r: r.callback.seen == [0.5, 1.0] * 2,
        {"enable_progress_bar": True},
    ),
    RichProgressBar: Case(
        lambda f: RichProgressBar(), lambda r: "Epoch" in r.output, {"enable_progress_bar": True}
    ),
    TQDMProgressBar: Case(
        lambda f: TQDMProgressBar(), lambda r: "Epoch" in r.output, {"enable_progress_bar": True}
    ),
    SpikeDetection: Case(
        lambda f: Spikes(str(f / "spikes.json")), lambda r: len(set(r.callback.losses)) > 1
    ),
    StochasticWeightAveraging: Case(
        lambda f: StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1),
        # it averages at the start of an epoch, that is behind the one before
        lambda r: close(r.module.student, mean([start(), *r.weights.epochs[:2]])),
        {"max_epochs": 3},
    ),
    ThroughputMonitor: Case(
        lambda f: ThroughputMonitor(batch_size_fn=len, window_size=2),
        lambda r: logged(r, "samples_per_sec"),
    ),
    Timer: Case(
        lambda f: Timer({"seconds": 0}), lambda r: r.trainer.global_step == 0, {"max_epochs": 9}
    ),
    EMAWeightAveraging: Case(
        lambda f: EMAWeightAveraging(decay=0.5),
        lambda r: close(r.module.student, moving_average(r.weights.steps, 0.5)),
    ),
    WeightAveraging: Case(
        lambda f: WeightAveraging(), lambda r: close(r.module.student, mean(r.weights.steps))
    ),
}
ELSEWHERE = {GradientAccumulationScheduler, OnExceptionCheckpoint}


def start() -> dict[str, Tensor]:
    return weights(tiny.make_llama(1))


def total(run: Run) -> float:
    return sum(p.numel() for p in run.module.parameters()) / 1000


def make_module(kind: type[DistillationModule] = DistillationModule, **settings: Any):
    return kind(
        tiny.make_llama(1),
        tiny.make_llama(2, tiny.TEACHER_ROWS),
        tokenizer=tiny.make_tokenizer(),
        learning_rate=1e-2,
        **settings,
    )


def make_data(num_rows: int, val: list[dict[str, Any]] | None = None) -> RolloutDataModule:
    return RolloutDataModule(
        tiny.make_rows(num_rows),
        val,
        batch_size=4,
        max_prompt_length=24,
        max_response_length=24,
        val_rollouts=0,
        token_cache=None,
    )


def run_with(callback: Callback, tmp_path: Path, capfd, case: Case, method: Callback) -> Run:
    module = make_module(case.module)
    data = make_data(8, tiny.make_rows(4, seed=5))
    recorded = Weights()
    trainer = lightning.Trainer(
        callbacks=[recorded, callback, method],
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": CSVLogger(tmp_path),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": isinstance(callback, Checkpoint),
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
            "max_epochs": 2,
            **case.settings,
        },
    )
    trainer.fit(module, data)
    if isinstance(callback, BasePredictionWriter):
        trainer.predict(module, data)
    captured = capfd.readouterr()
    output = captured.out + captured.err
    return Run(trainer, module, data, callback, recorded, tmp_path, output)


def check_teacher(module: DistillationModule) -> None:
    assert module.teacher is not None
    found = {n.replace(".base_layer", ""): p for n, p in module.teacher.named_parameters()}
    for name, value in tiny.make_llama(2, tiny.TEACHER_ROWS).named_parameters():
        assert torch.equal(found[name], value), name


def test_every_callback_of_lightning_is_tried():
    kinds = {getattr(lightning_callbacks, name) for name in lightning_callbacks.__all__}
    assert kinds == CASES.keys() | ELSEWHERE


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_a_callback_of_lightning_has_its_effect(kind, tmp_path, capfd, caplog):
    caplog.set_level("INFO")
    case = CASES[kind]
    run = run_with(case.make(tmp_path), tmp_path, capfd, case, KD())
    run.output += caplog.text
    assert case.effect(run)
    check_teacher(run.module)


def test_an_exception_leaves_a_checkpoint(tmp_path, capfd):
    case = Case(lambda f: OnExceptionCheckpoint(f), lambda r: True)
    trainer = lightning.Trainer(
        callbacks=[KD(), OnExceptionCheckpoint(tmp_path), Raises()],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        max_steps=4,
        max_epochs=-1,
    )
    with pytest.raises(Stop):
        trainer.fit(make_module(case.module), make_data(8))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 2


def test_an_accumulation_that_changes_is_refused(tmp_path, capfd):
    case = Case(lambda f: GradientAccumulationScheduler({0: 2}), lambda r: True)
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler changes the rows"):
        run_with(case.make(tmp_path), tmp_path, capfd, case, KD())


@pytest.mark.parametrize("kind", [EMAWeightAveraging, StochasticWeightAveraging, ModelPruning])
def test_the_base_under_an_online_module_stays(kind, tmp_path, capfd):
    case = CASES[kind]
    run = run_with(case.make(tmp_path), tmp_path, capfd, case, OKD(online_module=LoraConfig(r=2)))
    check_teacher(run.module)
    online = [p for n, p in run.module.teacher.named_parameters() if "lora_" in n]
    assert online
    if kind is ModelPruning:
        assert sum(int((p == 0).sum()) for p in online) / sum(p.numel() for p in online) > 0.5


class Copied(Callback):
    """Copies in ``setup``, as averaging does, and keeps what a checkpoint holds."""

    copied: DistillationModule

    def setup(self, trainer, pl_module, stage):
        self.listed = {id(p) for p in pl_module.parameters()}
        self.copied = copy.deepcopy(pl_module)

    def on_train_end(self, trainer, pl_module):
        pairs = zip(self.copied.parameters(), pl_module.parameters(), strict=True)
        assert all(own is not other for own, other in pairs)


def test_a_copy_in_a_run_shares_the_teacher_and_lists_what_is_trained(tmp_path, capfd):
    callback = Copied()
    case = Case(lambda f: callback, lambda r: True, {"max_epochs": 1})
    run = run_with(callback, tmp_path, capfd, case, KD())
    teachers = zip(
        callback.copied.teacher.parameters(), run.module.teacher.parameters(), strict=True
    )
    assert all(own is other for own, other in teachers)
    assert callback.listed == {id(p) for p in run.module.student.parameters()}
    everything = {n for n, _ in run.module.named_parameters()}  # again, behind the run
    assert any(name.startswith("teacher.") for name in everything)
    callback.copied.to(torch.float64)  # moves its own weights alone
    assert next(run.module.teacher.parameters()).dtype == torch.float32
    assert next(callback.copied.student.parameters()).dtype == torch.float64


@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_checkpoints_of_averages_hold_no_teacher_and_go_on(kind, tmp_path):
    def fit(ckpt_path: Path | None = None):
        module = make_module()
        averaging = EMAWeightAveraging(decay=0.5) if kind == "EMA" else swa()
        saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
        trainer = tiny.make_trainer(tmp_path, [KD(), averaging, saving], max_epochs=3)
        trainer.fit(module, make_data(8), ckpt_path=ckpt_path)
        return module

    whole = fit()
    path = tmp_path / "step=4.ckpt"
    names = names_in(torch.load(path, weights_only=True))
    assert not [name for name in names if "teacher." in name]
    assert sum("up_proj" in name for name in names) >= 2 * 2  # the current weights, and the average
    assert close(fit(path).student, weights(whole.student))


def swa() -> StochasticWeightAveraging:
    return StochasticWeightAveraging(1e-2, swa_epoch_start=1, annealing_epochs=1)


def names_in(value: Any, prefix: str = "") -> list[str]:
    """The names of all tensors in nested mappings."""
    if isinstance(value, Tensor):
        return [prefix]
    if isinstance(value, dict):
        return [n for k, v in value.items() for n in names_in(v, f"{prefix}.{k}")]
    return []


@pytest.mark.parametrize("kind", [ModelPruning, EMAWeightAveraging, StochasticWeightAveraging])
def test_fsdp2_refuses_by_name_what_needs_whole_models(kind, tmp_path):
    trainer = tiny.make_trainer(tmp_path, [KD(), CASES[kind].make(tmp_path)])
    trainer.strategy.__class__ = FSDP2Strategy  # the check alone: no processes, no mesh
    module = make_module()
    module.trainer = trainer
    with pytest.raises(ConfigError, match=rf"fsdp2.*{kind.__name__}.*ddp"):
        ModelsFirst().setup(trainer, module, "fit")
    assert module.student is None
