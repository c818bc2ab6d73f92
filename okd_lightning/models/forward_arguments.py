"""Arguments of a model's forward pass: those that it names, and those that it would ignore.

Most forward passes of transformers end in ``**kwargs``: an unknown argument is silently ignored,
and the result is wrong. Every keyword argument of this library goes through here.
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
    """Return the argument names of the model's forward pass.

    A model that passes its ``**kwargs`` on also accepts its backbone's names.

    Args:
        model: A causal LM; of a PEFT wrapper, the base model is read.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    names = _signature(_function(plain))
    if None in names and plain.base_model is not plain:
        names |= _signature(_function(plain.base_model))
    return frozenset(name for name in names if name is not None)


def forward_arguments(
    model: PreTrainedModel, needed: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments for one call of the model, without those that are None.

    Args:
        model: A causal LM, wrapped or not.
        needed: Arguments that change the result.
        wanted: Arguments that are left out if the model lacks them, with the same result.

    Raises:
        ModelError: The model lacks a needed argument.
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
    """Return the class's forward, past overrides that pass ``(*args, **kwargs)`` to the parent."""
    functions: list[Callable[..., Any]] = [
        vars(kind)["forward"] for kind in type(module).__mro__ if "forward" in vars(kind)
    ]
    return next((f for f in functions if "input_ids" in _signature(f)), functions[0])


@lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> frozenset[str | None]:
    """Return the parameter names, with None for ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(None if p.kind is p.VAR_KEYWORD else p.name for p in parameters)
