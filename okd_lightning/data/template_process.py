"""Rendering of a tokenizer's chat template in a separate process, limited in time and memory.

A template is a program that comes with a model. jinja's sandbox prevents access to files and
Python, but not nested loops, ``9**9**9`` or a text that doubles with every message. Some of these
are one operation in C, which cannot be interrupted from the same process. The process is a fork, so
that it starts in milliseconds with the tokenizer in memory; it only renders.
"""

from __future__ import annotations

import math
import os
import pickle
import resource
import signal
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from okd_lightning.errors import DataError, one_line

_SECONDS = 10
"""Limit in processor time, so that a busy machine is not taken for a template that loops."""

_LONGEST_WAIT = 600.0
_MORE_BYTES = 1 << 30
_SPARE_CHARACTERS, _TIMES = 1 << 22, 32
"""Longest rendering: four million characters plus this factor times the chat's size."""

Rendering: TypeAlias = tuple[Sequence[Any], Mapping[str, Any]]


class TemplateProcess:
    """Renders chats; its process starts with the first chat and ends with this object.

    Args:
        tokenizer: A tokenizer with a chat template; later changes of it have no effect.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._owner = 0  # the process that started it: a fork of this one starts its own
        self._child = 0
        self._pipe: Connection | None = None
        self._stop: Any = None

    def render(self, chats: Sequence[Rendering], what: str) -> list[str]:
        """Render some chats in one request to the process.

        Args:
            chats: Messages, and further arguments of ``apply_chat_template``.
            what: Subject of error messages, such as "data.jsonl, row 3: the chat template".

        Raises:
            DataError: The template refuses the chat, takes more than ten seconds of processor time
                or a GiB, or renders far more text than the chat has.
        """
        try:
            request = pickle.dumps(list(chats))
        except RecursionError as error:
            raise DataError(f"{what} cannot be given a chat that is nested too deeply") from error
        pipe = self._running()
        try:
            pipe.send_bytes(request)
            if not pipe.poll(_LONGEST_WAIT):
                raise TimeoutError
            answer = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            is_late = isinstance(error, TimeoutError) or self._ended_by() == signal.SIGXCPU
            self.close()
            if not is_late:
                raise DataError(f"{what} ended its process, or needs more than 1 GiB") from error
            raise DataError(
                f"{what} takes more than {_SECONDS} seconds of processor time for one chat; it "
                "loops, and has to be replaced (the tokenizer's chat_template)"
            ) from error
        if isinstance(answer, str):
            raise DataError(f"{what} {answer}")
        return list(answer)

    def _ended_by(self) -> int:
        """Return the signal that ended the process; 0 for none."""
        with suppress(ChildProcessError):
            _, status = os.waitpid(self._child, 0)
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return 0

    def close(self) -> None:
        """End the process, if there is one."""
        if self._stop is not None and self._owner == os.getpid():
            self._stop()
        self._pipe = self._stop = None

    def _running(self) -> Connection:
        if self._pipe is None or self._owner != os.getpid():
            here, there = Pipe()
            with warnings.catch_warnings():
                # Python 3.12 warns of forks with threads; the child uses none of their locks
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                here.close()
                _serve(self._tokenizer, there)
            there.close()
            self._pipe, self._owner, self._child = here, os.getpid(), child
            self._stop = weakref.finalize(self, _end, here, child, os.getpid())
        return self._pipe


def _end(pipe: Connection, child: int, owner: int) -> None:
    pipe.close()
    if os.getpid() != owner:  # a fork that inherited the object
        return
    with suppress(ProcessLookupError, ChildProcessError):  # it has already ended
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(tokenizer: PreTrainedTokenizerBase, pipe: Connection) -> None:
    """Answer requests until the pipe is closed; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # left to the run, which ends this process
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        _limit_memory()
        while True:
            request = pipe.recv_bytes()
            _limit_time()
            pipe.send_bytes(pickle.dumps(_rendered(tokenizer, request)))
    finally:
        os._exit(0)


def _limit_time() -> None:
    """Make the system end this process after ten more seconds of processor time."""
    most = math.ceil(time.process_time()) + _SECONDS
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _limit_memory() -> None:
    """Limit memory to a GiB more than is in use, if the system reports the use."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _rendered(tokenizer: PreTrainedTokenizerBase, request: bytes) -> list[str] | str:
    """Return the renderings, or the reason why there are none."""
    texts = []
    try:
        for messages, settings in pickle.loads(request):
            text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, **settings))
            if len(text) > _SPARE_CHARACTERS + _TIMES * len(request):
                return f"makes {len(text):,} characters of a chat of {len(request):,} bytes"
            texts.append(text)
    except MemoryError:
        return "needs more than 1 GiB of memory for one chat"
    except RecursionError:
        return "calls itself without end"
    except Exception as error:  # noqa: BLE001  a template is a program and can raise any error
        return f"refuses this chat ({one_line(str(error), 500) or type(error).__name__})"
    return texts
