"""Default monitors of the command line; a config's own monitor replaces one of its kind."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks.monitors.predictions import PredictionLog
from okd_lightning.callbacks.monitors.rollout_log import RolloutLog
from okd_lightning.callbacks.monitors.sample_table import SampleTable
from okd_lightning.callbacks.monitors.teacher_drift import TeacherDrift
from okd_lightning.callbacks.monitors.throughput import Throughput
from okd_lightning.training.safeguards.health_warnings import HealthWarnings
from okd_lightning.training.safeguards.step_intervals import StepIntervals
from okd_lightning.training.step import FiniteGuard

MONITORS: tuple[type[Callback], ...] = (
    FiniteGuard,
    TeacherDrift,
    HealthWarnings,
    Throughput,
    RolloutLog,
    SampleTable,
    PredictionLog,
    StepIntervals,
)
