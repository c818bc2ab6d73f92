"""One distribution of several models, and one head for several models' hidden states.

Owns the two ways of mixing, on finished logits (scaled, soft-capped, masked), and heads over
concatenated hidden states. A temperature acts on the mixed distribution.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from okd_lightning.losses.end_outcome import EndOutcome
from okd_lightning.losses.projection import Side
from okd_lightning.records.shapes import LogProbs, PerId


class _LogSum(torch.autograd.Function):
    """log of a sum of exponentials, term by term, whose gradient in a term is its share.

    Where all terms are -inf, the shares and with them the gradient are 0.
    """

    @staticmethod
    def forward(ctx: Any, *terms: Tensor) -> Tensor:
        total = terms[0]
        for term in terms[1:]:
            total = torch.logaddexp(total, term)
        ctx.save_for_backward(total, *terms)
        return total.clone() if len(terms) == 1 else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        total, *terms = ctx.saved_tensors
        finite = total.masked_fill(total == -math.inf, 0.0)  # -inf - -inf is NaN
        return tuple((term - finite).exp_().mul_(gradient) for term in terms)


@dataclass(frozen=True)
class Mixing(ABC):
    """Function from several models' distributions to one.

    Attributes:
        weights: One positive weight per model.
    """

    weights: tuple[float, ...]

    @abstractmethod
    def __call__(self, logits: Sequence[PerId], end_ids: Sequence[int]) -> LogProbs:
        """Return [positions, vocab] log-probabilities (nats), with gradient to all logits.

        Args:
            logits: [positions, vocab] finished logits of each model.
            end_ids: Ids that are one outcome, "the response ends here".
        """


@dataclass(frozen=True)
class Mixture(Mixing):
    """log q = logsumexp_k(log w_k + log q_k), for weights that sum to 1.

    The ends of a mixture may be merged after mixing: both are sums of probabilities.
    """

    def __call__(self, logits: Sequence[PerId], end_ids: Sequence[int] = ()) -> LogProbs:
        """Return the mixture's log-probabilities."""
        del end_ids
        terms = [
            one.log_softmax(-1) + math.log(weight)
            for one, weight in zip(logits, self.weights, strict=True)
        ]
        mixed: LogProbs = _LogSum.apply(*terms)
        return mixed


@dataclass(frozen=True)
class Product(Mixing):
    """q = softmax(sum_k w_k log q_k), over outcomes: each model's end ids are merged first.

    Id by id, the product of models that end with different ids would never end. Within the merged
    outcome an id has the mean of its shares in the models, weighted with w.
    """

    def __call__(self, logits: Sequence[PerId], end_ids: Sequence[int] = ()) -> LogProbs:
        """Return the product's log-probabilities."""
        ends = EndOutcome(end_ids, logits[0].device)
        total = torch.zeros_like(logits[0])
        for one, weight in zip(logits, self.weights, strict=True):
            total = total + weight * ends.merge(one).log_softmax(-1)
        outcomes = total.log_softmax(-1)
        if not ends.is_merged:
            return outcomes
        shares = Mixture(tuple(weight / sum(self.weights) for weight in self.weights))
        among = shares([one.index_select(-1, ends.ids) for one in logits])
        of_end = outcomes.index_select(-1, ends.ids[:1])
        return outcomes.index_copy(-1, ends.ids, of_end + among)


class _EachHead(nn.Module):
    """Several heads side by side: concatenated hidden states to concatenated raw outputs.

    Args:
        sides: The models; of those without gradient the hidden states get none.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        super().__init__()
        self.heads = nn.ModuleList([side.module for side in sides])
        self._inputs = [
            (side.hidden.shape[-1], side.hidden.dtype, side.hidden.requires_grad) for side in sides
        ]
        self.widths: list[int] = []  # of the last raw outputs

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [positions, sum of the tables' rows] raw outputs."""
        found = []
        parts = hidden.split([width for width, _, _ in self._inputs], dim=-1)
        for part, head, (_, dtype, learns) in zip(parts, self.heads, self._inputs, strict=True):
            found.append(head((part if learns else part.detach()).to(dtype)))
        self.widths = [raw.shape[-1] for raw in found]
        return torch.cat(found, dim=-1)


class MixedHead:
    """The head of several models that are one distribution.

    Args:
        sides: The models at the same positions.
        mixing: How they are mixed.
    """

    def __init__(self, sides: Sequence[Side], mixing: Mixing) -> None:
        self._sides, self._mixing = tuple(sides), mixing
        self.module = _EachHead(sides)

    def finish(self, raw: Tensor) -> LogProbs:
        """Finish each model's outputs by its own head, and mix."""
        parts = raw.split(self.module.widths, dim=-1)
        logits = [side.finish(part) for side, part in zip(self._sides, parts, strict=True)]
        return self._mixing(logits, self._sides[0].end_ids)

    def __call__(self, hidden: Tensor) -> LogProbs:
        """Apply both steps."""
        return self.finish(self.module(hidden))


class _HeadOfPosition(nn.Module):
    """A head for each position, whose number is the last column of the hidden states.

    Args:
        sides: The models; of those without gradient the hidden states get none.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        super().__init__()
        self.heads = nn.ModuleList([side.module for side in sides])
        self._sides = tuple(sides)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return [positions, vocab] logits."""
        number, found, places = hidden[:, -1].detach(), [], []
        for i, side in enumerate(self._sides):
            place = (number == i).nonzero().squeeze(-1)
            own = hidden[place, : side.hidden.shape[-1]].to(side.hidden.dtype)
            own = own if side.hidden.requires_grad else own.detach()
            found.append(side.finish(side.module(own)))
            places.append(place)
        return torch.cat(found)[torch.cat(places).argsort()]


class RoutedHead:
    """The head of positions that belong to different models.

    Args:
        sides: The models, each at its own positions.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        self.module = _HeadOfPosition(sides)

    def finish(self, raw: Tensor) -> Tensor:
        """Return the logits unchanged: each model's head has finished them."""
        return raw

    def __call__(self, hidden: Tensor) -> Tensor:
        """Apply each position's head."""
        logits: Tensor = self.module(hidden)
        return logits


def routed_side(sides: Sequence[Side], places: Sequence[Tensor]) -> Side:
    """Return the side of a batch whose positions belong to different models.

    Args:
        sides: The models at their own positions.
        places: Of each model, its positions in the batch; together all of them.

    Returns:
        Hidden states of the widest model's width and one more column, the model's number.
    """
    width = max(side.hidden.shape[-1] for side in sides)
    parts = [functional.pad(s.hidden, (0, width - s.hidden.shape[-1])) for s in sides]
    numbers = [part.new_full((len(part), 1), i) for i, part in enumerate(parts)]
    rows = torch.cat([torch.cat(pair, dim=-1) for pair in zip(parts, numbers, strict=True)])
    return Side(rows[torch.cat(list(places)).argsort()], RoutedHead(sides), sides[0].end_ids)


def mixed_side(sides: Sequence[Side], mixing: Mixing) -> Side:
    """Return the side of several models that are one distribution, at the same positions."""
    hidden = torch.cat([side.hidden for side in sides], dim=-1)
    return Side(hidden, MixedHead(sides, mixing), sides[0].end_ids)
