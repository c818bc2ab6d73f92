"""A tokenizer's chat template, rendered in a process of its own: limited in time and memory.

A template is a program that comes with a model. jinja's sandbox keeps it from files and Python, not
from nested loops, ``9**9**9`` or a text that doubles for every message: some of these are one
operation in C, which nothing within a process can end. The process is a fork, so that it starts in
milliseconds with the tokenizer in memory, and does nothing but render.
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
"""Of processor time: a machine that is busy is no template that loops."""

_LONGEST_WAIT = 600.0
_MORE_BYTES = 1 << 30
_SPARE_CHARACTERS, _TIMES = 1 << 22, 32
"""A rendering may be longer than its chat by this factor, beyond four million characters."""

Rendering: TypeAlias = tuple[Sequence[Any], Mapping[str, Any]]


class TemplateProcess:
    """Renders chats; its process starts with the first one and ends with this object.

    Args:
        tokenizer: With a chat template; later changes of it are not seen.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._owner = 0  # the process that has started it: a fork of ours must start its own
        self._child = 0
        self._pipe: Connection | None = None
        self._stop: Any = None

    def render(self, chats: Sequence[Rendering], what: str) -> list[str]:
        """What the template makes of some chats; one exchange with the process for all of them.

        Args:
            chats: Messages, and what else ``apply_chat_template`` takes.
            what: For messages, such as "data.jsonl, row 3: the chat template".

        Raises:
            DataError: It refuses the chat, takes more than ten seconds of processor time or a GiB,
                or writes far more than the chat.
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
        """The signal that has ended the process; 0 for none."""
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
                # Python 3.12 warns of threads: the child takes no lock that one could hold
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
    with suppress(ProcessLookupError, ChildProcessError):  # it has ended by itself
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(tokenizer: PreTrainedTokenizerBase, pipe: Connection) -> None:
    """Answer until the other side is gone; never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the run, which ends this process
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
    """Have the system end this process after some more processor time."""
    most = math.ceil(time.process_time()) + _SECONDS
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _limit_memory() -> None:
    """Allow some memory beyond what is in use, where the system says how much that is."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _rendered(tokenizer: PreTrainedTokenizerBase, request: bytes) -> list[str] | str:
    """The renderings, or why there are none."""
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
    except Exception as error:  # noqa: BLE001  a template is a program: it raises what it likes
        return f"refuses this chat ({one_line(str(error), 500) or type(error).__name__})"
    return texts
