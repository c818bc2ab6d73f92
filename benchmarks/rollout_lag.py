"""Rollouts ahead of training (``--data.rollout_lag``): the time that they save, and their price.

``speed``: seconds of on-policy runs with lags 0 and 1 in turn, generation and training on one
thread each, so that two cores are used; sizes are such that both take about as long. The built-in
engine generates, or with ``--server`` a vLLM server on a core of its own, which the given Python
starts. ``tolerance``: exact match and divergences during and after GKD with forward and reverse KL
on the quickstart's arithmetic and with its settings, with lags of several optimizer steps. There
the responses are generated in this process at the request: the weights of every response are those
of a run with a worker, and no time is measured.

    python benchmarks/rollout_lag.py --what speed [--steps 14] [--runs 3]
    python benchmarks/rollout_lag.py --what speed --server .venv-vllm/bin/python
    python benchmarks/rollout_lag.py --what tolerance [--lags 0 8 32] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from side_by_side import write_results
from transformers import AutoTokenizer, PreTrainedModel
from vllm_process import served

from okd_lightning.callbacks import GKD, SFT, ExactMatch, Throughput
from okd_lightning.commands.quickstart.recipe import TEACHER_DIR, TRAIN_FILE, VAL_FILE, Recipe
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import VLLMServer
from okd_lightning.engines.ahead import AheadEngine, Answer, Generated
from okd_lightning.training.lightning_messages import quiet
from okd_lightning.training.module import DistillationModule

MEASURES = ("val/forward_kl", "val/reverse_kl", "val/on_policy_reverse_kl", "val/exact_match")
AGES = ("rollout/effective_sample_size", "rollout/abs_log_ratio")
DIVERGENCES = {"forward KL": 0.0, "reverse KL": 1.0}
WARM_UP = 2
"""Steps of a timed run that are left out: imports, and the start of the process."""

BUILT_IN_ROWS, SERVER_ROWS = 16, 64
"""Rows of a timed step: generation takes about as long as training, in CPU seconds."""


class AtTheRequest(AheadEngine):
    """Generates in this process when a request is begun, which only changes the clock."""

    def __init__(self, module: DistillationModule) -> None:
        self._module = module

    def begin(self, request: Any) -> Answer:
        """See ``AheadEngine``."""
        answer = Answer()
        answer.finish(Generated(self._module.respond(request), 0.0))
        return answer

    def close(self) -> None:
        """Do nothing."""


class InProcess(DistillationModule):
    """A DistillationModule whose rollouts ahead of training start no process."""

    def ahead_engine(self, lag: int) -> Any:
        """Return the function that makes the engine."""
        del lag
        return lambda: AtTheRequest(self)


def trainer_of(steps: int, callbacks: list[Any], folder: str, **settings: Any) -> lightning.Trainer:
    """Return a quiet Trainer on the CPU."""
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        **settings,
    )


def data_of(lag: int, batch_size: int = 64, **settings: Any) -> RolloutDataModule:
    """Return the arithmetic problems of the quickstart."""
    defaults = {"max_prompt_length": 10, "max_response_length": 16, "val_rollouts": 128, "seed": 0}
    return RolloutDataModule(
        TRAIN_FILE, VAL_FILE, batch_size=batch_size, rollout_lag=lag, **{**defaults, **settings}
    )


class Clock(lightning.Callback):
    """Seconds after the second step, when all has started: all, of waiting, of generation, of CPU.

    ``other_cpu`` are the CPU seconds of the machine's other programs, which take cores away.

    Args:
        server: The server that generates; None for the built-in engine.
        server_cpu: Returns the CPU seconds of the server's processes so far.
    """

    def __init__(
        self, server: Transfers | None = None, server_cpu: Callable[[], float] = lambda: 0.0
    ) -> None:
        self.server = server
        self.found = {"generation": 0.0, "waited": 0.0, "worker_cpu": 0.0}
        self._server_cpu = server_cpu
        self._start = self._now()

    def _now(self) -> dict[str, float]:
        """Return the clocks."""
        return {
            "seconds": time.perf_counter(),
            "own_cpu": time.process_time(),
            "server_cpu": self._server_cpu(),
            "transfer": 0.0 if self.server is None else self.server.seconds,
            "machine_cpu": machine_cpu(),
        }

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the seconds of generation and of waiting for it."""
        if trainer.global_step >= WARM_UP:
            own = batch.metrics.get("rollout/seconds", 0.0)
            self.found["generation"] += own
            self.found["waited"] += batch.metrics.get("rollout/wait_seconds", own)
            self.found["worker_cpu"] += batch.metrics.get("rollout/worker_cpu_seconds", 0.0)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Start the clocks after the second step, and read them after later ones."""
        now = self._now()
        if trainer.global_step == WARM_UP:
            self._start = now
        self.found |= {name: now[name] - start for name, start in self._start.items()}


class Transfers(VLLMServer):
    """VLLMServer that adds up the seconds of giving the server new weights."""

    seconds = 0.0

    @contextmanager
    def holding(self, model: PreTrainedModel, label: str, num_rows: int) -> Iterator[None]:
        """See ``VLLMServer``."""
        start = time.perf_counter()
        with super().holding(model, label, num_rows):
            self.seconds += time.perf_counter() - start
            yield


def speed(steps: int, runs: int, server: str | None, folder: str) -> Iterator[dict[str, float]]:
    """Yield the seconds of runs with both lags, in turn, on the built-in engine or a server."""
    config = Recipe(hidden_size=512, num_layers=4).student_config
    if server is None:
        for lag in (0, 1) * runs:
            yield timed(lag, steps, config, Clock(), folder)
        return
    config |= {"tie_word_embeddings": False}  # vLLM keeps a tied head on CPUs: docs/vllm.md
    own, other = sorted(os.sched_getaffinity(0))[:2]
    module = DistillationModule(config, tokenizer=str(TEACHER_DIR))
    module.configure_model()
    assert module.student is not None
    module.student.save_pretrained(Path(folder) / "student")
    AutoTokenizer.from_pretrained(TEACHER_DIR).save_pretrained(Path(folder) / "student")
    with served(server, Path(folder) / "student", other) as (url, cpu_seconds):
        os.sched_setaffinity(0, {own})
        for number, lag in enumerate((0, 1) * runs):
            engine = Transfers(url, str(Path(folder) / f"weights{number}"))
            yield timed(lag, steps, config, Clock(engine, cpu_seconds), folder)


def timed(
    lag: int, steps: int, config: dict[str, Any], clock: Clock, folder: str
) -> dict[str, float]:
    """Train, and return the clock's numbers with the machine's load."""
    lightning.seed_everything(0, verbose=False)
    module = DistillationModule(
        config, str(TEACHER_DIR), tokenizer=str(TEACHER_DIR), engine=clock.server
    )
    rows = BUILT_IN_ROWS if clock.server is None else SERVER_ROWS
    data = data_of(lag, batch_size=rows, val_rollouts=0, samples_per_prompt=2)
    trainer_of(steps, [GKD(0.0, 1.0), Throughput(), clock], folder).fit(module, data)
    own = ("own_cpu", "worker_cpu", "server_cpu")
    clock.found["other_cpu"] = clock.found.pop("machine_cpu") - sum(clock.found[n] for n in own)
    rounded = {name: round(value, 2) for name, value in clock.found.items()}
    return {"lag": lag, "steps": steps - WARM_UP, **rounded, "load": round(os.getloadavg()[0], 1)}


def machine_cpu() -> float:
    """Return the CPU seconds that all cores have been busy so far (Linux)."""
    user, nice, system, _, _, *others = (
        Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")


def optimization(learning_rate: float) -> dict[str, Any]:
    """Return the quickstart's settings of the optimizer."""
    recipe = Recipe()
    return {
        "tokenizer": str(TEACHER_DIR),
        "learning_rate": learning_rate,
        "weight_decay": recipe.weight_decay,
        "warmup_steps": recipe.warmup_steps,
        "schedule": "cosine",
    }


