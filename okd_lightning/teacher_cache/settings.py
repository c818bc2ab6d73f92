"""What a user says of a teacher's cache: where it lies and how much it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from okd_lightning.errors import ConfigError

LogProbFormat: TypeAlias = Literal["float16", "float32"]


@dataclass(frozen=True)
class TeacherCache:
    """The teacher's k likeliest ids and the rest, for every loss token of the data, on disk.

    Args:
        folder: Where caches lie; each teacher, data set and k gets an entry of its own there.
        k: Ids that keep their own log-probability; 48 are 292 bytes a token at most.
        dtype: Number format of the log-probabilities.

    Raises:
        ConfigError: k below 1, or an unknown number format.
    """

    folder: str
    k: int = 48
    dtype: LogProbFormat = "float16"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"model.teacher_cache.k must be at least 1, got {self.k}")
        if self.dtype not in get_args(LogProbFormat):
            raise ConfigError(
                f"model.teacher_cache.dtype is {self.dtype!r}; expected float16 or float32"
            )

    @classmethod
    def of(cls, given: str | TeacherCache) -> TeacherCache:
        """The settings, also where only a folder is given."""
        return cls(folder=given) if isinstance(given, str) else given


def check_cached_teacher(cache: object, self_teacher: str | None, has_teacher: bool) -> None:
    """Refuse a cache of a teacher that is not there, or that does not stay as it is.

    Raises:
        ConfigError: Naming what to leave out.
    """
    if cache is None:
        return
    if self_teacher is not None:
        raise ConfigError(
            f"model.self_teacher {self_teacher} makes the student its own teacher, and "
            "model.teacher_cache keeps another model's: leave one of them out"
        )
    if not has_teacher:
        raise ConfigError(
            "model.teacher_cache has no teacher to keep: give --model.teacher, or leave it out"
        )
