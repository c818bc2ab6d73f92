"""Method callbacks and monitors: what a Trainer is given to distil by.

* ``base``: ``DistillationCallback``, the contract of a method.
* ``divergence``: ``DivergenceCallback``, the brick of every exact method.
* ``policy_gradient``: ``AdvantageCallback``, the brick of every sampled method.
* ``sft``, ``kd``, ``gkd``, ``okd``, ``opd``: the published methods, as constructions with their
  defaults; ``reward``: a task's reward beside them; ``stage``: a method for a part of the run.
* task measures: ``exact_match``, ``avg_at_k`` (avg@k and pass@k), ``tool_call_score``,
  ``task_score`` (any reward function, such as ROUGE-L), on the base ``answer_scores``.
* monitors: ``paper_measures`` (OKD's), ``teacher_drift``, ``rollout_log`` (responses of training
  on disk), ``sample_table`` (the same prompts before and now) with ``sample_views``,
  ``predictions`` (generations on disk), ``progress_bar`` with ``pace``, ``best_checkpoint``,
  ``last_checkpoint``, ``preemption`` (SIGTERM), ``throughput``; ``monitors``:
  those that every run of the command line has. ``FiniteGuard`` and ``HealthWarnings``, which
  every Trainer has, are in ``okd_lightning.safeguards``.
"""

from okd_lightning.callbacks.answer_scores import AnswerScores
from okd_lightning.callbacks.avg_at_k import AvgAtK
from okd_lightning.callbacks.base import DistillationCallback
from okd_lightning.callbacks.best_checkpoint import BestCheckpoint
from okd_lightning.callbacks.divergence import DivergenceCallback
from okd_lightning.callbacks.exact_match import ExactMatch
from okd_lightning.callbacks.gkd import GKD
from okd_lightning.callbacks.kd import KD
from okd_lightning.callbacks.last_checkpoint import LastCheckpoint
from okd_lightning.callbacks.okd import OKD
from okd_lightning.callbacks.opd import OPD, OPDPlus
from okd_lightning.callbacks.paper_measures import PaperMeasures
from okd_lightning.callbacks.policy_gradient import AdvantageCallback, PolicyGradientCallback
from okd_lightning.callbacks.predictions import PredictionLog
from okd_lightning.callbacks.preemption import Preemption
from okd_lightning.callbacks.reward import Reward
from okd_lightning.callbacks.rollout_log import RolloutLog
from okd_lightning.callbacks.sample_table import SampleTable
from okd_lightning.callbacks.sft import SFT
from okd_lightning.callbacks.stage import Stage
from okd_lightning.callbacks.task_score import TaskScore
from okd_lightning.callbacks.teacher_drift import TeacherDrift
from okd_lightning.callbacks.throughput import Throughput
from okd_lightning.callbacks.tool_call_score import ToolCallScore
from okd_lightning.safeguards.finite_guard import FiniteGuard
from okd_lightning.safeguards.health_warnings import HealthWarnings

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
    "FiniteGuard",
    "HealthWarnings",
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
