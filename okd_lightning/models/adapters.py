"""PEFT adapters on models in memory: a new one on a student, or one that a model already has.

A ``PeftModel`` is used as the model inside it, with the adapter's layers in place, as after
``add_adapter``. As a student its adapter is trained; as a teacher it is merged into a copy of its
base layers.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ConfigError, ModelError
from okd_lightning.models.deferred import stand_ins
from okd_lightning.models.merging import merge_adapters, unfit_adapter
from okd_lightning.models.multimodal import modules_outside_language
from okd_lightning.models.sources import ModelArgument, ModelSource, first_line
from okd_lightning.models.weight_checks import is_quantised

_MAKERS = {
    *(torch.ops.aten.empty, torch.ops.aten.zeros, torch.ops.aten.ones, torch.ops.aten.full),
    *(torch.ops.aten.randn, torch.ops.aten.rand),
}
_MOST_TIMES, _SPARE_NUMBERS = 8, 1 << 26
"""Most numbers in an adapter: a multiple of the model's, or 256 MiB if that is more."""


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of a model that have PEFT adapters."""
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return [module for module in model.modules() if isinstance(module, kinds)]


@dataclass(frozen=True)
class GivenPair:
    """Student and teacher as the user passed them, each ``PeftModel`` as the model inside it.

    Attributes:
        student: Location, config or model.
        teacher: Location, config or model; None without a teacher.
        adapter: The student's trained adapter; None to train its own weights.
        has_adapter: True if the student already has that adapter.
    """

    student: ModelSource
    teacher: ModelSource | None
    adapter: PeftConfig | None
    has_adapter: bool

    @classmethod
    def of(
        cls,
        student: ModelArgument,
        teacher: ModelArgument | None,
        adapter: PeftConfig | None,
        others: Sequence[ModelSource] = (),
    ) -> GivenPair:
        """Read the user's arguments; ``others`` are further teachers.

        Raises:
            ConfigError: One object as student and teacher, a second adapter for a student, or
                an argument that is not a model.
            ModelError: A ``PeftModel`` of prompt learning.
        """
        own = model_source(student, "student")
        other = None if teacher is None else model_source(teacher, "teacher")
        if isinstance(own, PreTrainedModel) and any(own is one for one in (other, *others)):
            raise ConfigError(
                "student and teacher are the same object: the teacher is frozen, so the student "
                "would not train; load it twice, or give FrozenSelf() as the teacher"
            )
        carried = _carried_adapter(own)
        if adapter is not None and carried is not None:
            raise ConfigError(
                "the student is a model with an adapter, and model.student_adapter asks for "
                "another one: leave student_adapter out to train the one it has, or give "
                "peft_model.merge_and_unload() as the student"
            )
        return cls(own, other, adapter or carried, carried is not None)


def model_source(source: object, side: str) -> ModelSource:
    """Return the model inside a ``PeftModel``, with the adapter's layers; a path as text.

    Prompt learning is refused: it is in the wrapper, not in the model's layers.

    Raises:
        ConfigError: ``source`` is neither a location, a config, a model nor a ``PeftModel``.
        ModelError: A ``PeftModel`` of prompt learning.
    """
    if isinstance(source, os.PathLike):
        return os.fspath(source)
    if not isinstance(source, PeftModel):
        if not isinstance(source, str | Mapping | PreTrainedModel):
            raise ConfigError(_no_model(source, side))
        return cast("ModelSource", source)
    if source.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"the {side} is a PeftModel with a prompt-learning adapter, which is not a part of the "
            "model's layers; give a LoRA adapter, or the base itself"
        )
    model = cast(PreTrainedModel, source.get_base_model())
    model._hf_peft_config_loaded = cast(bool, _WhileAdapted(model))
    return model


class _WhileAdapted:
    """transformers' mark of a model with an adapter, true as long as the model has one.

    With it ``save_pretrained`` writes a PEFT folder. The model is the user's own: a True would stay
    after ``merge_and_unload``, which deletes the model's ``peft_config`` and does not know the
    mark, and the merged model could not be saved.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __bool__(self) -> bool:
        return hasattr(self._model, "peft_config")


def _no_model(source: object, side: str) -> str:
    expected = (
        f"model.{side} is a {type(source).__name__}; expected a folder or hub id, a mapping of a "
        "config, a PreTrainedModel or a PeftModel"
    )
    if hasattr(source, "_orig_mod"):  # what torch.compile returns
        return f"{expected}: give the model as it was, and compile_blocks=True to compile both"
    return f"{expected}{': give its to_dict()' if isinstance(source, PretrainedConfig) else ''}"


