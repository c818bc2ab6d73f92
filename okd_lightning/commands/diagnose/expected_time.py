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
        batches: Optimizer steps.
        per_step: Rows of each.
        size: Rows of a micro-batch.
        skipped: Stages that are left out.
    """

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


def expected_seconds(
    plan: Plan,
    steps: StepProbe,
    generator: ResponseGenerator,
    examples: Sequence[Example],
    given: Responses,
) -> dict[str, float]:
    """Return the expected seconds of every stage that is not left out.

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
    forward = scale * _seconds(lambda: measure_tokens(module, [batch]))
    step = scale * steps.seconds(KD(), batch, repetitions=1)
    passes = -(-len(examples) // plan.size)
    micro = -(-plan.per_step // plan.size)
    num_kinds = 3 if given.num_tokens else 2
    num_methods = len(ON_OWN) + (len(ON_GIVEN) if given.num_tokens else 0)
    of_student = own.seconds * longest / few
    looks = (num_kinds - 1) * passes * forward
    found = {
        RESPONSES: of_student + teachers.seconds * longest / few,
        DIVERGENCES: num_kinds * passes * forward,
        ROLLOUTS: plan.num_rollouts * plan.per_step / len(examples) * of_student,
        GRADIENTS: plan.batches * _GRADIENTS_OVER_STEP * step,
        STEPS: (MOST_STEPS * micro + _TIMED) * step,
        TRIALS: num_methods * (plan.batches * micro * step + looks) + looks,
    }
    return {name: seconds for name, seconds in found.items() if name not in plan.skipped}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
