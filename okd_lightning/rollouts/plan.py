"""Sources of the rows of an optimizer step: dataset, student, or teacher.

Owns the random choice of GKD (arXiv 2306.13649, Algorithm 1). It is a hash of (seed, step), so that
all micro-batches, ranks and resumed runs make the same choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from okd_lightning.engines.engine import RolloutEngine
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.records.batches import SOURCES, Source
from okd_lightning.records.noise import NoiseDomain, hashed_uniform


@dataclass(frozen=True)
class RolloutPlan:
    """The mix of sources in a run.

    Attributes:
        on_policy_fraction: Share of rows with on-policy samples, in [0, 1].
        off_policy_source: Source of the other rows.
        is_mixed_within_step: False: one random choice for all rows of an optimizer step (GKD).
            True: every step has both kinds, in that proportion.
        share_at: The share by optimizer step, if it changes during the run; None for a constant
            on_policy_fraction.
    """

    on_policy_fraction: float
    off_policy_source: Source = "dataset"
    is_mixed_within_step: bool = False
    share_at: Callable[[int], float] | None = None

    def share(self, step: int) -> float:
        """Return the share of rows with on-policy samples in optimizer step ``step``."""
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

    @property
    def is_varying(self) -> bool:
        """True if the share changes during the run."""
        return self.share_at is not None

    def assign(self, seed: int, step: int, num_prompts: int) -> tuple[Source, ...]:
        """Return the source of each prompt in optimizer step ``step``, counted over the run."""
        share = self.share(step)
        if share in (0.0, 1.0):  # nothing to choose
            return ("student" if share else self.off_policy_source,) * num_prompts
        if not self.is_mixed_within_step:
            is_student = hashed_uniform(NoiseDomain.DATA_SOURCE, seed, step) < share
            return ("student" if is_student else self.off_policy_source,) * num_prompts
        # a random offset: no position of the step is always the dataset's
        offset = float(hashed_uniform(NoiseDomain.DATA_SOURCE, seed, step))
        shares = [int(share * i + offset) for i in range(num_prompts + 1)]
        return tuple(
            "student" if b > a else self.off_policy_source for a, b in itertools.pairwise(shares)
        )


@dataclass(frozen=True)
class StagedPlan:
    """A sequence of plans, for methods that act in a part of the run.

    Attributes:
        stages: First optimizer step and plan of each stage; the first stage begins at 0.
    """

    stages: tuple[tuple[int, RolloutPlan], ...]

    @property
    def sources(self) -> frozenset[Source]:
        """All sources that can occur."""
        return frozenset(source for _, plan in self.stages for source in plan.sources)

    @property
    def is_varying(self) -> bool:
        """True if a share changes during the run."""
        return any(plan.is_varying for _, plan in self.stages)

    def assign(self, seed: int, step: int, num_prompts: int) -> tuple[Source, ...]:
        """Return the source of each prompt in optimizer step ``step``, counted over the run."""
        plan = next(plan for start, plan in reversed(self.stages) if start <= step)
        return plan.assign(seed, step, num_prompts)


def _common_fraction(asked: set[float]) -> float:
    """Return the common share; 0.5 for 0 and 1; else the only share strictly between 0 and 1."""
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
    """Return the plan for all terms of a run, by stages.

    Terms with equal on-policy shares get GKD's random choice a step. Terms with different shares
    (KD on the dataset with a method on rollouts) get both kinds of rows in every step, in the share
    that one of them has or half and half; each is counted on its own rows. The same holds for a
    term with ``mixes_rows``.

    Raises:
        ConfigError: No terms, steps in which none acts, terms that need both dataset and teacher
            responses or different shares, or a term that acts on no source of the plan.
    """
    if not terms:
        raise ConfigError(
            "there is nothing to train: no method is configured; add --method (SFT, KD, GKD, ...) "
            "or a method callback in trainer.callbacks"
        )
    edges = {0} | {edge for term in terms for edge in term.window if edge is not None}
    stages = []
    for step in sorted(edges):
        acting = [term for term in terms if term.acts_in(step)]
        if not acting:
            if all(term.window[1] is not None and term.window[1] <= step for term in terms):
                break  # the run should end here; DistillationModule raises if it does not
            raise ConfigError(
                f"no method acts from optimizer step {step} on; let one stage begin where the "
                "other ends"
            )
        stages.append((step, _plan_for_stage(acting)))
    return StagedPlan(tuple(stages))


def engine_of(terms: Sequence[Term], engine: RolloutEngine) -> RolloutEngine:
    """Return the run's engine: ``engine``, wrapped by the terms in order."""
    for term in terms:
        engine = term.wrap_engine(engine)
    return engine


def _plan_for_stage(terms: Sequence[Term]) -> RolloutPlan:
    asking = [term for term in terms if not term.follows_others]
    off_policy = {source for term in asking for source in term.sources if source != "student"}
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
