"""Warnings about failing runs, each with advice.

``Course`` holds the measures that distinguish a healthy run from a failing one, and compares them
with their thresholds; ``HealthWarnings`` collects them and warns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import ConfigError
from okd_lightning.records.batches import SOURCES, DistillBatch
from okd_lightning.rollouts import RolloutLoader
from okd_lightning.training.distilled_run import DistilledRun, distilled_run

_STUDENT = SOURCES.index("student")

EXTREME_LOG_RATIO = 10.0
"""Nats; the teacher finds a token e^10 = 22,000 times less (or more) likely than the sampler."""

_NUM_FIRST = 3
"""Number of first examinations whose mean is the initial value; no warnings before."""

_KEPT = 0.7
"""Share of the smoothed value that an examination keeps."""

_RELIEF = 0.8
"""Share of its threshold below which a measure counts as healthy again."""

_ADVICE = {
    "entropy": "the student's own responses have {now.entropy:.2f} nats per token, after "
    "{first.entropy:.2f} at the start{beside}: its entropy collapses, and it repeats the same text "
    "over and over. Lower --model.learning_rate; take a divergence that covers the teacher "
    "(JensenShannon, ForwardKL) in place of reverse KL; or also train on dataset responses "
    "(--method.on_policy_fraction below 1, or KD as a second method)",
    "length": "the student's responses have {now.mean_length:.0f} tokens on average, after "
    "{first.mean_length:.0f} at the start, and the longest that fits is {max_length}: they grow "
    "without bound. Also train on dataset responses, which end (--method.on_policy_fraction below "
    "1, or KD as a second method), lower --model.learning_rate, and check that no reward favours "
    "length",
    "truncated": "{now.truncated:.0%} of the student's responses are cut at {max_length} tokens, "
    "where {data_truncated:.0%} of the data's own are, so that the student learns from their first "
    "parts alone. "
    "Raise --data.max_response_length; where answers do not end (rollouts.jsonl), "
    "train on dataset responses first (--method SFT or KD)",
    "outliers": "for {now.outliers:.1%} of the tokens that the student samples, the teacher's "
    f"log-probability is more than {EXTREME_LOG_RATIO:g} nats away from the student's: a few "
    "tokens dominate the gradient. Set --method.max_log_ratio 5; check that the teacher reads "
    "prompts in the form of its own training (chat template, tokenizer: okd-lightning diagnose)",
}


@dataclass(frozen=True)
class VitalSigns:
    """One examination of an optimizer step's on-policy samples, over all ranks.

    Attributes:
        entropy: Nats per token: the mean of -log p of the sampled tokens.
        mean_length: Tokens that the student generated, per response.
        truncated: Share of the responses that were cut at the longest length.
        outliers: Share of the sampled tokens with an extreme log-ratio; 0 where none is measured.
    """

    entropy: float
    mean_length: float
    truncated: float
    outliers: float = 0.0


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of the checks; None disables a check. See ``HealthWarnings``."""

    entropy_share: float | None
    length_growth: float | None
    length_share: float
    truncated_share: float | None
    outlier_share: float | None


@dataclass(frozen=True)
class Surroundings:
    """Reference values for the measures of a run.

    Attributes:
        max_length: Longest response, in tokens.
        truncated: Share of the dataset responses that are cut there.
        excess: Reverse KL in nats per token: by how much less likely the teacher finds the
            student's responses than the student does; None where it is not measured.
    """

    max_length: int
    truncated: float = 0.0
    excess: float | None = None


