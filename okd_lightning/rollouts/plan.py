"""Who writes the rows of an optimizer step: the data set, the student, or the teacher.

Owns the deterministic coin of GKD (arXiv 2306.13649, Algorithm 1). The coin is a hash of (seed,
step), so that all micro-batches, ranks and resumed runs see the same one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from okd_lightning.engines.engine import Writer
from okd_lightning.engines.noise import NoiseDomain, hashed_uniform
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.records.batches import SOURCES, Source


@dataclass(frozen=True)
class RolloutPlan:
    """The mix of sources in a run.

    Attributes:
        on_policy_fraction: Share of rows that the student writes, in [0, 1].
        off_policy_source: Who writes the others.
        is_mixed_within_step: False: one coin an optimizer step decides for all its rows (GKD).
            True: every step holds both kinds, in that proportion.
        share_at: The share in an optimizer step, where it changes in the run; None where it is
            on_policy_fraction throughout.
    """

    on_policy_fraction: float
    off_policy_source: Source = "dataset"
    is_mixed_within_step: bool = False
    share_at: Callable[[int], float] | None = None

    def share(self, step: int) -> float:
        """Share of rows that the student writes in optimizer step ``step``."""
        return self.on_policy_fraction if self.share_at is None else self.share_at(step)

    @property
    def sources(self) -> frozenset[Source]:
        """All sources that can occur."""
        found: set[Source] = set()
        if self.on_policy_fraction > 0:
            found.add("student")
        if self.on_policy_fraction < 1:
            found.add(self.off_policy_source)
        return frozenset(found)

    def assign(self, seed: int, step: int, num_prompts: int) -> tuple[Source, ...]:
        """The source of each prompt of optimizer step ``step`` (counted over the whole run)."""
        share = self.share(step)
        if not self.is_mixed_within_step:
            is_student = hashed_uniform(NoiseDomain.DATA_SOURCE, seed, step) < share
            return ("student" if is_student else self.off_policy_source,) * num_prompts
        # a random offset: no position of the step is always the data set's
        offset = float(hashed_uniform(NoiseDomain.DATA_SOURCE, seed, step))
        shares = [int(share * i + offset) for i in range(num_prompts + 1)]
        return tuple(
            "student" if b > a else self.off_policy_source for a, b in itertools.pairwise(shares)
        )


@dataclass(frozen=True)
class StagedPlan:
    """Plans that follow one another, for methods that act in a part of the run.

    Attributes:
        stages: Each with the optimizer step that it begins at; the first begins at 0.
    """

    stages: tuple[tuple[int, RolloutPlan], ...]

    @property
    def sources(self) -> frozenset[Source]:
        """All sources that can occur."""
        return frozenset(source for _, plan in self.stages for source in plan.sources)

    def assign(self, seed: int, step: int, num_prompts: int) -> tuple[Source, ...]:
        """The source of each prompt of optimizer step ``step`` (counted over the whole run)."""
        plan = next(plan for start, plan in reversed(self.stages) if start <= step)
        return plan.assign(seed, step, num_prompts)


def _common_fraction(asked: set[float]) -> float:
    """What all agree on; half and half for 0 beside 1; else the one share that lies between."""
    if len(asked) <= 1:
        return next(iter(asked), 0.0)
    between = asked - {0.0, 1.0}
    if len(between) > 1:
        raise ConfigError(
            f"methods of one run ask for different on_policy_fractions ({sorted(between)}); give "
            "them the same"
        )
    return next(iter(between), 0.5)


def plan_for(terms: Sequence[Term]) -> StagedPlan:
    """The plan that serves all terms of a run, stage by stage.

    Terms that agree on the on-policy share get GKD's coin a step. Terms that disagree (KD on the
    data set beside a method on rollouts) get both kinds of rows in every step, in the share that
    one of them asks for or half and half, and each is counted on its own rows; so does a term that
    says that it compares both kinds (``mixes_rows``).

    Raises:
        ConfigError: No terms, steps in which none acts, terms that need both the data set's and the
            teacher's responses or different shares, or a term that acts on no source of the plan.
    """
    if not terms:
        raise ConfigError(
            "there is nothing to train: no method is configured; add --method (SFT, KD, GKD, ...) "
            "or a method callback in trainer.callbacks"
        )
    edges = {0} | {edge for term in terms for edge in term.window if edge is not None}
    stages = []
    for step in sorted(edges):
        acting = [term for term in terms if acts_in(term, step)]
        if not acting:
            if all(term.window[1] is not None and term.window[1] <= step for term in terms):
                break  # the run is expected to end here; DistillationModule says so if it does not
            raise ConfigError(
                f"no method acts from optimizer step {step} on; let one stage begin where the "
                "other ends"
            )
        stages.append((step, _plan_for_stage(acting)))
    return StagedPlan(tuple(stages))


def writer_of(terms: Sequence[Term], writer: Writer) -> Writer:
    """What writes a run's responses: ``writer``, within what its terms put around it, in order."""
    for term in terms:
        writer = term.wrap_writer(writer)
    return writer


def acts_in(term: Term, step: int) -> bool:
    """Whether a term takes part in optimizer step ``step``."""
    start, end = term.window
    return start <= step and (end is None or step < end)


def _plan_for_stage(terms: Sequence[Term]) -> RolloutPlan:
    off_policy = {source for term in terms for source in term.sources if source != "student"}
    if len(off_policy) > 1:
        raise ConfigError(
            "one term needs the data set's responses and another the teacher's (seq_kd); "
            "set seq_kd alike on all methods of a run"
        )
    varying = [term.share_at for term in terms if term.share_at is not None]
    if len(varying) > 1:
        raise ConfigError(
            "two methods change the student's share of rows while they train; leave one of them out"
        )
    asked = {term.on_policy_fraction for term in terms if term.on_policy_fraction is not None}
    plan = RolloutPlan(
        on_policy_fraction=_common_fraction(asked),
        off_policy_source=next(iter(off_policy), "dataset"),
        is_mixed_within_step=len(asked) > 1 or any(term.mixes_rows for term in terms),
        share_at=next(iter(varying), None),
    )
    for term in terms:
        if not plan.sources & set(term.sources):
            raise ConfigError(
                f"method {term.name} acts on rows from {' or '.join(term.sources)}, but this run "
                f"produces only rows from {' and '.join(s for s in SOURCES if s in plan.sources)}"
            )
    return plan
