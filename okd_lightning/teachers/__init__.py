"""Teachers: one protocol, and one class for each kind of teacher.

* ``base``: the ``Teacher``, as the rest of the package sees it. ``run``: the records that a run
  gives it. ``no_teacher``: plain SFT.
* ``loaded``: a frozen model in memory; ``host_weights``: its weights in host memory.
* ``frozen_self``, ``averaged_self``, ``live_self``: the student as its own teacher, on what they
  share (``self_teacher``).
* ``adaptive``: another teacher with a small trainable part (OKD), which ``online_module`` attaches.
* ``foreign_teacher``: a teacher with another tokenizer, which reads the text in its own ids.
* ``ensemble``, ``routed``: several models as one distribution, or one for each row, on what
  ``several`` gives them.
* ``cached_teacher``, ``served_teacher``: a teacher on disk or on a server, of which k ids per token
  are known (``packed``); ``terms``: the methods that work with these, and the cached form of their
  terms. ``cache_preparation``, ``cache_writing``, ``identity``, ``layout``, ``store``: the cache on
  disk.
* ``teacher_base``: the model that the teacher was trained from, for methods that compare both.
"""

from okd_lightning.models.causal_lm import trained
from okd_lightning.models.reading import model_side
from okd_lightning.teachers.adaptive import AdaptiveTeacher
from okd_lightning.teachers.averaged_self import AveragedSelf
from okd_lightning.teachers.base import Teacher
from okd_lightning.teachers.cached_teacher import CachedTeacher
from okd_lightning.teachers.ensemble import TeacherEnsemble
from okd_lightning.teachers.foreign_teacher import ForeignTeacher
from okd_lightning.teachers.frozen_self import FrozenSelf
from okd_lightning.teachers.live_self import LiveSelf
from okd_lightning.teachers.loaded import LoadedTeacher, teacher_of
from okd_lightning.teachers.no_teacher import NoTeacher
from okd_lightning.teachers.online_module import (
    OnlineModuleSettings,
    attach_online_module,
    base_teacher,
)
from okd_lightning.teachers.routed import RoutedTeachers
from okd_lightning.teachers.run import GeneratingModels, Opening, TeacherOptions, TeacherRun
from okd_lightning.teachers.served_teacher import ServedTeacher
from okd_lightning.teachers.teacher_base import TeacherBase

__all__ = [
    "AdaptiveTeacher",
    "AveragedSelf",
    "CachedTeacher",
    "ForeignTeacher",
    "FrozenSelf",
    "GeneratingModels",
    "LiveSelf",
    "LoadedTeacher",
    "NoTeacher",
    "OnlineModuleSettings",
    "Opening",
    "RoutedTeachers",
    "ServedTeacher",
    "Teacher",
    "TeacherBase",
    "TeacherEnsemble",
    "TeacherOptions",
    "TeacherRun",
    "attach_online_module",
    "base_teacher",
    "model_side",
    "teacher_of",
    "trained",
]
