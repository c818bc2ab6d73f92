"""A causal LM as (hidden states, head): the form in which this library runs a model.

The loss layer projects only the positions that carry loss, so only the head's inputs are needed.
A hook on the head of the *whole* model takes them, which is correct for every wrapper (adapters,
prompt learning, sharding); calling the backbone is not.

Most forward passes of transformers end in ``**kwargs``: an unknown argument is silently ignored,
and the result is wrong. Every keyword argument of this library goes through ``forward_arguments``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.vocabulary import Vocabulary


def within_peft(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model within a PEFT wrapper, adapters included."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained(model: nn.Module | None) -> list[nn.Parameter]:
    """Return a model's trained parameters; none without a model."""
    return [] if model is None else [p for p in model.parameters() if p.requires_grad]


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Set ``model`` to eval mode (no dropout) within the context."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def named_arguments(model: PreTrainedModel) -> frozenset[str]:
    """Return the argument names of the model's forward pass.

    A model that passes its ``**kwargs`` on also accepts its backbone's names, and through a
    backbone that does so (of LLaVA) those of the language model.

    Args:
        model: A causal LM; of a PEFT wrapper, the base model is read.
    """
    plain = within_peft(model)
    found = frozenset[str | None]()
    outer: nn.Module | None = None
    for module in (plain, plain.base_model, plain.get_decoder()):
        if module is None or module is outer:
            continue
        names = _signature(_function(module))
        found |= names
        if None not in names:
            break
        outer = module
    return frozenset(name for name in found if name is not None)


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


@dataclass(frozen=True)
class LMHead:
    """Logits over the valid ids from hidden states: module, scale, soft-cap, vocabulary.

    Attributes:
        module: The model's output layer, with its bias and adapter.
        vocabulary: The valid ids, to which the logits are cut.
        scale: Factor on the logits (Cohere's ``logit_scale``, Falcon-H1's
            ``lm_head_multiplier``, one over Granite's ``logits_scaling``).
        softcap: Gemma's ``final_logit_softcapping`` c: logits become c·tanh(logits/c).
    """

    module: nn.Module
    vocabulary: Vocabulary
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, vocabulary: Vocabulary) -> LMHead:
        """Return the head of a model, with the transforms in its config."""
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(
            module=model.get_output_embeddings(),
            vocabulary=vocabulary,
            scale=_logit_scale(config),
            softcap=softcap or getattr(config, "logits_soft_cap", None),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., hidden] → [..., vocab] logits in float32, or float64 if the head's are."""
        return self.finish(self.module(hidden))

    def finish(self, raw: Tensor) -> Tensor:
        """Return logits over the valid ids from the outputs of ``module``."""
        logits = self.transform(raw)[..., : self.vocabulary.size]
        if self.vocabulary.invalid_ids:
            logits = self.vocabulary.cut(logits)
        return logits if logits.dtype == torch.float64 else logits.float()

    def transform(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap raw logits as the model does."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _logit_scale(config: PretrainedConfig) -> float:
    factor = getattr(config, "logit_scale", None) or 1.0
    factor *= getattr(config, "lm_head_multiplier", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type == "hyperclovax":  # Granite's option as a factor
        return factor * scaling
    if config.model_type == "minicpm3":  # applied before the head
        return factor
    return factor / scaling


def head_inputs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    images: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Run ``model`` over right-padded or packed rows and return its head's inputs.

    Args:
        model: A causal LM, wrapped or not.
        input_ids: [batch, seq].
        attention_mask: [batch, seq] True on real tokens; None for packed rows. Left out for a
            model without this argument: a causal model ignores padding on the right.
        position_ids: [batch, seq] of packed rows, from 0 in each; None for unpacked rows.
        images: Arguments for the images of the rows; see ``multimodal.image_arguments``.

    Returns:
        [batch, seq, hidden]; gradient flows to the model's parameters.

    Raises:
        ModelError: ``position_ids`` are set, and the model has no argument for them.
    """
    taken: list[Tensor] = []

    def take(hidden: Tensor) -> Tensor:
        taken.append(hidden)
        return hidden[:1, :1]  # the head then projects one position only

    with _before_the_head(model, take):
        model(
            **forward_arguments(
                model,
                {"input_ids": input_ids, "position_ids": position_ids, **(images or {})},
                {"attention_mask": attention_mask, "use_cache": False},
            )
        )
    (hidden,) = taken
    return hidden[:, -input_ids.shape[1] :]  # prompt learning prepends virtual tokens


def last_logits(
    model: PreTrainedModel,
    needed: Mapping[str, Any],
    wanted: Mapping[str, Any],
    last: Tensor | None = None,
) -> Tensor:
    """Run ``model`` and its own head at one position per row.

    Args:
        model: A causal LM, not wrapped.
        needed: Arguments that change the result; see ``forward_arguments``.
        wanted: Arguments that the model may lack.
        last: [rows] the column of each row; None for the last column.

    Returns:
        [rows, table] the head's output, with the model's own transforms.

    Raises:
        ModelError: The model lacks a needed argument.
    """

    def select(hidden: Tensor) -> Tensor:
        if last is None:
            return hidden[:, -1:]
        return hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]

    with _before_the_head(model, select):
        logits: Tensor = model(**forward_arguments(model, needed, wanted)).logits
    return logits[:, -1]


@contextmanager
def _before_the_head(model: PreTrainedModel, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context, apply ``change`` to the input of the head of ``model``."""

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        return (change(args[0]),)

    handle = model.get_output_embeddings().register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
