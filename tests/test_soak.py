"""A sample of the kills of ``make soak``, in separate processes.

Frozen here: runs that are killed with SIGKILL and resumed by the same command end as those that
were left alone, also where one rank of two is killed and the other ends by itself; what gloo and
NCCL say then is told from other errors.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import soak
import torch
from forked import type_command
from torch.multiprocessing import ProcessRaisedException

from okd_lightning.training.rank_faults import as_lost_rank, message_of_process


@pytest.mark.parametrize("options", [["--kills", "3"], ["--kills", "1", "--ranks", "2"]])
def test_killed_runs_end_like_the_others(options: list[str], tmp_path: Path) -> None:
    argv = ["--methods", "GKD", "--seed", "1", *options]
    done = type_command(argv, tmp_path, program=soak.run, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{options[1]} kills" in done.stdout
    assert "EQUAL" in done.stdout


GLOO = "[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3456"
LATE = "[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv operation"
OTHERS = [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TimeoutError("timed out")]


@pytest.mark.parametrize("error", [RuntimeError(GLOO), torch.distributed.DistNetworkError(GLOO)])
def test_a_lost_rank(error: Exception) -> None:
    assert "another rank of this run has ended" in str(as_lost_rank(error))


def test_a_late_rank() -> None:
    assert "--trainer.strategy.timeout" in str(as_lost_rank(RuntimeError(LATE)))


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors(error: Exception) -> None:
    assert as_lost_rank(error) is None


TRACEBACK = """
-- Process 1 terminated with the following error:
Traceback (most recent call last):
  File "data.py", line 3, in read
KeyError: 'x'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "data.py", line 5, in read
okd_lightning.errors.DataError: rows.jsonl, row 2: fill or delete it
"""


def test_an_error_of_a_forked_rank_is_its_message():
    found = message_of_process(ProcessRaisedException(TRACEBACK, 1, 123))
    assert found == "rows.jsonl, row 2: fill or delete it"
    for error in (ProcessRaisedException("KeyError: 'x'", 1, 123), RuntimeError(TRACEBACK)):
        assert message_of_process(error) is None
