"""A comparison's folder: its plan and the results of its runs.

``comparison.json`` names the contenders, the seeds and the shared settings. Every run has a folder
below ``runs/`` with ``result.json`` when it is finished or ``failure.json`` when it failed. A
killed comparison continues from there. Repeated with more contenders or seeds, it runs only the new
ones.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from okd_lightning.checkpoints.folder_lock import LOCK_FILES, folder_lock
from okd_lightning.checkpoints.signature import is_own, signature_of
from okd_lightning.commands.compare.budget import Budget
from okd_lightning.commands.compare.entries import (
    Entry,
    checked_label,
    checked_seed,
    checked_settings,
)
from okd_lightning.commands.config_trust import FLAG, foreign_parts, texts_in
from okd_lightning.commands.reports import RunResult
from okd_lightning.durable_files import read_json, require_writable, write_json
from okd_lightning.errors import ConfigError, OutputError

MARKER = ".comparison-run"
"""File in a run's folder that a comparison has made; only such folders may be removed."""

_MANIFEST = "comparison.json"
_RESULT = "result.json"
_FAILURE = "failure.json"


@dataclass(frozen=True)
class Plan:
    """Contenders, seeds and shared settings of a comparison.

    Attributes:
        entries: The contenders.
        seeds: Every contender runs with each of them.
        budget: Budget of every run; None where the config sets the length.
        configs: Shared by all runs, from the general to the special.
        options: Typed for all runs.
    """

    entries: tuple[Entry, ...]
    seeds: tuple[int, ...]
    budget: Budget | None
    configs: tuple[Mapping[str, Any], ...]
    options: tuple[str, ...]

    def arguments(self, entry: Entry, seed: int) -> list[str]:
        """Return one run's command line; typed options override a contender's own settings."""
        configs = [*self.configs, entry.config]
        return [
            *(word for c in configs for word in ("--config", yaml.safe_dump(dict(c)))),
            *self.options,
            *("--seed_everything", str(seed)),
            *(self.budget.options if self.budget is not None else ()),
        ]


