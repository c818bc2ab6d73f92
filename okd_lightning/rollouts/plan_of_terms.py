"""The plan and the engine of a run, from the terms of its methods."""

from __future__ import annotations

from collections.abc import Sequence

from okd_lightning.engines.engine import RolloutEngine
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Term
from okd_lightning.records.batches import SOURCES
from okd_lightning.rollouts.plan import RolloutPlan, StagedPlan


def _common_fraction(asked: set[float]) -> float:
    """Return the common share; 0.5 for 0 and 1; else the only share strictly between 0 and 1."""
    if len(asked) <= 1:
        return next(iter(asked), 0.0)
    between = asked - {0.0, 1.0}
    if len(between) > 1:
        raise ConfigError(
            f"methods of one run have different on_policy_fractions ({sorted(between)}); give "
            "them the same"
        )
    return next(iter(between), 0.5)


def plan_for(terms: Sequence[Term]) -> StagedPlan:
    """Return the plan for all terms of a run, by stages.

    Terms with equal on-policy shares get GKD's random choice per step. Terms with different shares
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
            "set the same seq_kd on all methods of a run"
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
