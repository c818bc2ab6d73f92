"""User settings of a teacher that is not run in this process: its cache, or its server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from okd_lightning.errors import ConfigError

LogProbFormat: TypeAlias = Literal["float16", "float32"]


@dataclass(frozen=True)
class TeacherCache:
    """Log-probabilities of the teacher's k most likely ids, the rest and the target, on disk.

    Args:
        folder: Folder of caches, with one entry for each teacher, dataset and k.
        k: Ids that keep their own log-probability; 48 take at most 296 bytes a token in float16.
        dtype: Number format of the log-probabilities.
    """

    folder: str
    k: int = 48
    dtype: LogProbFormat = "float16"

    @classmethod
    def of(cls, given: str | TeacherCache) -> TeacherCache:
        """Return the checked settings; a text is the folder.

        They are not checked in the constructor: the command line would take its error for a value
        of another type.
        """
        settings = cls(folder=given) if isinstance(given, str) else given
        if settings.k < 1:
            raise ConfigError(f"model.teacher_cache.k must be at least 1, got {settings.k}")
        if settings.dtype not in get_args(LogProbFormat):
            raise ConfigError(
                f"model.teacher_cache.dtype is {settings.dtype!r}; expected float16 or float32"
            )
        return settings


@dataclass(frozen=True)
class TeacherServer:
    """A teacher on an OpenAI-compatible vLLM server, which scores every row of a batch.

    Args:
        url: Address of the server, such as http://localhost:8000.
        model: Name of the served teacher; by default the server's only model.
        k: Ids that keep their own log-probability; the server needs --max-logprobs k + 8.
        timeout_seconds: Longest wait for one row, which includes the server's queue.
        concurrency: Requests in flight at once.
        num_retries: Retries of a request whose connection failed; 12 last 64 seconds, in which a
            server can restart.
    """

    url: str
    model: str | None = None
    k: int = 12
    timeout_seconds: float = 600.0
    concurrency: int = 16
    num_retries: int = 12

    @classmethod
    def of(cls, given: str | TeacherServer) -> TeacherServer:
        """Return the checked settings; a text is the address.

        They are not checked in the constructor: the command line would take its error for a value
        of another type.

        Raises:
            ConfigError: A number out of its range.
        """
        settings = cls(url=given) if isinstance(given, str) else given
        for name in ("k", "concurrency"):
            value = getattr(settings, name)
            if value < 1:
                raise ConfigError(f"model.teacher_server.{name} must be at least 1, got {value}")
        return settings


def check_served_teacher(server: object, others: Mapping[str, object]) -> None:
    """Refuse a served teacher together with settings of another teacher.

    Args:
        server: The setting.
        others: Other settings of a teacher, by option; None for unset ones.

    Raises:
        ConfigError: Both are set; the message says what to leave out.
    """
    given = [f"model.{name}" for name, value in others.items() if value is not None]
    if server is not None and given:
        raise ConfigError(
            f"model.teacher_server names a teacher that runs on a server, and {given[0]} says "
            "something of another one: leave one of them out"
        )


def check_cached_teacher(cache: object, self_teacher: str | None, has_teacher: bool) -> None:
    """Refuse a cache without a teacher, or of a self-teacher.

    Raises:
        ConfigError: Not possible; the message says what to leave out.
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
