"""Teachers: self-teachers, online modules, and teachers on disk or on a server.

* ``self_teacher``: the student as its own teacher.
* ``online_module``: a small trainable part on a frozen teacher (OKD).
* ``cached_teacher``: a teacher on disk, its most likely ids and the rest for every loss token.
  ``settings``: folder and size; ``identity``: a digest of the teacher; ``layout``: the rows of the
  cache; ``store``: a complete entry on disk.
* ``served_teacher``: the same from a teacher on a server, requested for every batch.
* ``teacher_base``: the model that the teacher was trained from, for methods that compare both.
* ``terms``: the methods that work with a cached or served teacher, and the form they take.
"""

from okd_lightning.teachers.cached_teacher import CachedTeacher
from okd_lightning.teachers.online_module import (
    OnlineModuleSettings,
    WithinContext,
    attach_online_module,
    base_teacher,
    check_online_module,
)
from okd_lightning.teachers.self_teacher import (
    DEFAULT_EMA_DECAY,
    SelfTeacher,
    check_self_teacher,
    detached,
    follow,
    in_eval_mode,
    teacher_copy,
)
from okd_lightning.teachers.served_teacher import ServedTeacher
from okd_lightning.teachers.settings import (
    TeacherCache,
    TeacherServer,
    check_cached_teacher,
    check_served_teacher,
)
from okd_lightning.teachers.teacher_base import TeacherBase
from okd_lightning.teachers.terms import cached_terms, check_cached_term

__all__ = [
    "DEFAULT_EMA_DECAY",
    "CachedTeacher",
    "OnlineModuleSettings",
    "SelfTeacher",
    "ServedTeacher",
    "TeacherBase",
    "TeacherCache",
    "TeacherServer",
    "WithinContext",
    "attach_online_module",
    "base_teacher",
    "cached_terms",
    "check_cached_teacher",
    "check_cached_term",
    "check_online_module",
    "check_self_teacher",
    "check_served_teacher",
    "detached",
    "follow",
    "in_eval_mode",
    "teacher_copy",
]
