"""The online module: a small trainable PEFT part on a frozen teacher (OKD, arXiv 2409.12512).

Owns attaching the module, switching it off, and its weights. The base stays frozen and
bit-identical, and may be in bfloat16; the module's weights are float32 or wider. Adapters on layers
(such as LoRA) are added to the model in place; prompt learning (prefix, P-tuning) needs PEFT's
wrapper around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.models.adapters import add_adapter, fitting_adapter, widen_trained
from okd_lightning.models.projection_targets import (
    choose_targets,
    describe_adapter,
    keep_keys,
)
from okd_lightning.models.recompute import recompute_activations

ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]
"""Schedule of a learning rate after its warm-up."""

_PEFT_DEFAULT_ALPHA = 8
_IN_THE_CACHE = (PeftType.PREFIX_TUNING, "CARTRIDGE")


def check_schedule(name: str, option: str = "model.schedule") -> None:
    """Refuse an unknown schedule.

    Raises:
        ConfigError: The name is unknown; the message lists the schedules.
    """
    if name not in get_args(ScheduleName):
        raise ConfigError(
            f"{option} is {name!r}; expected one of {', '.join(get_args(ScheduleName))}"
        )


@dataclass(frozen=True)
class OnlineModuleSettings:
    """A method's online module for the teacher.

    Attributes:
        config: Any PEFT config.
        learning_rate: Learning rate of the module; None for the student's.
        clip_norm: Largest gradient norm of the module; None for the student's.
        warmup_steps: Warm-up steps of the module's learning rate; None for the student's.
        schedule: Schedule of the module's learning rate; None for the student's.
    """

    config: PeftConfig
    learning_rate: float | None = None
    clip_norm: float | None = None
    warmup_steps: int | None = None
    schedule: ScheduleName | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _completed(self.config))

    def to_dict(self) -> dict[str, Any]:
        """Return the completed config as primitives, for a checkpoint."""
        values = self.config.to_dict()
        return {
            key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
            for key, value in values.items()
        }


def attach_online_module(
    teacher: PreTrainedModel,
    config: PeftConfig,
    option: str,
    gradient_checkpointing: bool = False,
) -> PreTrainedModel | PeftModel:
    """Freeze ``teacher`` and put a trainable module on it.

    Args:
        teacher: The base; changed in place.
        config: Any PEFT config; its ``task_type`` is filled in. A LoRA config with the default
            ``lora_alpha`` gets ``lora_alpha = r`` (scale 1), which is logged. Without
            ``target_modules`` it adapts the query and value projections.
        option: How the user named it, for messages.
        gradient_checkpointing: Recompute the teacher's activations in the backward pass.

    Returns:
        The model to use as teacher, in eval mode: its module is deterministic.

    Raises:
        ConfigError: The config matches no layer of the teacher, would train the base's own biases,
            or cannot be combined with gradient checkpointing.
    """
    config = _completed(config)
    _check_base_stays(config, option)
    teacher.requires_grad_(False)
    if gradient_checkpointing:
        _check_no_cache(config, option)
        recompute_activations(teacher, "--model.teacher")
    if not config.is_prompt_learning:
        is_by_role = choose_targets(teacher, config)
        add_adapter(teacher, config, option)
        masked = keep_keys(teacher, config) if is_by_role else []
        rank_zero_info(f"online module: {describe_adapter(teacher, config, masked)}")
        return teacher.eval()
    if any(parameter.is_meta for parameter in teacher.parameters()):
        raise ConfigError(
            f"{option}: {type(config).__name__} is made out of the teacher's weights, which "
            "loading: by_shard leaves on disk; use loading: every_rank, or LoraConfig"
        )
    with fitting_adapter(teacher, option):
        wrapped = get_peft_model(teacher, config)
    widen_trained(wrapped, teacher.dtype)
    return wrapped.eval()


class WithinContext(nn.Module):
    """A module that always runs within a context, such as that of ``base_teacher``.

    Args:
        module: The module.
        context: Returns the context of one call.
    """

    def __init__(
        self, module: nn.Module, context: Callable[[], AbstractContextManager[None]]
    ) -> None:
        super().__init__()
        self.module, self.context = module, context

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the module's output."""
        with self.context():
            output: Tensor = self.module(hidden)
        return output


@contextmanager
def base_teacher(teacher: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Switch the teacher's online module off within the context, without a copy of the teacher.

    Contexts may be nested: the outermost one switches the module on again.
    """
    if isinstance(teacher, PeftModel):
        with teacher.disable_adapter():
            yield
        return
    layers = [m for m in teacher.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    if any(layer.disable_adapters for layer in layers):
        yield
        return
    # PEFT's enable_adapters changes requires_grad, which is restored below
    learns = {parameter: parameter.requires_grad for parameter in teacher.parameters()}
    for layer in layers:  # not model.enable_adapters, which does not re-enable modules_to_save
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, learnt in learns.items():
            parameter.requires_grad_(learnt)


def _check_base_stays(config: PeftConfig, option: str) -> None:
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ConfigError(
            f"{option}: bias {bias!r} would train biases of the base teacher, which stays as it "
            "is; expected 'none'"
        )


def _check_no_cache(config: PeftConfig, option: str) -> None:
    if config.peft_type in _IN_THE_CACHE:
        raise ConfigError(
            f"{option}: {type(config).__name__} keeps its prefix in the attention cache, which "
            "recomputing would extend twice; leave --model.gradient_checkpointing off, or take "
            "LoraConfig or PromptEncoderConfig"
        )


def _completed(config: PeftConfig) -> PeftConfig:
    """Return a copy with task type and LoRA scale filled in."""
    config = deepcopy(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    if (
        isinstance(config, LoraConfig)
        and config.lora_alpha == _PEFT_DEFAULT_ALPHA
        and config.r != _PEFT_DEFAULT_ALPHA
    ):
        config.lora_alpha = config.r
        rank_zero_info(f"online module: lora_alpha = r = {config.r} (scale 1), as none was given")
    return config
