"""Three economies of every process of the test suite, which change no result.

* One thread, unless ``OMP_NUM_THREADS`` says otherwise: threads wait for each other on tiny
  tensors, and a forked process waits forever for those of the process that it comes from. Import
  this module before torch, which reads the variable.
* What is imported is exempt from garbage collection: 700,000 objects at every full pass. Objects of
  tests are collected, thirty times less often.
* ``os.fsync`` waits for no disk (5 to 10 ms per call): no test cuts the power, and files of a
  process that is killed are whole without it.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


def make_cheap() -> None:
    """Call it when all is imported; a forked process calls it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    os.fsync = _check_descriptor


def _check_descriptor(descriptor: int) -> None:
    """Raise ``OSError`` for a descriptor that is not open, as ``os.fsync`` does."""
    os.fstat(descriptor)
