"""Two economies of every process of the test suite, which change no result.

* What is imported is exempt from garbage collection: 700,000 objects at every full pass. Objects of
  tests are collected, thirty times less often.
* ``os.fsync`` waits for no disk (5 to 10 ms a call): no test cuts the power, and files of a process
  that is killed are whole without it.
"""

from __future__ import annotations

import gc
import os


def make_cheap() -> None:
    """Call it when all is imported; a forked process calls it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    os.fsync = _check_descriptor


def _check_descriptor(descriptor: int) -> None:
    """Raise ``OSError`` for a descriptor that is not open, as ``os.fsync`` does."""
    os.fstat(descriptor)
