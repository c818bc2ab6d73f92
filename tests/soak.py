"""Kills or stops runs, resumes them by one command, and compares them with runs left alone.

    python tests/soak.py --kills 20                 # GKD, OKD and OPD+, twenty kills each
    python tests/soak.py --kills 6 --ranks 2        # one rank of two is killed

Runs are the real command line in processes of their own, forked behind the imports. They end after
a number of epochs, and most are ended more than once: by SIGKILL and SIGTERM in turn, after some
time or at a marked place: before, within and behind rollouts, training steps, validations, the
writing of a checkpoint, and the writing of a row. The command that follows is the same every time
(``--ckpt_path last``). At the end the checkpoint (weights, optimizer, schedules, random streams,
callbacks), metrics.csv, rollouts.jsonl and the files in checkpoints/ are those of the run that was
left alone; wall-clock numbers are not compared.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from soak_marks import PLACES, Board, Kill, Marks, mark_everything

from okd_lightning.__main__ import main

NUM_EPOCHS = 4
TIMINGS = {"train/seconds", "train/tokens_per_second", "rollout/seconds"}
TIMINGS |= {"rollout/tokens_per_second"}
STOPPED = 128 + signal.SIGTERM
CLOCKS = {"seconds", "cpu_seconds", "rollout_seconds"}
RUN = Path("run")

METHODS = {
    "GKD": ["--method", "GKD", "--method.on_policy_fraction", "0.5"],
    "OKD": [
        *("--method", "OKD", "--method.on_policy_fraction", "0.5"),
        *("--method.online_module", "LoraConfig", "--method.online_module.r", "2"),
        *("--method.learning_rate", "0.01", "--method.warmup_steps", "3"),
    ],
    "OPDPlus": ["--method", "OPDPlus", "--method.divergence", "JensenShannon"],
}


def make_assets(folder: Path) -> None:
    """A student with dropout, a teacher, a tokenizer and data."""
    tokenizer = tiny.make_tokenizer()
    for name, model in (
        ("student", tiny.make_gpt2(3)),
        ("teacher", tiny.make_llama(2, tiny.TEACHER_ROWS)),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, rows in (("train", tiny.make_rows(22)), ("val", tiny.make_rows(6, seed=1))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(assets: Path, method: str, ranks: int) -> list[str]:
    """What is typed, at the start and after every kill."""
    devices = ["--trainer.devices", str(ranks)]
    devices += ["--trainer.strategy", "ddp"] if ranks > 1 else []
    return [
        *("fit", "--ckpt_path", "last", "--trainer.default_root_dir", str(RUN)),
        *("--model.student", str(assets / "student"), "--model.teacher", str(assets / "teacher")),
        *("--data.train", str(assets / "train.jsonl"), "--data.val", str(assets / "val.jsonl")),
        *("--data.batch_size", "2", "--data.global_batch_size", "4", "--data.val_rollouts", "3"),
        *("--data.max_prompt_length", "16", "--data.max_response_length", "8"),
        *("--data.prompts_per_rollout", "8"),
        *("--model.learning_rate", "3e-3", "--model.warmup_steps", "3"),
        *("--model.schedule", "cosine", "--trainer.max_epochs", str(NUM_EPOCHS)),
        *("--trainer.val_check_interval", "5", "--trainer.accelerator", "cpu", *devices),
        *("--trainer.enable_progress_bar", "false"),
        *("--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps", "2"),
        *("--trainer.callbacks.keep", "2"),
        *("--trainer.callbacks+=RolloutLog", "--trainer.callbacks.every_n_steps", "3"),
        *("--trainer.callbacks+=SampleTable", "--trainer.callbacks.every_n_steps", "4"),
        *("--trainer.callbacks+=HealthWarnings", "--trainer.callbacks.every_n_steps", "2"),
        *METHODS[method],
    ]


def fork(work: Path, argv: Sequence[str], environment: dict[str, str], kill: Kill | None) -> Any:
    """A process that types ``argv`` in ``work``: its id and its board."""
    board = Board()
    child = os.fork()
    if child:
        return child, board
    status = 99
    try:
        os.environ.update(environment)
        os.chdir(work)
        log = (work / f"log{environment.get('LOCAL_RANK', 0)}").open("ab")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)  # under pytest they are its own
        sys.stderr = os.fdopen(2, "w", closefd=False)
        warnings.resetwarnings()
        mark_everything(Marks(kill, board), board)
        status = main(argv)
    except BaseException:  # noqa: BLE001  (nothing may come back into the parent's code)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def attempt(work: Path, argv: Sequence[str], ranks: int, kill: Kill | None) -> Ended:
    """One try: all ranks are started, and one is killed if the run is not done before that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    victim = ranks - 1 if kill is None or kill.number % 2 else 0
    children = []
    for rank in range(ranks):
        environment = {"OMP_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children.append(fork(work, argv, environment, kill if rank == victim else None))
    child, board = children[victim]
    if kill is not None and kill.place is None:
        _signal_in_time(child, board, kill)
    is_stopped = kill is not None and kill.signal == signal.SIGSTOP
    died = time.monotonic()
    others = [other for other, _ in children if other != child]
    if is_stopped:
        statuses, seconds = _status_of(others), time.monotonic() - died
        os.kill(child, signal.SIGKILL)
        return Ended(*_status_of([child]), board.phase, statuses, seconds)
    (first,) = _status_of([child])
    died = time.monotonic()
    return Ended(first, board.phase, _status_of(others), time.monotonic() - died)


def _status_of(children: Sequence[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _signal_in_time(child: int, board: Board, kill: Kill) -> None:
    while not board.has_trained:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.005)
    time.sleep(kill.seconds)
    os.kill(child, kill.signal)


@dataclass(frozen=True)
class Ended:
    """How an attempt ended: the victim's status and phase, the others', and what they took."""

    status: int
    phase: str
    others: list[int]
    seconds: float


@dataclass
class Tally:
    """What happened to a method's runs."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    places: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: int = 0
    resumes: int = 0
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0


def draw_kill(draw: random.Random, number: int) -> Kill:
    """Every third by the clock, the others at places, phase after phase; every second a SIGTERM."""
    which = signal.SIGTERM if number % 2 else signal.SIGKILL
    if number % 3 == 2:
        return Kill(None, seconds=draw.uniform(0.0, 0.5), signal=which)
    phase = list(PLACES)[(number - number // 3) % len(PLACES)]
    return Kill(draw.choice(PLACES[phase]), number=draw.randint(1, 3), signal=which)


def soak(work: Path, assets: Path, method: str, ranks: int, num_kills: int, seed: int) -> Tally:
    """Kill until there were ``num_kills``; every run is finished and compared."""
    tally, draw = Tally(), random.Random(f"{seed} {method} {ranks}")
    truth = work / "truth"
    argv = command(assets, method, ranks)
    truth.mkdir(parents=True)
    ended = attempt(truth, argv, ranks, None)
    if ended.status or any(ended.others):
        return Tally(problems=[f"the run that is left alone failed: {_tail(truth)}"])
    tries = 0
    while tally.kills.total() < num_kills and not tally.problems:
        tally.runs += 1
        place = work / f"killed{tally.runs}"
        place.mkdir()
        while True:
            wanted = draw_kill(draw, tries) if tally.kills.total() < num_kills else None
            tries += 1
            ended = attempt(place, argv, ranks, wanted)
            if ended.status in (-signal.SIGKILL, STOPPED):
                tally.kills[ended.phase] += 1
                tally.places[wanted.place or "by the clock"] += 1
                tally.resumes += 1
                tally.slowest = max(tally.slowest, ended.seconds)
                tally.problems += _not_told(place, ended)
                continue
            if ended.status or any(ended.others):
                tally.problems.append(f"run {tally.runs}, {wanted}: {ended} {_tail(place)}")
            break
        tally.problems += differences(truth / RUN, place / RUN)
    return tally


def hang(work: Path, assets: Path, timeout: int) -> list[str]:
    """One rank of two stands still: the other must end when its time is over, and say why."""
    work.mkdir()
    strategy = ["--trainer.strategy", "DDPStrategy"]
    strategy += ["--trainer.strategy.timeout", f"0:00:{timeout:02d}"]
    argv = [*command(assets, "GKD", 2), *strategy]
    ended = attempt(work, argv, 2, Kill(None, seconds=0.2, signal=signal.SIGSTOP))
    print(f"a rank that stands still: the other ended {ended.seconds:.1f} s later, {ended}")
    is_said = "did not answer in time; this one stops" in _tail(work)
    is_in_time = timeout - 1 <= ended.seconds < timeout + 10
    return [] if ended.others == [1] and is_said and is_in_time else [_tail(work)]


def _not_told(folder: Path, ended: Ended) -> list[str]:
    """What is wrong with how the other ranks ended: by themselves, with a line that says why."""
    if not ended.others or ended.phase == "start":
        return []
    if ended.status == STOPPED:
        return [] if ended.others == [STOPPED] else [f"{ended}: {_tail(folder)}"]
    is_said = "another rank of this run has ended" in _tail(folder)
    return [] if ended.others == [1] and is_said else [f"{ended}: {_tail(folder)}"]


def _tail(folder: Path) -> str:
    return "\n".join(p.read_text(errors="replace")[-1500:] for p in sorted(folder.glob("log*")))


def differences(one: Path, other: Path) -> list[str]:
    """What two run folders differ in, but for the time it took."""
    found = []
    for name, read in (
        ("metrics.csv", read_metrics),
        ("rollouts.jsonl", Path.read_text),
        ("checkpoints/last.ckpt", read_checkpoint),
    ):
        first, second = read(one / name), read(other / name)
        found += [f"{other / name}: {what}" for what in unequal(first, second)][:3]
    files = [sorted(p.name for p in folder.glob("checkpoints/*")) for folder in (one, other)]
    return found + ([f"{other}: files {files}"] if files[0] != files[1] else [])


def read_metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if v and k not in TIMINGS} for row in rows]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Without the clock, and without the folder, which is another one's."""
    state = torch.load(path, weights_only=True)
    for name in (
        "current_score",
        "best_model_path",
        "kth_best_model_path",
        "dirpath",
        "last_model_path",
    ):
        state["callbacks"]["BestCheckpoint"].pop(name)
    best = state["callbacks"]["BestCheckpoint"].pop("best_k_models")
    state["best"] = {Path(name).name: float(value) for name, value in best.items()}
    counters = state["callbacks"]["Throughput"]
    state["callbacks"]["Throughput"] = {k: v for k, v in counters.items() if k not in CLOCKS}
    row = state["okd_lightning"]["row"] or {}
    state["okd_lightning"]["row"] = {k: v for k, v in row.items() if k not in TIMINGS}
    del state["okd_lightning"]["started_in"], state["okd_lightning"]["signature"]
    del state["loops"]  # counters of validation batches and the like, which Lightning resets
    return state


def unequal(one: Any, other: Any, at: str = "") -> list[str]:
    """Where two nested values differ; tensors bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{at} differs"]
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return [f"{at} has {sorted(map(str, one.keys() ^ other.keys()))} on one side alone"]
        return [what for key in one for what in unequal(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{at} has {len(one)} and {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [what for i, (a, b) in pairs for what in unequal(a, b, f"{at}[{i}]")]
    return [] if one == other else [f"{at} is {one!r} and {other!r}"]


def report(method: str, ranks: int, tally: Tally, seconds: float, say: Callable = print) -> None:
    """One paragraph a method."""
    phases = ", ".join(f"{phase} {count}" for phase, count in sorted(tally.kills.items()))
    say(
        f"{method}, {ranks} rank(s): {tally.kills.total()} kills ({phases}), {tally.resumes} "
        f"resumes, {tally.runs} runs, {'EQUAL' if not tally.problems else 'DIFFERENT'}, "
        f"{seconds:.0f} s"
        + (f"; the other rank ended {tally.slowest:.1f} s later at most" if ranks > 1 else "")
    )
    say("  at: " + ", ".join(f"{place} {n}" for place, n in sorted(tally.places.items())))
    for problem in tally.problems:
        say(f"  {problem}")


def run() -> int:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each method")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang", type=int, metavar="SECONDS", help="stop one rank, time the other")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_problems = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_assets(root)
        if options.hang:
            problems = hang(root / "hang", root, options.hang)
            print("\n".join(problems))
            return bool(problems)
        for method in options.methods:
            start = time.monotonic()
            tally = soak(root / method, root, method, options.ranks, options.kills, options.seed)
            report(method, options.ranks, tally, time.monotonic() - start)
            sys.stdout.flush()
            num_problems += len(tally.problems)
    return bool(num_problems)


if __name__ == "__main__":
    sys.exit(run())
