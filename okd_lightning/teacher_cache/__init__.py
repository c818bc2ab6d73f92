"""A teacher that is asked once: its likeliest ids and the rest for every loss token, on disk.

* ``settings``: where it lies and how much it keeps.
* ``identity``: which teacher it is of.
* ``layout``: which rows it holds, and where.
* ``store``: an entry on disk, whole or not there.
* ``terms``: which methods it can serve, and as what.
* ``cached_teacher``: the cache as one side of the loss layer, and its writing.
* ``served_teacher``: the same side from a teacher on a server, which is asked every time.
* ``preparation``: at the start of a run it is found or written.
"""

from okd_lightning.teacher_cache.cached_teacher import CachedTeacher
from okd_lightning.teacher_cache.preparation import prepare_cache
from okd_lightning.teacher_cache.served_teacher import ServedTeacher
from okd_lightning.teacher_cache.settings import (
    TeacherCache,
    TeacherServer,
    check_cached_teacher,
    check_served_teacher,
)
from okd_lightning.teacher_cache.terms import cached_terms, check_cached_term

__all__ = [
    "CachedTeacher",
    "ServedTeacher",
    "TeacherCache",
    "TeacherServer",
    "cached_terms",
    "check_cached_teacher",
    "check_cached_term",
    "check_served_teacher",
    "prepare_cache",
]