def warm_student(seed: int, folder: str) -> PreTrainedModel:
    """Return the quickstart's student after SFT from random weights."""
    recipe = Recipe()
    lightning.seed_everything(seed, verbose=False)
    rate = recipe.warm_learning_rate
    module = DistillationModule(recipe.student_config, **optimization(rate))
    trainer = trainer_of(recipe.warm_steps, [SFT()], folder, limit_val_batches=0)
    trainer.fit(module, data_of(0, seed=seed))
    assert module.student is not None
    return module.student


class Curve(lightning.Callback):
    """Measures at every validation within a fit, by step."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the measures."""
        logged = {n: float(trainer.callback_metrics[n]) for n in MEASURES}
        self.found.append({"step": trainer.global_step, **logged})


def tolerance(
    steps: int, lags: list[int], seeds: list[int], folder: str
) -> Iterator[dict[str, Any]]:
    """Yield the measures during and after training, by seed, divergence and lag."""
    for seed in seeds:
        warm = warm_student(seed, folder)
        for lag, (name, beta) in itertools.product(lags, DIVERGENCES.items()):
            lightning.seed_everything(seed, verbose=False)
            pair = copy.deepcopy(warm), str(TEACHER_DIR)
            module = InProcess(*pair, **optimization(Recipe().learning_rate))
            curve, start = Curve(), time.process_time()
            callbacks = [GKD(beta, 1.0), ExactMatch(), curve, ages := Ages()]
            every = {"val_check_interval": steps // 2, "check_val_every_n_epoch": None}
            trainer_of(steps, callbacks, folder, **every).fit(module, data_of(lag, seed=seed))
            yield {
                "seed": seed,
                "divergence": name,
                "lag": lag,
                **ages.means(),
                "curve": curve.found,
                "cpu_seconds": round(time.process_time() - start, 1),
            }


class Ages(lightning.Callback):
    """Means of the measures of the samples' age over the steps with a lag."""

    def __init__(self) -> None:
        self._found: dict[str, list[float]] = {name: [] for name in AGES}

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Keep this step's measures, if there are any."""
        for name in AGES:
            if name in trainer.callback_metrics:
                self._found[name].append(float(trainer.callback_metrics[name]))

    def means(self) -> dict[str, float]:
        """Return the means."""
        return {n: statistics.fmean(own) for n, own in self._found.items() if own}


def main() -> None:
    """Run the parts that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--what", nargs="+", default=["speed", "tolerance"])
    parser.add_argument("--steps", type=int, help="default: 14 of speed, 600 of tolerance")
    parser.add_argument("--runs", type=int, default=3, help="of speed, with each lag")
    parser.add_argument("--server", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--lags", nargs="+", type=int, default=[0, 8, 32])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="results; parts of other runs are kept")
    options = parser.parse_args()
    quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the server too
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "speed": lambda: speed(options.steps or 14, options.runs, options.server, folder),
            "tolerance": lambda: tolerance(
                options.steps or Recipe().method_steps, options.lags, options.seeds, folder
            ),
        }
        for name in options.what:
            rows = []
            for row in parts[name]():
                print(json.dumps(row), flush=True)
                rows.append(row)
            if options.out is not None:
                label = f"{name} with a server" if name == "speed" and options.server else name
                write_results("rollout_lag", earlier(options.out) | {label: rows}, options.out)


def earlier(path: Path) -> dict[str, Any]:
    """Return the parts that a file of results has from other runs."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    found.pop("machine", None)
    return found


if __name__ == "__main__":
    main()
