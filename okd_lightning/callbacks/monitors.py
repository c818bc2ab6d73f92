"""The monitors that every run of the command line has, where its config brings none of a kind."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks.predictions import PredictionLog
from okd_lightning.callbacks.rollout_log import RolloutLog
from okd_lightning.callbacks.sample_table import SampleTable
from okd_lightning.callbacks.teacher_drift import TeacherDrift
from okd_lightning.callbacks.throughput import Throughput
from okd_lightning.safeguards.finite_guard import FiniteGuard
from okd_lightning.safeguards.health_warnings import HealthWarnings
from okd_lightning.safeguards.step_intervals import StepIntervals

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
