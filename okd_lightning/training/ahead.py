"""Engines that generate the student's responses while it trains (``data.rollout_lag``).

Owns the choice of the engine, and the errors about engines and settings that do not support it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.engines import RolloutEngine, TransformersEngine
from okd_lightning.engines.ahead import AheadEngine, ThreadEngine
from okd_lightning.engines.vllm_requests import HostedEngine
from okd_lightning.engines.worker_process import WorkerProcess
from okd_lightning.errors import ConfigError
from okd_lightning.records.requests import Request, Rollout
from okd_lightning.training.distilled_run import DistilledRun
from okd_lightning.training.generation import student_engine, writing

_OPTION = "--data.rollout_lag"


def ahead_engine(module: DistilledRun, lag: int) -> Callable[[], AheadEngine]:
    """Return the function that starts the engine for rollouts ahead of training.

    Args:
        module: The module within a fit.
        lag: Rollout batches in flight, at least 1.

    Raises:
        ConfigError: Tools, shards, or an engine that cannot generate while the student trains.
    """
    pair = module.pair
    if pair.tool_rounds is not None:
        raise ConfigError(
            f"{_OPTION} {lag}: responses that call tools cannot be generated ahead of training; "
            f"leave {_OPTION} or --data.tools out"
        )
    if pair.placement is not None:
        raise ConfigError(
            f"{_OPTION} {lag}: the strategy keeps the student in shards, and another process needs "
            f"whole weights; leave {_OPTION} out, or give --trainer.strategy ddp where the student "
            "fits on each device"
        )
    engine = _present_engine(module)
    if isinstance(engine, HostedEngine):
        if not engine.host.is_server:
            raise ConfigError(
                f"{_OPTION} {lag}: {type(pair.engine).__name__} generates on the GPU that trains, "
                f"one after the other; leave {_OPTION} out, or give --model.engine VLLMServer"
            )
        return lambda: ThreadEngine(lambda request: _prepared(module, request))
    if type(engine) is not TransformersEngine:
        raise ConfigError(
            f"{_OPTION} {lag}: {type(engine).__name__} cannot generate ahead of training; the "
            f"built-in engine and VLLMServer can: leave {_OPTION} or this engine out"
        )
    return lambda: _worker(module, lag)


def _present_engine(module: DistilledRun) -> RolloutEngine:
    """Return the student's engine, in the number format of generation within the run."""
    with writing(module.pair, "student") as ((own,),):
        engine = student_engine(module, own)
        if isinstance(engine, TransformersEngine) and engine.dtype is None:
            kind = engine.model.device.type
            if torch.is_autocast_enabled(kind):  # by the Trainer's precision
                engine = replace(engine, dtype=torch.get_autocast_dtype(kind))
        return engine


def _prepared(module: DistilledRun, request: Request) -> Callable[[], Rollout]:
    """Give the server the student's weights; return the function that generates."""
    with writing(module.pair, "student") as ((own,),):
        engine = student_engine(module, own)
        assert isinstance(engine, HostedEngine)
        return engine.begin(request)


def _worker(module: DistilledRun, lag: int) -> AheadEngine:
    engine = _present_engine(module)
    assert isinstance(engine, TransformersEngine)
    device = _worker_device(module.trainer, engine.model.device)
    _say_where(module.trainer, engine.model.device, device)
    return WorkerProcess(engine, lag, device)


def _worker_device(trainer: lightning.Trainer, own: torch.device) -> torch.device:
    """Return a GPU that no rank of this machine trains on, if there is one, or the own device."""
    if own.type != "cuda":
        return own
    free = sorted(set(range(torch.cuda.device_count())) - set(trainer.device_ids))
    return torch.device("cuda", free[trainer.local_rank % len(free)]) if free else own


def _say_where(trainer: lightning.Trainer, own: torch.device, device: torch.device) -> None:
    threads = torch.get_num_threads()
    note = f"on {device}" + (", which trains too: both are slower" if device == own else "")
    if device.type == "cpu":
        note = f"with {threads} CPU thread{'s' if threads > 1 else ''}, as many as train"
        if threads > 1:
            note += "; OMP_NUM_THREADS divides the cores between both"
    each = " of its own for each rank" if trainer.world_size > 1 else ""
    rank_zero_info(f"rollouts are generated ahead of training in a process{each} {note}")
