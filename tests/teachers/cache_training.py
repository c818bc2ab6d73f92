"""Short runs from a teacher's cache, and the live ones that they must equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from okd_lightning.teachers import CachedTeacher

ROWS, VAL = tiny.make_rows(22), tiny.make_rows(6, seed=2)
ALL = tiny.NUM_IDS


def sgd(parameters):
    """Plain SGD; Adam would amplify the cache's rounding where a gradient is close to zero."""
    return torch.optim.SGD(parameters, lr=0.1)


def train(root, make_module, methods, k=None, cache=None, rows=ROWS, dtype="float32", **settings):
    """A recorder and the module; from a cache where k is given."""
    torch.manual_seed(5)
    own = {"optimizer": sgd, "dtype": "float64", **settings.pop("model", {})}
    if k is not None:
        own["kind"] = lambda teacher: CachedTeacher(teacher, str(cache), k, dtype)
    module = make_module(**own)
    return tiny.fit(root, module, methods, rows, **settings), module


def check_same(found, expected, loss: float, gradient: float) -> None:
    (recorder, module), (live, live_module) = found, expected
    assert len(recorder.losses) == len(live.losses) > 3
    for own, other in zip(recorder.losses, live.losses, strict=True):
        assert own == pytest.approx(other, rel=2 * loss, abs=2 * loss)  # packed another way
    distances = [
        tiny.distance(own, other)
        for own, other in zip(recorder.gradients, live.gradients, strict=True)
    ]
    assert distances[0] < gradient
    assert max(distances) < 30 * gradient, distances  # roundings that the weights have taken in
    assert tiny.distance(tiny.weights(module), tiny.weights(live_module)) < 10 * gradient


def entries(cache: Path) -> set[str]:
    """The whole entries of a cache, by name."""
    return {path.parent.name for path in cache.glob("*/index.json")}
