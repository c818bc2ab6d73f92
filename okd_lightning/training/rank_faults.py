"""Readable errors for a rank whose collective call fails because another rank has ended.

gloo and NCCL each have their own messages, which name sockets instead of ranks.
"""

from __future__ import annotations

import re

import torch.distributed
from torch.multiprocessing import ProcessRaisedException

from okd_lightning.errors import LostRankError

_CLOSED = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|socket closed|remote process exited|"
    r"ncclremoteerror|ncclsystemerror|failed to recv|unable to connect|peer.*(died|closed)",
    re.IGNORECASE,
)
_OURS = re.compile(r"^okd_lightning\.errors\.\w+: (.+)$", re.MULTILINE)
_LATE = re.compile(r"timed? ?out|wait timeout|watchdog", re.IGNORECASE)
_COLLECTIVE = re.compile(r"gloo|nccl|c10d|store|barrier|distbackend|collective", re.IGNORECASE)


def message_of_process(error: BaseException) -> str | None:
    """Return the message of an error of ours that ended a process of ddp_fork or ddp_spawn.

    torch raises the whole traceback of that process as text.

    Args:
        error: Any error of a run.
    """
    if not isinstance(error, ProcessRaisedException):
        return None
    found = _OURS.findall(str(error))
    return found[-1] if found else None


def as_lost_rank(error: BaseException) -> LostRankError | None:
    """Return a readable error for a collective call that another rank does not complete.

    Args:
        error: Any error of a run.

    Returns:
        None for other errors.
    """
    text = str(error)
    is_backend = isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and bool(_COLLECTIVE.search(text))
    )
    if not is_backend:
        return None
    if _CLOSED.search(text):
        return LostRankError(
            "another rank of this run has ended (its own message says why; a killed one has none); "
            "this one stops too. Nothing before the last checkpoint is lost: resume with "
            "--ckpt_path last"
        )
    if _LATE.search(text):
        return LostRankError(
            "another rank of this run did not answer in time; this one stops. Resume with "
            "--ckpt_path last; where such a long wait is expected (for long rollouts), raise "
            "--trainer.strategy DDPStrategy --trainer.strategy.timeout 1:00:00 "
            "(30 minutes by default)"
        )
    return None
