"""Hostile inputs of every kind, each in a process of its own with limits: what holds, and what not.

    python tests/fuzz/fuzz_program.py [--kind rows] [--seed 0] [--show]

A case holds where it trains, or is refused by an error of okd_lightning that is one printable
line. It does not where another exception comes out ("unexpected"), a program in the input is run,
the process is killed, or a limit of time or memory is reached. A kind is one module, ``fuzz_KIND``,
with a function ``cases(seed)``; all that a case may touch is its own folder.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "fuzz"), str(TESTS), str(TESTS.parent)]

import lightning  # noqa: E402
import torch  # noqa: E402
from cli_workbench import make_tokenizer, save_model  # noqa: E402

from okd_lightning.callbacks import SFT  # noqa: E402
from okd_lightning.data import RolloutDataModule  # noqa: E402
from okd_lightning.errors import OKDLightningError  # noqa: E402
from okd_lightning.training.lightning_messages import keep_messages_printable  # noqa: E402
from okd_lightning.training.module import DistillationModule  # noqa: E402

KINDS = (
    *("rows", "templates", "model_folders", "server_answers", "configs"),
    *("valid_options", "invalid_options"),
)
SECONDS = 60.0
_CLOCK_FACTOR = 20
_MEMORY = 6 << 30
_MARK, _PRINTED = "RAN", "printed.txt"
_STEERING = ("\x1b", "\u202e", "\u2066", "\x07", "\x08")


class Bench:
    """Folder and student of a case.

    Attributes:
        folder: The case's own.
        student: A small model with a byte-level tokenizer, which cases copy and do not change.
    """

    def __init__(self, folder: Path, student: Path) -> None:
        self.folder, self.student = folder, student

    @property
    def mark(self) -> Path:
        """A program in an input that is run creates this file."""
        return self.folder / _MARK

    def write(self, name: str, content: str | bytes) -> Path:
        """A file in the case's folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def train(self, train: object = None, student: Path | None = None, **data: object) -> None:
        """Train one step of SFT on the CPU."""
        rows = train or [{"prompt": "ab=", "response": "ba"}] * 2
        module = DistillationModule(student=str(student or self.student), learning_rate=1e-3)
        given = {"max_prompt_length": 64, "max_response_length": 32, "batch_size": 2, **data}
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=self.folder,
            callbacks=[SFT()],
        )
        trainer.fit(module, RolloutDataModule(rows, **given))


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        name: What it is.
        act: Makes the input and gives it to okd_lightning.
    """

    name: str
    act: Callable[[Bench], None]


@dataclass(frozen=True)
class Outcome:
    """Result of a case: "trained", "refused", or the reason why it fails."""

    name: str
    verdict: str
    said: str = ""

    @property
    def holds(self) -> bool:
        """True for "trained" and "refused"."""
        return self.verdict in ("trained", "refused")


def run_case(case: Case, bench: Bench, seconds: float = SECONDS) -> Outcome:
    """Run a case in a fork, with limits."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _act(case, bench, writing)
    os.close(writing)
    said, is_late = _read(reading, child, seconds)
    os.close(reading)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    verdict, _, text = said.partition(" ")
    if bench.mark.exists():
        return Outcome(case.name, "program-run", said)
    if is_late:
        return Outcome(
            case.name,
            "hang",
            f"more than {seconds:g} seconds of the processor, or {_CLOCK_FACTOR} times that",
        )
    return Outcome(case.name, verdict or "killed", text)


def _read(pipe: int, child: int, seconds: float) -> tuple[str, bool]:
    """Return the child's output until it closes its end, and whether it took too long.

    A busy machine makes a child slow: it may take longer by the clock than on the processor.
    """
    os.set_blocking(pipe, False)
    end, said = time.monotonic() + _CLOCK_FACTOR * seconds, b""
    while time.monotonic() < end and _processor_seconds(child) < seconds:
        try:
            piece = os.read(pipe, 1 << 16)
        except BlockingIOError:
            time.sleep(0.02)
            continue
        if not piece:
            return said.decode(errors="replace"), False
        said += piece
    return "", True


def _processor_seconds(process: int) -> float:
    """Return the processor seconds of a process and its ended children, in user and system mode."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _act(case: Case, bench: Bench, pipe: int) -> None:
    """The child: never returns."""
    said = "killed"
    try:
        with Path("/proc/self/statm").open() as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
        os.chdir(bench.folder)
        printed = os.open(_PRINTED, os.O_WRONLY | os.O_CREAT)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        keep_messages_printable()
        said = _verdict(case, bench)
        text = Path(_PRINTED).read_text(errors="replace")
        if any(mark in text for mark in _STEERING):
            said = f"steers {text!r}"
    finally:
        os.write(pipe, said.encode(errors="replace")[: 1 << 15])
        os._exit(0)


def _verdict(case: Case, bench: Bench) -> str:
    try:
        case.act(bench)
    except OKDLightningError as error:
        text = str(error)
        return f"refused {text}" if text and text.isprintable() else f"not-clean {text!r}"
    except Exception as error:  # noqa: BLE001  that is what is looked for
        return f"unexpected {type(error).__name__}: {error}"
    return "trained"


def run_kind(
    kind: str, seed: int, folder: Path, names: Sequence[str] | None = None
) -> Iterator[Outcome]:
    """Run all cases of a kind, or some by name; return their outcomes."""
    student = folder / "student"
    if not student.exists():
        save_model(student, seed=1)
        make_tokenizer().save_pretrained(student)
    cases: list[Case] = importlib.import_module(f"fuzz_{kind}").cases(seed)
    doubled = [name for name, count in Counter(c.name for c in cases).items() if count > 1]
    assert not doubled, doubled
    wanted = [c for c in cases if names is None or c.name in names]
    for number, case in enumerate(wanted):
        yield run_case(case, Bench(folder / kind / str(number), student))


def main() -> int:
    """Print a line per kind, and every case that does not hold.

    Returns:
        1 where some case does not hold.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases to run")
    parser.add_argument("--show", action="store_true", help="what every case came to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    num_failed = 0
    for kind in options.kind or KINDS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = []
            for outcome in run_kind(kind, options.seed, Path(folder), options.only):
                outcomes.append(outcome)
                if options.show or not outcome.holds:
                    print(f"  {outcome.name}: {outcome.verdict} {outcome.said!r:.300}", flush=True)
        failed = [outcome for outcome in outcomes if not outcome.holds]
        num_failed += len(failed)
        counts = Counter(outcome.verdict for outcome in outcomes)
        numbers = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        print(
            f"{kind}: {len(outcomes)} cases, {len(outcomes) - len(failed)} hold ({numbers}), "
            f"{time.monotonic() - start:.0f} seconds",
            flush=True,
        )
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
