"""Arguments of a model's forward pass: which ones it names, and which it would silently swallow.

Most forward passes of transformers end in ``**kwargs``: an argument that nobody reads is no error
there, and the model computes something else than what was asked for. Everything that this library
passes by name goes through here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from okd_lightning.errors import ModelError


def named_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Names in the signature of the model's forward pass.

    A head that hands its ``**kwargs`` on names what its backbone names too.

    Args:
        model: A causal LM; of a PEFT wrapper its base is asked, which gets the arguments.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    names = _signature(_function(plain))
    if None in names and plain.base_model is not plain:
        names |= _signature(_function(plain.base_model))
    return frozenset(name for name in names if name is not None)


def forward_arguments(
    model: PreTrainedModel, needed: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments for one call of the model; what is None is left out.

    Args:
        model: A causal LM, wrapped or not.
        needed: Without these the result would be another one.
        wanted: Left out where the model does not name them, because its result is the same.

    Raises:
        ModelError: The model does not name something that is needed.
    """
    names = named_arguments(model)
    given = {name: value for name, value in needed.items() if value is not None}
    if unknown := sorted(given.keys() - names):
        raise ModelError(
            f"the forward pass of {type(model).__name__} has no argument {unknown[0]}; use a model "
            "whose forward pass reads it"
        )
    known = {k: v for k, v in wanted.items() if v is not None and k in names}
    return {**given, **known}


def _function(module: nn.Module) -> Callable[..., Any]:
    """The class's function, past wrappers that hand ``(*args, **kwargs)`` on to the class above."""
    functions: list[Callable[..., Any]] = [
        vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)
    ]
    return next((f for f in functions if "input_ids" in _signature(f)), functions[0])


@lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> frozenset[str | None]:
    """Names, and None where the rest is taken as keywords."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(None if p.kind is p.VAR_KEYWORD else p.name for p in parameters)
