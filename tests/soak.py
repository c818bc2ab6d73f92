"""Kills or stops runs, resumes them by one command, and compares them with runs left alone.

    python tests/soak.py --kills 20                 # GKD, OKD and OPD+, twenty kills each
    python tests/soak.py --kills 6 --ranks 2        # one rank of two is killed
    python tests/soak.py --torchrun                 # SIGTERM to two ranks under torchrun

Runs are the real command line in processes of their own, forked after the imports. They end after
a number of epochs, and most are ended more than once: by SIGKILL and SIGTERM in turn, after some
time or at a marked place: before, within and after rollouts, training steps, validations, the
writing of a checkpoint, and the writing of a row. The command that follows is the same every time
(``--ckpt_path last``). At the end the checkpoint (weights, optimizer, schedules, random streams,
callbacks), metrics.csv, rollouts.jsonl and the files in checkpoints/ are those of the run that was
left alone; wall-clock numbers are not compared.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import shlex
import signal
import socket
import subprocess
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
from run_comparison import differences
from soak_marks import PLACES, Board, Kill, Marks, mark_everything

from okd_lightning.__main__ import main

NUM_EPOCHS = 4
STOPPED = 128 + signal.SIGTERM
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
    """Return the command that is typed at the start and after every kill."""
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
    """Start all ranks, and kill one if the run is not finished before."""
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
        return Ended(*_status_of([child]), board.phase, statuses, seconds, board.has_trained)
    (first,) = _status_of([child])
    died = time.monotonic()
    statuses = _status_of(others)
    return Ended(first, board.phase, statuses, time.monotonic() - died, board.has_trained)


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
    """End of an attempt: status and phase of the killed rank, of the others, and their seconds.

    A SIGTERM before the first step ends the process as it ends any other (status -15): the run has
    not begun, and nothing is lost.
    """

    status: int
    phase: str
    others: list[int]
    seconds: float
    has_trained: bool

    @property
    def is_kill(self) -> bool:
        """True if the signal ended it, and not the run itself."""
        before_training = self.status == -signal.SIGTERM and not self.has_trained
        return self.status in (-signal.SIGKILL, STOPPED) or before_training


@dataclass
class Tally:
    """Counts of the events in a method's runs."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    places: collections.Counter[str] = field(default_factory=collections.Counter)
    runs: int = 0
    resumes: int = 0
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0


def draw_kill(draw: random.Random, number: int) -> Kill:
    """Draw a kill: every third by the clock, else at a place by phase; every second a SIGTERM."""
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
            if ended.is_kill:
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
    """Stop one rank of two: the other must end at its time limit and name the cause."""
    work.mkdir()
    strategy = ["--trainer.strategy", "DDPStrategy"]
    strategy += ["--trainer.strategy.timeout", f"0:00:{timeout:02d}"]
    argv = [*command(assets, "GKD", 2), *strategy]
    ended = attempt(work, argv, 2, Kill(None, seconds=0.2, signal=signal.SIGSTOP))
    print(f"a rank that stands still: the other ended {ended.seconds:.1f} s later, {ended}")
    is_said = "did not answer in time; this one stops" in _tail(work)
    is_in_time = timeout - 1 <= ended.seconds < timeout + 10
    return [] if ended.others == [1] and is_said and is_in_time else [_tail(work)]


def torchrun(work: Path, assets: Path) -> list[str]:
    """Send SIGTERM to two ranks under torchrun; the command in stopped.json must finish the run."""
    truth, place = work / "truth", work / "stopped"
    argv = command(assets, "GKD", 2)
    for folder in (truth, place):
        folder.mkdir(parents=True)
    ended = attempt(truth, argv, 2, None)
    if ended.status or any(ended.others):
        return [f"the run that is left alone failed: {_tail(truth)}"]
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (place / "log").open("wb") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", *launcher, "-m", "okd_lightning", *argv],
            **{"cwd": place, "stdout": log, "stderr": log},
        )
        while run.poll() is None and not _has_trained(place / RUN):
            time.sleep(0.05)
        run.terminate()
        status = run.wait()
        record = json.loads((place / RUN / "stopped.json").read_text())
        print(f"torchrun ended with status {status}; stopped.json: {record}")
        words = shlex.split(record["resume"])
        resumed = subprocess.run(
            [sys.executable, "-m", "okd_lightning", *words[1:]],
            **{"cwd": place, "stdout": log, "stderr": log},
        )
    problems = differences(truth / RUN, place / RUN)
    if record["signal"] != "SIGTERM" or not record["step"] > 0 or not status:
        problems.append(f"not stopped by SIGTERM: {record}, status {status}")
    if resumed.returncode or (place / RUN / "stopped.json").exists():
        problems.append(f"{record['resume']} ended with status {resumed.returncode}")
    print(f"torchrun: {'EQUAL' if not problems else 'DIFFERENT'}")
    return [*problems, _tail(place)] if problems else []


def _has_trained(run: Path) -> bool:
    path = run / "metrics.csv"
    return path.is_file() and len(path.read_bytes().splitlines()) > 2


def _not_told(folder: Path, ended: Ended) -> list[str]:
    """Return faults in the other ranks' end: they end by themselves and log the cause."""
    if not ended.others or ended.phase == "start":
        return []
    if ended.status == STOPPED:
        return [] if ended.others == [STOPPED] else [f"{ended}: {_tail(folder)}"]
    is_said = "another rank of this run has ended" in _tail(folder)
    return [] if ended.others == [1] and is_said else [f"{ended}: {_tail(folder)}"]


def _tail(folder: Path) -> str:
    return "\n".join(p.read_text(errors="replace")[-1500:] for p in sorted(folder.glob("log*")))


def report(method: str, ranks: int, tally: Tally, seconds: float, say: Callable = print) -> None:
    """Print one paragraph per method."""
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
    parser.add_argument("--torchrun", action="store_true", help="SIGTERM to a real launcher")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_problems = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_assets(root)
        if options.torchrun:
            problems = torchrun(root / "torchrun", root)
            print("\n".join(problems))
            return bool(problems)
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
