"""Choice of the layers that are dropped: the least loss of distillation on calibration rows.

Layers are dropped one after the other. In each round the remaining layers with the least block
influence (Men et al., ShortGPT, arXiv 2403.03853, Eq. 1, measured without the layers that are
dropped already) are tried, and the one is dropped whose absence raises KL(teacher‖student) least.
Two more sets are tried at the end: the layers of least influence in the whole model, and the
neighbouring ones with the least sum.

The KL is the loss that a student is then trained on. On the teacher's own samples it is the
expected rise of the cross-entropy. On a dataset the cross-entropy may fall where a layer that the
teacher uses is missing, so it is shown and does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from okd_lightning.models.shrinking.calibration import Calibration, Loss


@dataclass(frozen=True)
class DepthCandidate:
    """Some layers, and the model's loss without them.

    Attributes:
        dropped: Numbers of the layers, ascending.
        loss: The measurement.
    """

    dropped: tuple[int, ...]
    loss: Loss


Tell: TypeAlias = Callable[[DepthCandidate, bool], None]
"""Called with each measured candidate, and whether it is the best of its round so far."""


def choose_layers(
    calibration: Calibration, num_dropped: int, num_tried: int, tell: Tell
) -> DepthCandidate:
    """Return the layers to drop.

    Args:
        calibration: The model and its rows.
        num_dropped: Layers to drop, fewer than there are.
        num_tried: Layers that are tried in each round.
        tell: For progress messages.
    """
    start = DepthCandidate((), calibration.loss())
    chosen = start
    for _ in range(num_dropped):
        left = [n for n in range(len(calibration.layers)) if n not in chosen.dropped]
        tried = sorted(left, key=lambda n: chosen.loss.influences[n])[:num_tried]
        chosen = _best(calibration, [(*chosen.dropped, number) for number in tried], tell)
    others = _whole_sets(start.loss.influences, num_dropped) - {chosen.dropped}
    if num_dropped > 1 and others:
        other = _best(calibration, sorted(others), tell)
        chosen = min(chosen, other, key=lambda c: c.loss.forward_kl)
    return chosen


def without(calibration: Calibration, dropped: Iterable[int]) -> DepthCandidate:
    """Measure the model without some layers."""
    numbers = tuple(sorted(dropped))
    with calibration.layers.skipping(numbers):
        return DepthCandidate(numbers, calibration.loss())


def _best(calibration: Calibration, sets: Sequence[Sequence[int]], tell: Tell) -> DepthCandidate:
    best: DepthCandidate | None = None
    for numbers in sets:
        candidate = without(calibration, numbers)
        is_best = best is None or candidate.loss.forward_kl < best.loss.forward_kl
        tell(candidate, is_best)
        best = candidate if is_best or best is None else best
    assert best is not None
    return best


def _whole_sets(influences: Sequence[float], num: int) -> set[tuple[int, ...]]:
    """Return the layers of least influence, and the neighbouring ones with the least sum."""
    numbers = range(len(influences))
    least = tuple(sorted(sorted(numbers, key=lambda n: influences[n])[:num]))
    first = min(range(len(influences) - num + 1), key=lambda n: sum(influences[n : n + num]))
    return {least, tuple(range(first, first + num))}
