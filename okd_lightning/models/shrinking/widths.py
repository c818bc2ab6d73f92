"""Choice of the neurons, heads and channels that are kept, and their measured loss.

Each MLP keeps the neurons with the highest scores, and all of them keep as many. With grouped
queries, whole groups can go, or heads of each group; every combination that gives the wanted number
is measured, and the one with the least KL(teacher‖student) is kept. Channels are the same in all
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import PretrainedConfig

from okd_lightning.errors import ConfigError
from okd_lightning.models.shrinking.calibration import Calibration, Loss
from okd_lightning.models.shrinking.norms import residual_norms
from okd_lightning.models.shrinking.scores import channel_scores, head_scores, neuron_scores
from okd_lightning.models.shrinking.selection import Selection, zeroed
from okd_lightning.models.shrinking.sizes import (
    Axis,
    UnitKind,
    channel_axes,
    head_axes,
    head_sizes,
    neuron_axes,
    neuron_sizes,
    refusal,
)

Kept: TypeAlias = dict[tuple[UnitKind, str], Tensor]


@dataclass(frozen=True)
class Widths:
    """Wanted widths: a share below 1, or a number; None keeps all.

    Attributes:
        intermediate: Neurons of each MLP.
        heads: Query heads.
        hidden: Channels of the residual stream.
    """

    intermediate: float | None = None
    heads: float | None = None
    hidden: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (0 < value < 1 or (value >= 1 and value == int(value))):
                raise ConfigError(
                    f"--{name} {value:g}: expected a share between 0 and 1, such as 0.75, or a "
                    "whole number of at least 1"
                )


@dataclass(frozen=True)
class WidthCut:
    """Units that are kept, with the config's new sizes.

    Attributes:
        selection: The units.
        sizes: New values of config fields.
        label: Description, for tables.
    """

    selection: Selection = field(default_factory=Selection)
    sizes: Mapping[str, int] = field(default_factory=dict)
    label: str = ""

    def __add__(self, other: WidthCut) -> WidthCut:
        """Return both cuts."""
        label = ", ".join(filter(None, (self.label, other.label)))
        return WidthCut(self.selection + other.selection, {**self.sizes, **other.sizes}, label)


Tell: TypeAlias = Callable[[str, Loss, bool], None]
"""Called with each measured candidate's label, its loss, and whether it is the best so far."""

Staying: TypeAlias = Callable[[list[Axis]], list[Axis]]
"""Function that omits the axes of dropped layers."""


def choose_widths(
    calibration: Calibration, widths: Widths, tell: Tell, dropped: Collection[int] = ()
) -> WidthCut:
    """Return the units to keep.

    Args:
        calibration: The model and its rows.
        widths: The wanted widths.
        tell: For progress messages.
        dropped: Numbers of dropped layers; the units are measured without them.

    Raises:
        ConfigError: A number that the model cannot have.
        ModelError: An architecture that cannot be cut like this.
    """
    sizes = wanted_sizes(calibration.model.config, widths)
    gone = tuple(f"{calibration.layers.name}.{number}." for number in dropped)

    def staying(axes: list[Axis]) -> list[Axis]:
        return [axis for axis in axes if not axis.parameter.startswith(gone)]

    chosen = WidthCut()
    with calibration.layers.skipping(dropped):
        if widths.intermediate is not None:
            neurons = _neurons(calibration, sizes, staying)
            chosen = _measured(calibration, [neurons], tell, chosen)
        if widths.heads is not None:
            heads = list(_heads(calibration, sizes["num_attention_heads"], staying))
            chosen = _measured(calibration, heads, tell, chosen)
        if widths.hidden is not None:
            channels = _channels(calibration, sizes["hidden_size"], staying)
            chosen = _measured(calibration, [channels], tell, chosen)
    return chosen


def wanted_sizes(config: PretrainedConfig, widths: Widths) -> dict[str, int]:
    """Return the config fields that change, and their new values.

    Raises:
        ConfigError: A number that the model cannot have.
        ModelError: A model without heads.
    """
    found: dict[str, int] = {}
    if widths.intermediate is not None:
        found |= _wanted_neurons(neuron_sizes(config), widths.intermediate)
    text = config.get_text_config()
    has_heads = getattr(text, "num_attention_heads", None) is not None
    if widths.heads is not None and not has_heads:
        raise refusal(config, "--heads", "it has no attention heads")
    if widths.heads is None and widths.hidden is None:
        return found
    heads, keys = head_sizes(config)
    width = text.hidden_size
    must_divide = width % heads == 0
    new_heads = heads
    if widths.heads is not None:
        # with --hidden, the channels follow the heads
        whole = width if must_divide and widths.hidden is None else 0
        possible = [
            n for n in range(1, heads + 1) if list(_groupings(n, heads, keys)) and whole % n == 0
        ]
        rule = f"heads must divide the hidden size {width}" if whole else "groups must be equal"
        new_heads = _nearest("--heads", widths.heads, heads, possible, rule)
        found["num_attention_heads"] = new_heads
    if widths.hidden is not None:
        step = new_heads if must_divide else 1
        rule = f"the {new_heads} heads must divide it"
        found["hidden_size"] = _nearest(
            "--hidden", widths.hidden, width, range(step, width + 1, step), rule
        )
    return found


