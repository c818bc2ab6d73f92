"""Callbacks of a Trainer: methods, task metrics and monitors.

``methods``
    ``base``: ``DistillationCallback``, the interface of a method. ``divergence``:
    ``DivergenceCallback``, the base of every exact method. ``policy_gradient``:
    ``AdvantageCallback``, the base of every sampled method. ``sft``, ``kd``, ``gkd``, ``okd``,
    ``opd``: the published methods with their defaults. ``reward``: a task reward.
    ``hidden_states``: hidden states of layers. ``balance``: a mixture of experts' balancing loss.
    ``stage``: a method for a part of the run.
``measures``
    ``answer_scores``: the base of ``exact_match``, ``avg_at_k`` (avg@k and pass@k),
    ``tool_call_score`` and ``task_score`` (any reward function, such as ROUGE-L).
    ``paper_measures``: those of OKD's paper.
``monitors``
    ``teacher_drift``, ``throughput``; ``rollout_log`` (training responses on disk),
    ``predictions`` (generations on disk), ``sample_table`` with ``sample_views`` (answers before
    training and now); ``progress_bar`` with ``pace``; ``best_checkpoint``, ``last_checkpoint``,
    ``preemption`` (SIGTERM). ``always``: those that every run of the command line has.

``FiniteGuard`` and ``HealthWarnings``, which every Trainer has, are in
``okd_lightning.training.safeguards``.
"""

from okd_lightning.callbacks.measures.answer_scores import AnswerScores
from okd_lightning.callbacks.measures.avg_at_k import AvgAtK
from okd_lightning.callbacks.measures.exact_match import ExactMatch
from okd_lightning.callbacks.measures.paper_measures import PaperMeasures
from okd_lightning.callbacks.measures.task_score import TaskScore
from okd_lightning.callbacks.measures.tool_call_score import ToolCallScore
from okd_lightning.callbacks.methods.balance import ExpertBalance
from okd_lightning.callbacks.methods.base import DistillationCallback
from okd_lightning.callbacks.methods.divergence import DivergenceCallback
from okd_lightning.callbacks.methods.gkd import GKD
from okd_lightning.callbacks.methods.hidden_states import HiddenStates
from okd_lightning.callbacks.methods.kd import KD
from okd_lightning.callbacks.methods.okd import OKD
from okd_lightning.callbacks.methods.opd import OPD, OPDPlus
from okd_lightning.callbacks.methods.policy_gradient import (
    AdvantageCallback,
    PolicyGradientCallback,
)
from okd_lightning.callbacks.methods.reward import Reward
from okd_lightning.callbacks.methods.sft import SFT
from okd_lightning.callbacks.methods.stage import Stage
from okd_lightning.callbacks.monitors.best_checkpoint import BestCheckpoint
from okd_lightning.callbacks.monitors.last_checkpoint import LastCheckpoint
from okd_lightning.callbacks.monitors.predictions import PredictionLog
from okd_lightning.callbacks.monitors.preemption import Preemption
from okd_lightning.callbacks.monitors.rollout_log import RolloutLog
from okd_lightning.callbacks.monitors.sample_table import SampleTable
from okd_lightning.callbacks.monitors.teacher_drift import TeacherDrift
from okd_lightning.callbacks.monitors.throughput import Throughput
from okd_lightning.training.safeguards.health_warnings import HealthWarnings
from okd_lightning.training.step import FiniteGuard

__all__ = [
    "GKD",
    "KD",
    "OKD",
    "OPD",
    "SFT",
    "AdvantageCallback",
    "AnswerScores",
    "AvgAtK",
    "BestCheckpoint",
    "DistillationCallback",
    "DivergenceCallback",
    "ExactMatch",
    "ExpertBalance",
    "FiniteGuard",
    "HealthWarnings",
    "HiddenStates",
    "LastCheckpoint",
    "OPDPlus",
    "PaperMeasures",
    "PolicyGradientCallback",
    "PredictionLog",
    "Preemption",
    "Reward",
    "RolloutLog",
    "SampleTable",
    "Stage",
    "TaskScore",
    "TeacherDrift",
    "Throughput",
    "ToolCallScore",
]
