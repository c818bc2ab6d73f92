"""The expected time of a diagnosis, from a few tokens, one forward pass and one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from okd_lightning.callbacks import KD
from okd_lightning.commands.diagnose.positions import measure_tokens
from okd_lightning.commands.diagnose.responses import ResponseGenerator, Responses
from okd_lightning.commands.diagnose.stages import (
    DIVERGENCES,
    GRADIENTS,
    RESPONSES,
    ROLLOUTS,
    STEPS,
    TRIALS,
)
from okd_lightning.commands.diagnose.steps import StepProbe
from okd_lightning.commands.diagnose.trials import ON_GIVEN, ON_OWN
from okd_lightning.records.batches import Example

MOST_STEPS = 4
"""Simulated steps of the drift."""

_FEW_TOKENS = 8
_GRADIENTS_OVER_STEP = 5.0
"""All estimators' gradients of a batch over a KD step of it; an estimate."""

_TIMED = 9
"""Forward and backward passes that time the kinds of steps."""


@dataclass(frozen=True)
class Plan:
    """The extent of a diagnosis.

    Attributes:
        rows: Responses of each kind.
        batches: Optimizer steps.
        per_step: Rows of each.
        size: Rows of a micro-batch.
        skipped: Stages that are left out.
    """

    rows: int
    batches: int
    per_step: int
    size: int
    skipped: frozenset[str]

    @property
    def num_rollouts(self) -> int:
        """Optimizer steps whose rollouts are needed."""
        if not {GRADIENTS, TRIALS} <= self.skipped:
            return self.batches
        return 0 if STEPS in self.skipped else min(self.batches, 1 + MOST_STEPS)

    def at_most(self, seconds: float, costs: Costs) -> Plan:
        """Return the plan with so few rows and batches that it is expected to take ``seconds``.

        Both are lowered by the same factor, to no less than 8 rows and 3 batches, and not raised.
        """
        fewest = replace(self, rows=min(self.rows, 8), batches=min(self.batches, 3))
        for percent in range(100, 0, -1):
            fitting = replace(
                self,
                rows=max(fewest.rows, self.rows * percent // 100),
                batches=max(fewest.batches, self.batches * percent // 100),
            )
            if sum(costs.of(fitting).values()) <= seconds:
                return fitting
        return fewest


@dataclass(frozen=True)
class Costs:
    """Measured seconds, from which those of any plan follow.

    Attributes:
        own: A response of the student, as long as allowed.
        teachers: A response of the teacher, likewise.
        forward: All measures of a micro-batch.
        step: Forward and backward passes of a micro-batch with KD.
        has_answers: Whether there are dataset responses.
    """

    own: float
    teachers: float
    forward: float
    step: float
    has_answers: bool

    def of(self, plan: Plan) -> dict[str, float]:
        """Return the expected seconds of every stage that is not left out."""
        passes, micro = -(-plan.rows // plan.size), -(-plan.per_step // plan.size)
        num_kinds = 3 if self.has_answers else 2
        num_methods = len(ON_OWN) + (len(ON_GIVEN) if self.has_answers else 0)
        looks = (num_kinds - 1) * passes * self.forward
        found = {
            RESPONSES: plan.rows * (self.own + self.teachers),
            DIVERGENCES: num_kinds * passes * self.forward,
            ROLLOUTS: plan.num_rollouts * plan.per_step * self.own,
            GRADIENTS: plan.batches * _GRADIENTS_OVER_STEP * self.step,
            STEPS: (MOST_STEPS * micro + _TIMED) * self.step,
            TRIALS: num_methods * (plan.batches * micro * self.step + looks) + looks,
        }
        return {name: seconds for name, seconds in found.items() if name not in plan.skipped}


def measured_costs(
    plan: Plan,
    steps: StepProbe,
    generator: ResponseGenerator,
    examples: Sequence[Example],
    given: Responses,
) -> Costs:
    """Measure a few tokens of both models, one forward pass, and one step.

    An upper bound: responses are assumed to have the maximum length.

    Args:
        plan: The extent.
        steps: For one step of KD.
        generator: For a few tokens of both models.
        examples: The measured prompts.
        given: Their dataset responses; where there are none, the few generated tokens are measured.
    """
    module, longest = steps.module, generator.max_new_tokens
    few = min(_FEW_TOKENS, longest)
    brief = replace(generator, max_new_tokens=few)
    own = brief.generate("student", examples)
    teachers = brief.generate("teacher", examples)
    rows = given if given.num_tokens else own
    batches = list(rows.batches(plan.size, module.device))
    batch = batches[len(batches) // 2]
    # rows without dataset responses are as short as the few tokens
    scale = 1.0 if given.num_tokens else longest / few
    whole = longest / few / len(examples)
    return Costs(
        own=own.seconds * whole,
        teachers=teachers.seconds * whole,
        forward=scale * _seconds(lambda: measure_tokens(module, [batch])),
        step=scale * steps.seconds(KD(), batch, repetitions=1),
        has_answers=bool(given.num_tokens),
    )


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
