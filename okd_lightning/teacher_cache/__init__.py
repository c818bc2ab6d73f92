"""A teacher that is asked once: its likeliest ids and the rest for every loss token, on disk.

* ``settings``: where it lies and how much it keeps.
* ``identity``: which teacher it is of.
* ``layout``: which rows it holds, and where.
* ``store``: an entry on disk, whole or not there.
* ``terms``: which methods it can serve, and as what.
* ``cached_teacher``: the cache as one side of the loss layer, and its writing.
* ``preparation``: at the start of a run it is found or written.
"""

from okd_lightning.teacher_cache.cached_teacher import CachedTeacher
from okd_lightning.teacher_cache.preparation import prepare_cache
from okd_lightning.teacher_cache.settings import TeacherCache, check_cached_teacher
from okd_lightning.teacher_cache.terms import cached_terms, check_cached_term

__all__ = [
    "CachedTeacher",
    "TeacherCache",
    "cached_terms",
    "check_cached_teacher",
    "check_cached_term",
    "prepare_cache",
]
