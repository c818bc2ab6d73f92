"""Projectors: trained linear maps from the student's hidden states to the teacher's widths.

They belong to the run: seeded, in the optimizer and in checkpoints, and in no exported model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.records.states import NORMED


@dataclass(frozen=True)
class LayerPair:
    """A layer of the student and one of the teacher that a method compares.

    Attributes:
        name: Name of the projector between them.
        student: The student's layer, numbered as in ``States``.
        teacher: The teacher's layer.
    """

    name: str
    student: int
    teacher: int


class Projectors(nn.Module):
    """Maps student's states by the projectors' names; states without one stay as they are.

    One module, so that shards of it are gathered once a step.

    Args:
        sizes: Width of the student's states and of the teacher's, by name.
        dtype: Number format of the weights.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes = dict(sizes)
        self.maps = nn.ModuleDict(
            {
                name: nn.Linear(width, wanted, bias=False, dtype=dtype)
                for name, (width, wanted) in sizes.items()
            }
        )

    def forward(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mapped states by name."""
        maps: dict[str, Any] = dict(self.maps.items())
        found = {}
        for name, state in states.items():
            own = maps.get(name)
            found[name] = state if own is None else own(state.to(own.weight.dtype))
        return found

    def idle(self, used: Collection[str]) -> list[nn.Parameter]:
        """Return the parameters of the projectors without these names."""
        others = [own for name, own in self.maps.items() if name not in used]
        return [parameter for own in others for parameter in own.parameters()]


def projectors_for(
    pairs: tuple[LayerPair, ...],
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    known: Projectors | None = None,
) -> Projectors | None:
    """Return projectors where two widths differ; None where all are equal.

    Args:
        pairs: The pairs of layers of all methods.
        student: The student, which is loaded.
        teacher: The teacher; None for the student itself.
        known: Those of an earlier run, which stay if they have these names and sizes.
    """
    assert student is not None
    teacher = student if teacher is None else teacher
    sizes = {
        pair.name: (width_of(student, pair.student), width_of(teacher, pair.teacher))
        for pair in pairs
    }
    unequal = {name: widths for name, widths in sizes.items() if widths[0] != widths[1]}
    if known is not None and known.sizes == unequal:
        return known
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    return Projectors(unequal, wide) if unequal else None


def width_of(model: PreTrainedModel, layer: int) -> int:
    """Return the width of a layer's states."""
    if layer == NORMED:
        head: Any = model.get_output_embeddings()
        return int(getattr(head, "in_features", 0) or head.weight.shape[1])
    return int(model.config.get_text_config().hidden_size)


def check_layers(layers: Mapping[int, int], student: Any, teacher: Any, name: str) -> None:
    """Refuse layers that a model does not have.

    Args:
        layers: From the student's layers to the teacher's.
        student: The student's config.
        teacher: The teacher's config; None where it has none here.
        name: The method's name, for messages.

    Raises:
        ConfigError: The message names the layers that there are.
    """
    sides = (("student", student, layers.keys()), ("teacher", teacher, layers.values()))
    for side, config, numbers in sides:
        num = getattr(config.get_text_config(), "num_hidden_layers", None) if config else None
        for layer in numbers:
            if num is not None and layer != NORMED and not 0 <= layer <= num:
                raise ConfigError(
                    f"{name}: the {side} has no layer {layer}; it has 0 (embeddings), 1 to {num} "
                    "(after that block) and -1 (after the final norm)"
                )
