"""Importance of neurons, heads and channels: their mean activation on calibration rows.

A neuron's score is its mean absolute activation times the norm of its column in the last
projection; a head's is the mean norm of its contribution to the residual stream. A unit that is
never active, or that nothing reads, has score 0. A channel's is its mean absolute value after each
norm, relative to the mean of the norm's channels (Muralidharan et al., Minitron, arXiv 2407.14679,
§ 2.2, with the contribution in place of the activation).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from okd_lightning.models.shrinking.calibration import Calibration
from okd_lightning.models.shrinking.selection import outputs_by_inputs, readers
from okd_lightning.models.shrinking.sizes import Axis, refusal


class _Sums:
    """Sums over real tokens that hooks add up, by name.

    Attributes:
        mask: [batch, seq] True on the real tokens of the present batch.
    """

    def __init__(self) -> None:
        self.mask = torch.ones(0, dtype=torch.bool)
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def begin(self, mask: Tensor) -> None:
        """Start a batch."""
        self.mask = mask

    def real(self, values: Tensor) -> Tensor | None:
        """Return [tokens, width] at real tokens; None for a pass that is not over the batch."""
        rows = values.reshape(-1, values.shape[-1])
        return rows[self.mask.flatten()] if len(rows) == self.mask.numel() else None

    def add(self, name: str, total: Tensor, count: Tensor | int) -> None:
        """Add a sum and the number of its tokens."""
        self.totals[name] = self.totals.get(name, torch.zeros(())) + total.double().cpu()
        self.counts[name] = self.counts.get(name, torch.zeros(())) + torch.as_tensor(count).cpu()

    def means(self, name: str) -> Tensor:
        """Return the means; 0 where there were no tokens."""
        return self.totals[name] / self.counts[name].clamp(min=1)


def neuron_scores(calibration: Calibration, axes: Iterable[Axis]) -> dict[str, Tensor]:
    """Return [neurons], or [experts, neurons], for each MLP.

    Raises:
        ModelError: An MLP has no last projection that can be found.
    """
    model, sums = calibration.model, _Sums()
    reading = _one_reader_each(model, axes, "--intermediate")
    for owner, axis in reading.items():
        module = model.get_submodule(axis.module)
        if model.get_parameter(axis.parameter).dim() == 3:
            hook = _expert_hook(sums, owner)
            sums.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            sums.handles.append(module.register_forward_pre_hook(_neuron_hook(sums, owner)))
    _run(calibration, sums)
    found = {}
    for owner, axis in reading.items():
        norms = outputs_by_inputs(model, axis).float().norm(dim=-2).double().cpu()
        means = sums.means(owner)
        is_idle = sums.counts[owner] == 0  # an expert that no token chose: by its weights alone
        found[owner] = torch.where(is_idle, torch.ones_like(means), means) * norms
    return found


def head_scores(calibration: Calibration, axes: Iterable[Axis]) -> dict[str, Tensor]:
    """Return [query heads] for each attention module.

    Raises:
        ModelError: An attention module has no output projection that can be found.
    """
    model, sums = calibration.model, _Sums()
    reading = _one_reader_each(model, axes, "--heads")
    for owner, axis in reading.items():
        weight, width = outputs_by_inputs(model, axis), axis.blocks[0].width
        hook = _head_hook(sums, owner, weight, width)
        sums.handles.append(model.get_submodule(axis.module).register_forward_pre_hook(hook))
    _run(calibration, sums)
    return {owner: sums.means(owner) for owner in reading}


def channel_scores(calibration: Calibration, norms: Iterable[str]) -> Tensor:
    """Return [channels], from the outputs of the norms with these names."""
    sums = _Sums()
    for name in norms:
        module = calibration.model.get_submodule(name)
        sums.handles.append(module.register_forward_hook(_channel_hook(sums, name)))
    _run(calibration, sums)
    means = [sums.means(name) for name in sums.totals]
    return torch.stack([mean / mean.mean().clamp(min=1e-30) for mean in means]).sum(0)


def _run(calibration: Calibration, sums: _Sums) -> None:
    try:
        calibration.run(sums.begin)
    finally:
        for handle in sums.handles:
            handle.remove()


def _one_reader_each(model: PreTrainedModel, axes: Iterable[Axis], option: str) -> dict[str, Axis]:
    axes = tuple(axes)
    reading = readers(model, axes)
    for axis in axes:
        if axis.owner not in reading:
            raise refusal(model.config, option, f"{axis.owner} has not one last projection")
    return reading


def _neuron_hook(sums: _Sums, owner: str) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = sums.real(args[0])
        if rows is not None:
            sums.add(owner, rows.abs().sum(0, dtype=torch.float32), len(rows))

    return before


def _head_hook(sums: _Sums, owner: str, weight: Tensor, width: int) -> Callable[..., None]:
    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = sums.real(args[0])
        if rows is None:
            return
        parts = zip(rows.split(width, dim=-1), weight.split(width, dim=-1), strict=True)
        norms = [(part @ own.T).float().norm(dim=-1).sum() for part, own in parts]
        sums.add(owner, torch.stack(norms), len(rows))

    return before


def _channel_hook(sums: _Sums, name: str) -> Callable[..., None]:
    def after(module: nn.Module, args: object, output: Tensor) -> None:
        rows = sums.real(output)
        if rows is not None:
            sums.add(name, rows.abs().sum(0, dtype=torch.float32), len(rows))

    return after


def _expert_hook(sums: _Sums, owner: str) -> Callable[..., None]:
    """Compute the activations of fused experts again: they do not leave the module."""

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen = (*args, *kwargs.values())[:2]
        rows, picks = sums.real(hidden), sums.real(chosen)
        if rows is None or picks is None:
            return
        totals, counts = [], []
        for number, weight in enumerate(module.gate_up_proj):
            own = rows[(picks == number).any(-1)]
            matrix = weight.T if module.is_transposed else weight
            bias = module.gate_up_proj_bias[number] if module.has_bias else None
            active = module._apply_gate(functional.linear(own, matrix, bias))  # transformers' own
            totals.append(active.abs().sum(0, dtype=torch.float32))
            counts.append(len(own))
        sums.add(owner, torch.stack(totals), torch.tensor(counts)[:, None])

    return before