@dataclass(frozen=True)
class RunFolder:
    """One run of a comparison, on disk.

    Attributes:
        entry: The contender.
        seed: The run's seed.
        path: The run's folder.
    """

    entry: Entry
    seed: int
    path: Path

    @property
    def name(self) -> str:
        """The run's name in headings."""
        return f"{self.entry.label}, seed {self.seed}"

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint from which an unfinished run continues; None without one."""
        path = self.path / "checkpoints" / "last.ckpt"
        return path if path.is_file() else None

    @property
    def result(self) -> RunResult | None:
        """The run's result; None where the run is not finished."""
        if not (self.path / _RESULT).is_file():
            return None
        record = read_json(self.path / _RESULT)
        # the history is popped before from_record reads the rest of the record
        return RunResult.from_record(record, record.pop("history"))

    @property
    def failure(self) -> str | None:
        """The error that stopped the run, if one did."""
        path = self.path / _FAILURE
        return str(read_json(path)["error"]) if path.is_file() else None

    @rank_zero_only
    def prepare(self) -> None:
        """Remove the record of the last failure, and the files of a run without a checkpoint.

        Raises:
            OutputError: The folder was not made by this comparison.
        """
        if self.checkpoint is None and self.path.exists():
            if self.path.is_symlink() or not (self.path / MARKER).is_file():
                raise OutputError(
                    f"{self.path} was not made by this comparison (it has no {MARKER}): move it "
                    "away, and repeat the command"
                )
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / MARKER).touch()
        (self.path / _FAILURE).unlink(missing_ok=True)

    @rank_zero_only
    def finish(self, result: RunResult) -> None:
        """Write the run's result, with every validation."""
        history = [point.to_record() for point in result.history]
        write_json(self.path / _RESULT, {**result.to_record(), "history": history})

    @rank_zero_only
    def fail(self, error: str) -> None:
        """Write the error that stopped the run."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / _FAILURE, {"error": error})


@contextmanager
def comparison_lock(path: Path) -> Iterator[None]:
    """Lock a comparison's folder; rank 0 does this for all ranks.

    Raises:
        FolderInUseError: Another comparison writes there.
        OutputError: The folder cannot be written.
    """
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield
        return
    require_writable(path, "--out")
    _refuse_foreign(path)
    with folder_lock(path, f"--out {str(path)!r}"):
        yield


class ComparisonFolder:
    """A comparison's folder, new or existing.

    Args:
        path: The folder.
        plan: This command's plan; contenders and seeds already in the folder are kept.
        is_trusted: Whether the user trusts the origin of the folder's files.

    Raises:
        ConfigError: The folder holds another comparison, or something else; or contenders that name
            code which is neither typed now nor the user's own.
        OutputError: The folder cannot be written.
    """

    def __init__(self, path: Path, plan: Plan, is_trusted: bool = False) -> None:
        self.path = path
        require_writable(path, "--out")
        known = self._known()
        if known is not None:
            if not is_trusted and not self._is_own(known):
                _check_contenders(path / _MANIFEST, known, plan)
            plan = _joined(path, known, plan)
        _refuse_foreign(path)
        self.plan = plan
        self._write_manifest()

    def runs(self) -> Iterator[RunFolder]:
        """Yield all runs, seed by seed, so that finished runs can be compared early."""
        for seed, entry in itertools.product(self.plan.seeds, self.plan.entries):
            yield RunFolder(entry, seed, self.path / "runs" / f"{entry.label}-seed{seed}")

    def results(self) -> list[RunResult]:
        """Return the results of all finished runs."""
        return [result for run in self.runs() if (result := run.result) is not None]

    @rank_zero_only
    def _write_manifest(self) -> None:
        record = _record(self.plan)
        write_json(self.path / _MANIFEST, {**record, "signature": signature_of(record)})

    def _is_own(self, known: Plan) -> bool:
        return is_own(_record(known), read_json(self.path / _MANIFEST).get("signature"))

    def _known(self) -> Plan | None:
        manifest = self.path / _MANIFEST
        if not manifest.is_file():
            return None
        try:
            record = read_json(manifest)
            return Plan(
                entries=tuple(
                    _entry(label, config, str(manifest))
                    for label, config in record["methods"].items()
                ),
                seeds=tuple(checked_seed(seed, str(manifest)) for seed in record["seeds"]),
                budget=Budget.parse(record["budget"]) if record["budget"] else None,
                configs=tuple(_section(config) for config in record["configs"]),
                options=tuple(_text(option) for option in record["options"]),
            )
        except ConfigError:
            raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{manifest} cannot be read ({' '.join(str(error).split())}): give --out another "
                "folder, or restore that file"
            ) from error


def _entry(label: Any, config: Any, where: str) -> Entry:
    """Return a contender of the manifest, checked like a typed one."""
    return Entry(checked_label(label, where), checked_settings(where, _section(config)))


def _section(config: Any) -> Mapping[str, Any]:
    if not isinstance(config, Mapping):
        raise TypeError(f"expected settings, found {config!r}")
    return config


def _text(option: Any) -> str:
    if not isinstance(option, str):
        raise TypeError(f"expected an option, found {option!r}")
    return option


def _refuse_foreign(path: Path) -> None:
    """Refuse a folder that has files but no comparison.

    Raises:
        ConfigError: The folder has such files.
    """
    names = {entry.name for entry in path.iterdir()} - LOCK_FILES
    if names and _MANIFEST not in names:
        raise ConfigError(f"--out {str(path)!r} holds files of something else; choose another")


def _record(plan: Plan) -> dict[str, Any]:
    return {
        "methods": {entry.label: entry.config for entry in plan.entries},
        "seeds": list(plan.seeds),
        "budget": None if plan.budget is None else str(plan.budget),
        "configs": list(plan.configs),
        "options": list(plan.options),
    }


def _check_contenders(manifest: Path, known: Plan, asked: Plan) -> None:
    """Refuse earlier contenders, not named in this command, that name foreign code or servers.

    Raises:
        ConfigError: There is one; the message names the first.
    """
    own = {entry.label: entry.config for entry in asked.entries}
    given = [*texts_in([dict(entry.config) for entry in asked.entries])]
    given += texts_in([list(asked.configs), list(asked.options)])
    for entry in known.entries:
        part = next(foreign_parts(entry.config, given), None)
        if part is not None and own.get(entry.label) != entry.config:
            raise ConfigError(
                f"{manifest} was not signed by you, and its contender {entry.label} names {part}: "
                f"name that contender in --methods yourself, choose another --out, or add {FLAG} "
                "if you trust its author"
            )


def _joined(path: Path, known: Plan, asked: Plan) -> Plan:
    """Return the plan with the contenders and seeds of both; all else has to be equal."""
    own = {entry.label: entry.config for entry in known.entries}
    differing = [
        f"{what} ({_short(before)} there, {_short(now)} here)"
        for what, before, now in (
            ("another budget", known.budget or "the config's", asked.budget or "the config's"),
            ("other configs", known.configs, asked.configs),
            ("other options", " ".join(known.options), " ".join(asked.options)),
            *(
                (f"other settings of {entry.label}", own[entry.label], entry.config)
                for entry in asked.entries
                if entry.label in own
            ),
        )
        if before != now
    ]
    if differing:
        raise ConfigError(
            f"--out {str(path)!r} holds another comparison: {'; '.join(differing)}; choose another "
            "folder, or repeat that comparison's command"
        )
    return Plan(
        entries=(*known.entries, *(e for e in asked.entries if e.label not in own)),
        seeds=(*known.seeds, *(s for s in asked.seeds if s not in known.seeds)),
        budget=known.budget,
        configs=known.configs,
        options=known.options,
    )


def _short(value: object) -> str:
    line = " ".join(str(value).split()) or "none"
    return line if len(line) <= 60 else f"{line[:57]}..."
