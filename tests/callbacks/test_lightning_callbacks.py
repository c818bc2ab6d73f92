"""Every callback of Lightning on a distillation: its effect, and a teacher that stays as it is.

Frozen here:
* all classes of ``lightning.pytorch.callbacks`` are in the table, and each does what it is for;
* the frozen teacher is bit-identical afterwards, with callbacks that average, prune or unfreeze
  weights;
* averages are those of plain arithmetic on the student's weights of each step or epoch;
* adapters: what averages and prunes touches what is trained alone;
* fsdp2 refuses by name what needs whole models in ``setup``.

(Copies of the module, and checkpoints of averages: test_averaged_copies.py.)
"""

from __future__ import annotations

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
from lightning_runs import (
    Case,
    Run,
    check_teacher,
    close,
    make_data,
    make_module,
    run_with,
    weights,
)
from peft import LoraConfig
from torch import Tensor

from okd_lightning import KD, OKD, DistillationModule
from okd_lightning.errors import ConfigError
from okd_lightning.sharding import FSDP2Strategy
from okd_lightning.training.safeguards.models_first import ModelsFirst

pytestmark = pytest.mark.filterwarnings("ignore")


class WithBackbone(DistillationModule):
    """Module with the attribute ``backbone`` that BackboneFinetuning needs in ``setup``."""

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
        # it averages at the start of an epoch, that is after the previous one
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


@pytest.mark.parametrize("kind", [ModelPruning, EMAWeightAveraging, StochasticWeightAveraging])
def test_fsdp2_refuses_by_name_what_needs_whole_models(kind, tmp_path):
    trainer = tiny.make_trainer(tmp_path, [KD(), CASES[kind].make(tmp_path)])
    trainer.strategy.__class__ = FSDP2Strategy  # the check alone: no processes, no mesh
    module = make_module()
    module.trainer = trainer
    with pytest.raises(ConfigError, match=rf"fsdp2.*{kind.__name__}.*ddp"):
        ModelsFirst().setup(trainer, module, "fit")
    assert module.student is None