def _carried_adapter(source: ModelSource) -> PeftConfig | None:
    """Return the config of the active adapter of a model in memory; None without one."""
    if not isinstance(source, PreTrainedModel):
        return None
    active = [name for layer in adapter_layers(source) for name in layer.active_adapters]
    return cast("dict[str, PeftConfig]", source.peft_config)[active[0]] if active else None


class _Sizes(TorchDispatchMode):
    """Counts the numbers of new tensors, before memory is allocated."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._made = most, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse a tensor that exceeds the limit.

        Raises:
            OverflowError: The limit is exceeded; holds the requested numbers.
        """
        if func.overloadpacket in _MAKERS and isinstance(args[0], list | tuple):
            self._made += math.prod(args[0])
            if self._made > self._most:
                raise OverflowError(
                    f"an adapter of more than {self._most:,} numbers, {_MOST_TIMES} times the "
                    "model's own, is refused; lower its sizes, such as its rank r."
                )
        return func(*args, **(kwargs or {}))


def adapter_sizes(model: nn.Module) -> _Sizes:
    """Limit, within the context, the numbers that an adapter of ``model`` may allocate.

    A low-rank adapter of full rank on all layers has twice the model's numbers. More raise an
    OverflowError, before memory is allocated.
    """
    own = sum(parameter.numel() for parameter in model.parameters())
    return _Sizes(max(_MOST_TIMES * own, _SPARE_NUMBERS))


@contextmanager
def fitting_adapter(model: nn.Module, option: str) -> Iterator[None]:
    """Refuse, within the context, an adapter that does not fit ``model``.

    Raises:
        ConfigError: PEFT's refusal, or an adapter far larger than the model.
    """
    try:
        with adapter_sizes(model):
            yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        layers = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear)
            }
        )
        hint = f" Linear layers of this model: {', '.join(layers)}"
        raise ConfigError(
            f"{option}: {first_line(error)}{hint if isinstance(error, ValueError) else ''}"
        ) from error


def widen_trained(model: torch.nn.Module, base: torch.dtype) -> None:
    """Convert trained weights in place to float32, or to the base's format if that is wider."""
    wide = torch.promote_types(base, torch.float32)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(wide)


def add_adapter(
    model: PreTrainedModel, adapter: PeftConfig, option: str, *, adapts_vision: bool = False
) -> None:
    """Put a trainable PEFT adapter on ``model`` in place and freeze all other parameters.

    A missing ``task_type`` is filled in. On a vision-language model it is put on the language model
    alone, unless the config has its own ``exclude_modules`` or ``adapts_vision``. Prompt-learning
    configs are refused: they need a wrapper around the model, from which a student cannot be
    exported.

    Args:
        model: The base, changed in place; gradient then flows to the adapter alone.
        adapter: Any PEFT config for layers; not changed, so that it can be used for other models.
        option: How the user named it, for messages.
        adapts_vision: Whether layers of a vision tower may be adapted too.

    Raises:
        ConfigError: A prompt-learning config, one whose weights do not restore the model, or target
            modules that the model does not have.
    """
    if adapter.is_prompt_learning:
        raise ConfigError(
            f"{option}: {type(adapter).__name__} is a prompt-learning adapter; a student takes "
            "adapters that change its layers, such as LoraConfig"
        )
    unfit = unfit_adapter(adapter)
    if unfit is not None:
        raise ConfigError(f"{option}: {unfit}")
    adapter = deepcopy(adapter)
    adapter.task_type = adapter.task_type or "CAUSAL_LM"
    outside = None if adapts_vision else modules_outside_language(model)
    if outside is not None and getattr(adapter, "exclude_modules", "") is None:
        adapter.exclude_modules = outside  # type: ignore[attr-defined]
    with fitting_adapter(model, option), stand_ins(model, option), warnings.catch_warnings():
        # PEFT sets it to what the layer is (GPT-2's are transposed) and says so
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        model.add_adapter(adapter)
        widen_trained(model, model.dtype)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with its adapters merged; ``model`` itself is not changed.

    Parameters without an adapter are shared in memory, frozen; adapted layers are copied. A
    quantised model keeps its adapter unmerged: merging would lose it to rounding.
    """
    layers = adapter_layers(model)
    if not layers or is_quantised(model):
        return model
    adapted = {id(p) for layer in layers for p in layer.parameters()}
    shared = {
        id(p): nn.Parameter(p.detach(), requires_grad=False)
        for p in model.parameters()
        if id(p) not in adapted
    }
    # deepcopy's memo: parameters in ``shared`` are taken from it and not copied
    plain = deepcopy(model, cast("dict[int, object]", shared))
    with torch.no_grad():
        is_taken_apart = merge_adapters(plain)
    if is_taken_apart:
        plain.config.tie_word_embeddings = False
    plain._hf_peft_config_loaded = False
    plain.__dict__.pop("peft_config", None)
    return plain
