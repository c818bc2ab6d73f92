"""Pairs of options for one quantity: the last one given is used, and both record its value.

``model.learning_rate`` and the ``lr`` of ``model.optimizer`` are one quantity, ``weight_decay`` is
another. The parsed configuration is changed so that both options hold the value that is used, and
so do ``config.yaml`` and checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jsonargparse

from okd_lightning.commands.given_options import Layer
from okd_lightning.errors import ConfigError
from okd_lightning.training.optimizer_settings import DEFAULT_LEARNING_RATE, DEFAULT_WEIGHT_DECAY

_PAIRS = (
    ("learning_rate", "lr", DEFAULT_LEARNING_RATE),
    ("weight_decay", "weight_decay", DEFAULT_WEIGHT_DECAY),
)


def settle_rates(model: jsonargparse.Namespace, given: Sequence[Layer]) -> None:
    """Give ``model`` and its optimizer the same learning rate and weight decay.

    Args:
        model: The parsed ``model`` section; changed in place.
        given: Options of each config and, last, of the command line.

    Raises:
        ConfigError: One layer gives both options, with different values.
    """
    optimizer = model.get("optimizer")
    settings = getattr(optimizer, "init_args", None)
    for ours, theirs, default in _PAIRS:
        value = model.get(ours)
        if settings is not None and theirs in settings:
            value = _decided(model, settings, ours, theirs, given)
            settings[theirs] = default if value is None else value
        model[ours] = default if value is None else value


def _decided(
    model: jsonargparse.Namespace,
    settings: jsonargparse.Namespace,
    ours: str,
    theirs: str,
    given: Sequence[Layer],
) -> Any:
    option, own = f"model.{ours}", f"model.optimizer.{theirs}"
    for layer in reversed(given):
        is_ours, is_own = layer.get(option) is not None, layer.get(own) is not None
        if is_ours and is_own and model[ours] != settings[theirs]:
            raise ConfigError(
                f"--{option} {model[ours]:g} and --{own} {settings[theirs]:g} are two values for "
                "one quantity: leave one of them out"
            )
        if is_own:
            return settings[theirs]
        if is_ours:
            return model[ours]
    return model[ours]
