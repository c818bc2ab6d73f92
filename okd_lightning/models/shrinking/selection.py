"""The units that are kept, and the entries of each axis that belong to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.models.shrinking.sizes import Axis, UnitKind


@dataclass(frozen=True)
class Selection:
    """Units that are kept on some axes.

    Attributes:
        axes: All axes on which units are dropped.
        kept: [kept] numbers of the kept units, ascending, by their kind and owner; of experts
            [experts, kept]. All are kept where there is no entry.
    """

    axes: tuple[Axis, ...] = ()
    kept: Mapping[tuple[UnitKind, str], Tensor] = field(default_factory=dict)

    def __add__(self, other: Selection) -> Selection:
        """Return both selections; their axes are different ones."""
        return Selection((*self.axes, *other.axes), {**self.kept, **other.kept})

    def entries(self, axis: Axis) -> Tensor:
        """Return the kept entries of an axis, [entries] or [experts, entries]."""
        parts, start = [], 0
        for block in axis.blocks:
            units = self.kept.get((block.kind, axis.owner), torch.arange(block.num_units))
            within = start + units[..., None] * block.width + torch.arange(block.width)
            parts.append(within.flatten(-2))
            start += block.num_units * block.width
        return torch.cat(parts, dim=-1)

    def cut(self, parameter: str, weight: Tensor) -> Tensor:
        """Return the kept part of a weight of the model; the weight itself if all is kept."""
        for axis in self.axes:
            if axis.parameter == parameter:
                weight = _selected(weight, axis.dim, self.entries(axis).to(weight.device))
        return weight

    def dropped_entries(self, axis: Axis) -> Tensor:
        """Return the entries of an axis that are not kept, as ``entries``."""
        length = sum(block.num_units * block.width for block in axis.blocks)
        entries = self.entries(axis)
        is_dropped = torch.ones(*entries.shape[:-1], length, dtype=torch.bool)
        is_dropped.scatter_(-1, entries, False)
        rest = torch.arange(length).expand_as(is_dropped)[is_dropped]
        return rest.reshape(*entries.shape[:-1], -1)


def readers(model: PreTrainedModel, axes: Iterable[Axis]) -> dict[str, Axis]:
    """Return, by owner, the axis on which a weight reads the owner's units.

    That is the input of an MLP's last projection (``down_proj``), or of attention's output
    projection. An owner with none or several of them is left out.
    """
    found: dict[str, list[Axis]] = {}
    for axis in axes:
        found.setdefault(axis.owner, [])
        if axis.dim == _input_dim(model.get_submodule(axis.module), axis.parameter):
            found[axis.owner].append(axis)
    return {owner: reading[0] for owner, reading in found.items() if len(reading) == 1}


def outputs_by_inputs(model: PreTrainedModel, axis: Axis) -> Tensor:
    """Return the weight of a reading axis as [outputs, inputs] or [experts, outputs, inputs]."""
    weight = model.get_parameter(axis.parameter)
    return weight.movedim(axis.dim, -1)


@contextmanager
def zeroed(model: PreTrainedModel, selection: Selection) -> Iterator[None]:
    """Within the context, the dropped units contribute nothing.

    Of neurons, the entries of the weights that read them are zero; of heads, all entries; of
    channels, all entries of the weights in between, and the embeddings' output. Embedding and head
    stay as they are, because the teacher's logits need them. The dropped entries are kept aside and
    restored.
    """
    of_neurons = [axis for axis in selection.axes if axis.blocks[0].kind == "neuron"]
    of_channels = [axis for axis in selection.axes if axis.blocks[0].kind == "channel"]
    tables = _tables(model)
    others = [a for a in selection.axes if a not in of_neurons and a.parameter not in tables]
    aside: list[tuple[Tensor, int, Tensor, Tensor]] = []
    try:
        for axis in (*readers(model, of_neurons).values(), *others):
            weight = model.get_parameter(axis.parameter).data
            entries = selection.dropped_entries(axis).to(weight.device)
            aside.append((weight, axis.dim, entries, _selected(weight, axis.dim, entries)))
            _write(weight, axis.dim, entries, None)
        with _embeddings_without(model, selection, of_channels[:1]):
            yield
    finally:
        for weight, dim, entries, values in reversed(aside):
            _write(weight, dim, entries, values)


@contextmanager
def _embeddings_without(
    model: PreTrainedModel, selection: Selection, channels: list[Axis]
) -> Iterator[None]:
    if not channels:
        yield
        return
    entries = selection.dropped_entries(channels[0])

    def clear(module: nn.Module, args: object, output: Tensor) -> Tensor:
        return output.index_fill(-1, entries.to(output.device), 0.0)

    handle = model.get_input_embeddings().register_forward_hook(clear)
    try:
        yield
    finally:
        handle.remove()


def _tables(model: PreTrainedModel) -> set[str]:
    """Return the names of the embedding's and the head's parameters."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    own = {id(p) for module in modules for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) in own}


def _input_dim(module: nn.Module, parameter: str) -> int | None:
    """Return the axis of a weight that its inputs are on; None for a bias, norm or embedding."""
    name = parameter.rpartition(".")[2]
    if name == "down_proj":  # experts: [experts, outputs, inputs], or transposed
        return 1 if getattr(module, "is_transposed", False) else 2
    weight = getattr(module, name)
    if name != "weight" or weight.dim() != 2:
        return None
    return 0 if type(module).__name__ == "Conv1D" else 1


def _selected(weight: Tensor, dim: int, entries: Tensor) -> Tensor:
    if entries.dim() == 1:
        return weight.index_select(dim, entries)
    parts = zip(weight, entries, strict=True)  # experts
    return torch.stack([expert.index_select(dim - 1, own) for expert, own in parts])


def _write(weight: Tensor, dim: int, entries: Tensor, values: Tensor | None) -> None:
    """Set entries of a weight to values, or to zero, in place."""
    if entries.dim() == 2:
        for number, (expert, own) in enumerate(zip(weight, entries, strict=True)):
            _write(expert, dim - 1, own, None if values is None else values[number])
    elif values is None:
        weight.index_fill_(dim, entries, 0.0)
    else:
        weight.index_copy_(dim, entries, values)