class Course:
    """Measures over a run: initial, current (smoothed), and the problems found."""

    def __init__(self) -> None:
        self.num_looks = 0
        self.first: dict[str, float] = {}
        self.now: dict[str, float] = {}
        self.wrong: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state."""
        return {**vars(self), "first": dict(self.first), "now": dict(self.now)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        vars(self).update(state)

    def add(self, signs: VitalSigns) -> None:
        """Add one examination."""
        for name, value in vars(signs).items():
            if self.num_looks < _NUM_FIRST:
                known = self.first.get(name, 0.0)
                self.first[name] = known + (value - known) / (self.num_looks + 1)
            self.now[name] = _KEPT * self.now.get(name, value) + (1 - _KEPT) * value
        self.num_looks += 1

    def new_problems(self, limits: Thresholds, around: Surroundings) -> list[str]:
        """Return names of new problems; a problem that has disappeared can be returned again."""
        if self.num_looks < _NUM_FIRST:
            return []
        severity = dict(self._severities(limits, around))
        new = [name for name, value in severity.items() if value > 1 and name not in self.wrong]
        lasting = [name for name in self.wrong if severity.get(name, 0.0) > _RELIEF]
        self.wrong = lasting + new
        return new

    def _severities(self, limits: Thresholds, around: Surroundings) -> Iterator[tuple[str, float]]:
        """Yield each measure divided by its threshold: above 1 is a problem."""
        now, first = self.now, self.first
        if limits.entropy_share is not None and first["entropy"] > 0:
            shrunk = limits.entropy_share * first["entropy"] / max(now["entropy"], 1e-9)
            is_surer = around.excess is None or around.excess > now["entropy"]
            yield "entropy", shrunk if is_surer else 0.0
        if limits.length_growth is not None and first["mean_length"] > 0:
            grown = now["mean_length"] / (limits.length_growth * first["mean_length"])
            filled = now["mean_length"] / (limits.length_share * around.max_length)
            yield "length", min(grown, filled)
        if limits.truncated_share is not None:
            allowed = max(limits.truncated_share, min(1.0, around.truncated + 0.2))
            yield "truncated", now["truncated"] / allowed
        if limits.outlier_share is not None:
            yield "outliers", now["outliers"] / limits.outlier_share


class HealthWarnings(Callback):
    """Warnings of collapsing entropy, exploding length, cut responses and extreme log-ratios.

    Every so many optimizer steps it examines the step's on-policy samples and judges smoothed
    values over all ranks. It uses values that are computed anyway, with one collective call per
    examination. The initial value of a measure is the mean of the first three examinations. A
    warning comes once, and again if its cause has disappeared and come back. (For an adaptive
    teacher see ``TeacherDrift``.)

    Args:
        every_n_steps: Optimizer steps between two examinations.
        entropy_share: Warn when the samples' entropy is below this share of the initial one; where
            reverse KL is measured (by validation or a sampled method), it must also be above the
            entropy. null for off.
        length_growth: Warn when the mean length is above this multiple of the initial one, and
            above ``length_share``. null for off.
        length_share: Share of ``data.max_response_length`` for this warning.
        truncated_share: Warn when this share of responses is cut at ``data.max_response_length``
            and dataset responses are cut less often. null for off.
        outlier_share: Warn when this share of sampled tokens has |log teacher - log student| above
            10 nats, in methods whose advantage depends on it (OPD, OPDPlus). null for off.

    Raises:
        ConfigError: A number out of its range.
    """

    def __init__(
        self,
        every_n_steps: int = 5,
        entropy_share: float | None = 0.25,
        length_growth: float | None = 1.5,
        length_share: float = 0.8,
        truncated_share: float | None = 0.5,
        outlier_share: float | None = 0.03,
    ) -> None:
        if every_n_steps < 1:
            raise ConfigError(
                f"HealthWarnings: every_n_steps must be at least 1, got {every_n_steps}"
            )
        shares = {
            "entropy_share": entropy_share,
            "length_share": length_share,
            "truncated_share": truncated_share,
            "outlier_share": outlier_share,
        }
        for name, value in shares.items():
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"HealthWarnings: {name} must be in (0, 1], got {value}")
        if length_growth is not None and not length_growth > 1:
            raise ConfigError(f"HealthWarnings: length_growth must be above 1, got {length_growth}")
        self.every_n_steps = every_n_steps
        self.limits = Thresholds(
            entropy_share, length_growth, length_share, truncated_share, outlier_share
        )
        self.course = Course()
        self._next_step = 0
        self._excess: float | None = None  # reverse KL on on-policy samples, by validation
        self._sums: Tensor | None = None
        self._max_length = 0
        self._data_truncated = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the measures and the warnings so far."""
        return {
            "course": self.course.state_dict(),
            "next_step": self._next_step,
            "excess": self._excess,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them: a resumed run does not repeat its warnings."""
        self.course.load_state_dict(state_dict["course"])
        self._next_step, self._excess = state_dict["next_step"], state_dict["excess"]

    # ---------------------------------------------------------------- hooks

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Read the longest response length, and the share of dataset responses cut there."""
        self._sums, self._max_length = None, 0
        data, loader = trainer.datamodule, trainer.train_dataloader  # type: ignore[attr-defined]
        if not isinstance(data, RolloutDataModule) or not isinstance(loader, RolloutLoader):
            return
        run = distilled_run(pl_module)
        assert run is not None
        self._max_length = data.max_response_length
        stops = run.pair.eos_ids
        ends = [e.response_ids[-1] in stops for e in loader.examples if e.response_ids]
        self._data_truncated = 1 - sum(ends) / len(ends) if ends else 0.0

    def on_train_batch_start(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        batch: DistillBatch,
        batch_idx: int,
    ) -> None:
        """Add the micro-batch's rows, if an examination is due."""
        is_due = trainer.global_step >= self._next_step
        if is_due and self._max_length and batch.step_counts and batch.step_counts[_STUDENT]:
            sums = _sums_of(batch)
            self._sums = sums if self._sums is None else self._sums + sums

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: DistillBatch,
        batch_idx: int,
    ) -> None:
        """Examine the step, at its last micro-batch."""
        if self._sums is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        sums = self._sums
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        self._sums = None
        self._next_step = trainer.global_step + self.every_n_steps - 1
        tokens, nats, rows, cut = sums.tolist()
        if not rows or not tokens:
            return
        outliers, excess = _log_ratios(trainer, cast(DistilledRun, pl_module))
        self.course.add(VitalSigns(nats / tokens, tokens / rows, cut / rows, outliers))
        excess = self._excess if excess is None else excess
        around = Surroundings(self._max_length, self._data_truncated, excess)
        for name in self.course.new_problems(self.limits, around):
            rank_zero_warn(f"step {trainer.global_step}: {self._message(name, around)}")

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Keep the reverse KL on on-policy samples."""
        excess = trainer.callback_metrics.get("val/on_policy_reverse_kl")
        if excess is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._excess = float(excess)

    # ---------------------------------------------------------------- messages

    def _message(self, name: str, around: Surroundings) -> str:
        known = around.excess
        beside = "" if known is None else f" (reverse KL to the teacher: {known:.2f})"
        return _ADVICE[name].format(
            now=VitalSigns(**self.course.now),
            first=VitalSigns(**self.course.first),
            max_length=around.max_length,
            data_truncated=around.truncated,
            beside=beside,
        )


def _sums_of(batch: DistillBatch) -> Tensor:
    """Return [4]: sampled tokens of the student, their -log p, responses, and cut responses."""
    mask = batch.mask & (batch.source == _STUDENT)[:, None]
    nats = -batch.sampler_logprobs.where(mask, 0.0).sum()
    own = [code == _STUDENT for code in batch.source.tolist()]
    reasons = [r for r, is_own in zip(batch.stop_reasons, own, strict=True) if r and is_own]
    counted = nats.new_tensor([len(reasons), reasons.count("length")])
    return torch.stack([mask.sum().to(nats.dtype), nats, *counted])


def _log_ratios(trainer: lightning.Trainer, run: DistilledRun) -> tuple[float, float | None]:
    """Return the share of extreme log-ratios, and minus the mean, from sampled methods' logs."""
    logged = trainer.callback_metrics
    names = [term.name for term in run.acting]
    outliers = [logged.get(f"train/{name}_extreme_log_ratio") for name in names]
    means = [logged.get(f"train/{name}_log_ratio") for name in names]
    shares = [float(value) for value in outliers if value is not None]
    excess = [-float(value) for value in means if value is not None]
    return max(shares, default=0.0), max(excess, default=None)