def _wanted_neurons(have: Mapping[str, int], wanted: float) -> dict[str, int]:
    if not have:
        raise ConfigError("--intermediate: the model's config has no size of an MLP; leave it out")
    if wanted >= 1 and len(have) > 1:
        raise ConfigError(
            f"--intermediate {wanted:g}: this model has MLPs of several sizes "
            f"({', '.join(f'{name} {size}' for name, size in have.items())}); give a share, such "
            "as 0.75"
        )
    return {
        name: _nearest("--intermediate", wanted, size, range(1, size + 1), "")
        for name, size in have.items()
    }


def _nearest(option: str, wanted: float, have: int, possible: Sequence[int], rule: str) -> int:
    """Return the possible number that is nearest to a share, or the wanted number itself.

    Raises:
        ConfigError: The wanted number is not possible.
    """
    target = wanted * have if wanted < 1 else wanted
    near = min(possible, key=lambda n: (abs(n - target), -n))
    if wanted < 1 or near == wanted:
        return near
    if wanted > have:
        raise ConfigError(f"{option} {wanted:g}: the model has {have}; give a smaller number")
    shown = sorted(sorted(possible, key=lambda n: abs(n - wanted))[:8])
    raise ConfigError(
        f"{option} {wanted:g}: {rule}; possible near it: {', '.join(map(str, shown))}"
    )


def _groupings(wanted: int, heads: int, keys: int) -> Iterator[tuple[int, int]]:
    """Yield (key heads, queries of each) with ``wanted`` queries in all, most key heads first."""
    for num_keys in range(keys, 0, -1):
        group, rest = divmod(wanted, num_keys)
        if not rest and 1 <= group <= heads // keys:
            yield num_keys, group


def _measured(
    calibration: Calibration, cuts: list[WidthCut], tell: Tell, before: WidthCut
) -> WidthCut:
    """Return the cut with the least KL(teacher‖student), added to those before."""
    best, least = cuts[0], float("inf")
    for cut in cuts:
        with zeroed(calibration.model, (before + cut).selection):
            loss = calibration.loss()
        is_best = loss.forward_kl < least
        tell(cut.label, loss, is_best)
        if is_best:
            best, least = cut, loss.forward_kl
    return before + best


def _neurons(calibration: Calibration, sizes: Mapping[str, int], staying: Staying) -> WidthCut:
    found, labels = WidthCut(), []
    for name, size in neuron_sizes(calibration.model.config).items():
        axes = staying(neuron_axes(calibration.model, name))
        if not axes:
            continue
        scores = neuron_scores(calibration, axes)
        units = _num_units(axes)
        # a multiple of the units that a config's number has (RecurrentGemma halves it)
        kept = max(1, round(sizes[name] * units / size))
        chosen: Kept = {("neuron", owner): _top(score, kept) for owner, score in scores.items()}
        new_size = kept * (size // units)
        found += WidthCut(Selection(tuple(axes), chosen), {name: new_size})
        labels.append(f"{name} {size} → {new_size}")
    if not labels:
        raise refusal(calibration.model.config, "--intermediate", "no weight has its config's size")
    return WidthCut(found.selection, found.sizes, ", ".join(labels))


def _num_units(axes: list[Axis]) -> int:
    return axes[0].blocks[0].num_units


def _heads(calibration: Calibration, wanted: int, staying: Staying) -> Iterator[WidthCut]:
    """Yield the cut of each possible grouping of queries."""
    config = calibration.model.config
    heads, keys = head_sizes(config)
    axes = staying(head_axes(calibration.model))
    scores = head_scores(calibration, axes)
    has_keys = getattr(config.get_text_config(), "num_key_value_heads", None) is not None
    for num_keys, group in _groupings(wanted, heads, keys):
        kept: Kept = {}
        for owner, score in scores.items():
            of_groups = score.reshape(keys, -1)
            groups = _top(of_groups.topk(group, dim=1).values.sum(1), num_keys)
            queries = _top(of_groups[groups], group) + groups[:, None] * (heads // keys)
            kept["query", owner], kept["key", owner] = queries.flatten(), groups
        sizes = {"num_attention_heads": wanted}
        if has_keys:
            sizes["num_key_value_heads"] = num_keys
        label = f"heads {heads} → {wanted}"
        label += f" ({num_keys} groups of {group})" if keys < heads else ""
        yield WidthCut(Selection(tuple(axes), kept), sizes, label)


def _channels(calibration: Calibration, wanted: int, staying: Staying) -> WidthCut:
    norms = residual_norms(calibration.model)
    axes = staying(channel_axes(calibration.model))
    scores = channel_scores(calibration, norms)
    kept: Kept = {("channel", ""): _top(scores, wanted)}
    label = f"hidden {len(scores)} → {wanted}"
    return WidthCut(Selection(tuple(axes), kept), {"hidden_size": wanted}, label)


def _top(scores: Tensor, num: int) -> Tensor:
    """Return the numbers of the highest scores along the last axis, ascending."""
    return scores.topk(num, dim=-1).indices.sort(dim=-1).values.to(torch.int64)
