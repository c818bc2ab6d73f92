"""Teachers: who teaches.

* ``self_teacher``: the student as its own teacher.
* ``online_module``: a small trainable part on a frozen teacher (OKD).
* ``cached_teacher``: a teacher on disk, its likeliest ids and the rest for every loss token:
  ``settings`` where it lies and how much it keeps, ``identity`` which teacher it is of, ``layout``
  which rows it holds, ``store`` an entry on disk, whole or not there.
* ``served_teacher``: the same side from a teacher on a server, which is asked every time.
* ``terms``: which methods a cached or served teacher can serve, and as what.
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
from okd_lightning.teachers.terms import cached_terms, check_cached_term

__all__ = [
    "DEFAULT_EMA_DECAY",
    "CachedTeacher",
    "OnlineModuleSettings",
    "SelfTeacher",
    "ServedTeacher",
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
