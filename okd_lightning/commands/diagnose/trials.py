"""A few optimizer steps of each of several methods, from the same weights and on the same rows.

Their result is the best available forecast of a comparison's order: it includes bias, noise and the
optimizer's reaction to both. The student's weights are restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from okd_lightning.callbacks import GKD, KD, OPD, SFT, DistillationCallback, OPDPlus
from okd_lightning.commands.diagnose.findings import Estimate, Trial
from okd_lightning.commands.diagnose.positions import Tokens, tokens_of
from okd_lightning.commands.diagnose.responses import Responses
from okd_lightning.commands.diagnose.steps import StepProbe
from okd_lightning.divergences import ForwardKL, ReverseKL
from okd_lightning.losses import ExactDivergence, Quantity
from okd_lightning.records.batches import DistillBatch

Steps: TypeAlias = Sequence[Sequence[DistillBatch]]
"""The micro-batches of every optimizer step."""

ON_GIVEN: Mapping[str, DistillationCallback] = {
    "SFT": SFT(),
    "KD": KD(),
    "KD, reverse KL": KD(divergence=ReverseKL()),
}
"""Methods that train on dataset responses."""

ON_OWN: Mapping[str, DistillationCallback] = {
    "GKD, forward KL": GKD(divergence=ForwardKL(), on_policy_fraction=1.0),
    "GKD, reverse KL": GKD(divergence=ReverseKL(), on_policy_fraction=1.0),
    "OPD": OPD(),
    "OPDPlus": OPDPlus(),
}
"""Methods that train on on-policy samples."""

_MEASURED: Mapping[str, Quantity] = {
    "forward_kl": ExactDivergence(ForwardKL()),
    "reverse_kl": ExactDivergence(ReverseKL()),
}


def run_trials(
    steps: StepProbe,
    on_given: Steps,
    on_own: Steps,
    held_out: Sequence[Responses],
    progress: Callable[[float, float], None] | None = None,
) -> tuple[Trial, ...]:
    """Take the same number of steps with every method, with the run's optimizer and learning rate.

    The student is in eval mode, there is no warm-up, and all rollouts were generated before.

    Args:
        steps: Probe that takes the steps.
        on_given: Steps on dataset responses; without them the methods that need them are left out.
        on_own: As many steps on on-policy samples.
        held_out: Responses whose divergences are measured before and after: dataset responses and
            the student's earlier samples. None of their prompts is trained on.
        progress: Called with the finished and all optimizer steps.
    """
    module, size = steps.module, max(len(batch) for batch in on_own[0])

    def look() -> dict[str, Tokens]:
        kinds = (kind for kind in held_out if kind.num_tokens)
        return {
            k.author: tokens_of(module, k.batches(size, module.device), _MEASURED) for k in kinds
        }

    before, found = look(), []
    groups = [(ON_GIVEN, on_given), (ON_OWN, on_own)]
    tried = [(name, method, own) for group, own in groups if own for name, method in group.items()]
    for number, (name, method, to_take) in enumerate(tried):
        with steps.kept():
            for step in steps.take(method, to_take):
                if progress is not None:
                    progress(number * len(to_take) + step, len(tried) * len(to_take))
            after = look()
        change = {
            f"{author}/{measure}": change_of(before[author], after[author], measure)
            for author in before
            for measure in _MEASURED
        }
        found.append(Trial(name, len(to_take), change))
    return tuple(found)


def change_of(before: Tokens, after: Tokens, measure: str) -> Estimate:
    """Return the mean change over tokens; its standard error is that of the paired differences.

    Args:
        before: Measures of some responses.
        after: Later measures of the same responses.
        measure: Name of the measure in both.
    """
    values = {measure: after.values[measure] - before.values[measure]}
    if not bool(torch.isfinite(values[measure]).all()):
        return Estimate(float("inf"), float("nan"))
    return Tokens(before.row, before.place, values).estimate(measure)
