"""Divergences, entropies and top-k mass of responses, by position in the response."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from okd_lightning.commands.diagnose.findings import Estimate, PositionBin, Rows
from okd_lightning.commands.diagnose.responses import Responses
from okd_lightning.divergences import ForwardKL, JensenShannon, ReverseKL
from okd_lightning.losses import (
    Agreement,
    DrawnLogProb,
    Entropy,
    ExactDivergence,
    Quantity,
    Tile,
)
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.shapes import PositionValues
from okd_lightning.training.module import DistillationModule

TOP_KS = (1, 4, 16, 64, 256)
"""Measured sizes of the student's top-k, as far as the vocabulary goes."""

_MEASURES: dict[str, Quantity] = {
    "forward_kl": ExactDivergence(ForwardKL()),
    "reverse_kl": ExactDivergence(ReverseKL()),
    "jsd": ExactDivergence(JensenShannon(0.5)),
    "agreement": Agreement(),
    "student_entropy": Entropy("student"),
    "teacher_entropy": Entropy("teacher"),
    "student_logprob": DrawnLogProb("student"),
}


@dataclass(frozen=True)
class TeacherMass(Quantity):
    """The teacher's probability of the student's k most likely ids, without gradient.

    Args:
        k: At most the vocabulary.
    """

    k: int
    needs_teacher = True

    @torch.no_grad()
    def measure(self, tile: Tile) -> PositionValues:
        """Return [positions] in [0, 1]."""
        chosen = tile.student_logprobs.topk(self.k, dim=-1).indices
        return tile.teacher_logprobs.gather(-1, chosen).exp().sum(-1)


@dataclass(frozen=True)
class Tokens:
    """Measures at the tokens of some responses, concatenated.

    Attributes:
        row: [tokens] index of the token's response.
        place: [tokens] its position in the response, from 0.
        values: [tokens] by name, float64.
    """

    row: Tensor
    place: Tensor
    values: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.row)

    def estimate(self, name: str) -> Estimate:
        """Return the mean over tokens with its standard error over responses.

        The error is that of a ratio of sums whose independent units are responses; NaN for a single
        response.
        """
        values = self.values[name]
        _, number = self.row.unique(return_inverse=True)
        num = int(number.max()) + 1
        mean = values.mean()
        zeros = torch.zeros(num, dtype=values.dtype)
        off = zeros.index_add(0, number, values - mean)
        if num < 2:
            return Estimate(float(mean), math.nan)
        error = (off.square().sum() * num / (num - 1)).sqrt() / len(values)
        return Estimate(float(mean), float(error))

    def bins(self) -> tuple[PositionBin, ...]:
        """Return bins of positions 1, 2, 3-4, 5-8, ... as far as there are tokens."""
        total = float(self.values["reverse_kl"].sum())
        found, first, last = [], 1, 1
        while first <= int(self.place.max()) + 1:
            within = (self.place >= first - 1) & (self.place < last)
            if within.any():
                reverse = self.values["reverse_kl"][within]
                share = float(reverse.sum()) / total if total > 0 else 0.0
                forward = float(self.values["forward_kl"][within].mean())
                mean = float(reverse.mean())
                found.append(PositionBin(first, last, int(within.sum()), mean, forward, share))
            first, last = last + 1, 2 * last
        return tuple(found)

    def top_tenth(self) -> float:
        """Return the share of the total reverse KL on the 10 % of the tokens with the most."""
        values = self.values["reverse_kl"].sort(descending=True).values
        total = float(values.sum())
        return float(values[: max(1, len(values) // 10)].sum()) / total if total > 0 else 0.0


def measure_tokens(module: DistillationModule, batches: Iterable[DistillBatch]) -> Tokens:
    """Return all measures at the loss tokens of the responses, without a prompt's earlier turns."""
    quantities = dict(_MEASURES)
    quantities |= {f"top_{k}": TeacherMass(k) for k in top_ks(module.vocabulary.size)}
    return tokens_of(module, batches, quantities)


@torch.no_grad()
def tokens_of(
    module: DistillationModule,
    batches: Iterable[DistillBatch],
    quantities: Mapping[str, Quantity],
) -> Tokens:
    """Return some quantities, by name, at the loss tokens of the responses."""
    rows, places, num_rows = [], [], 0
    values: dict[str, list[Tensor]] = {name: [] for name in quantities}
    for batch in batches:
        measured = module.measure(batch, tuple(quantities.values()))
        at = batch.student_reads.places
        place = at.column - batch.prompt_lengths[at.row]
        is_response = place >= 0
        rows.append((at.row + num_rows)[is_response].cpu())
        places.append(place[is_response].cpu())
        for name, quantity in quantities.items():
            values[name].append(measured[quantity][is_response].double().cpu())
        num_rows += len(batch)
    joined = {name: torch.cat(parts) for name, parts in values.items()}
    return Tokens(torch.cat(rows), torch.cat(places), joined)


def top_ks(vocabulary: int) -> tuple[int, ...]:
    """Return those of ``TOP_KS`` that are smaller than the vocabulary."""
    return tuple(k for k in TOP_KS if k < vocabulary)


def summarise(responses: Responses, tokens: Tokens) -> Rows:
    """Reduce the measures at tokens to the record of one kind of responses."""
    lengths: Sequence[int] = responses.lengths
    measures = {name: tokens.estimate(name) for name in _MEASURES if name != "student_logprob"}
    drawn = tokens.estimate("student_logprob")
    measures["cross_entropy"] = Estimate(-drawn.mean, drawn.error)
    prefix = "top_"
    return Rows(
        source=responses.author,
        rows=len(responses.rows),
        tokens=len(tokens),
        mean_length=sum(lengths) / len(lengths),
        eos_share=sum(responses.ended) / len(responses.ended),
        measures=measures,
        top_k={
            int(name.removeprefix(prefix)): tokens.estimate(name)
            for name in tokens.values
            if name.startswith(prefix)
        },
        bins=tokens.bins(),
        top_tenth=tokens.top_tenth(),
    )
