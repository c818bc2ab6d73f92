"""Gradients of every estimator on the same rollouts, compared with the exact gradient.

Both models run once per batch, and both heads once per tile of positions; each estimator is then
differentiated to the same logits. Of a large student only the last block's gradients are taken, as
a random sketch: bias and noise of an advantage show there as they do in earlier blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.callbacks import GKD, OPD, DistillationCallback, OPDPlus
from okd_lightning.commands.diagnose.findings import EstimatorFinding, GradientFinding
from okd_lightning.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, TopK
from okd_lightning.losses import Measured, WeightedTerm, fused_loss
from okd_lightning.losses.projection import (
    GraphProjection,
    Projection,
    Side,
    projection,
    slices,
    tile_size,
)
from okd_lightning.losses.quantities import Tile
from okd_lightning.losses.terms import weighted_loss
from okd_lightning.metrics import gradient_fidelity
from okd_lightning.models.blocks import blocks_of
from okd_lightning.records.batches import DistillBatch
from okd_lightning.training.module import DistillationModule

Sides: TypeAlias = tuple[Side, Side | None, Side | None]
"""Student, teacher and base teacher of one batch."""

EXACT = "exact"
MOST_PARAMETERS = 250_000
"""Largest number of gradient entries that are kept whole, per estimator and batch."""

SKETCH_SIZE = 65_521
"""Numbers of a sketch. A prime, so that no row or column of a matrix falls on one of them."""

_DIVERGENCES: Mapping[str, Divergence] = {
    "reverse KL": ReverseKL(),
    "forward KL": ForwardKL(),
    "JSD": JensenShannon(0.5),
}
TOP_K = 16
"""Teacher ids that the top-k estimator knows, besides a tail."""

TOP_K_NAME = f"exact, top {TOP_K}"


def estimators(vocabulary: int) -> dict[str, dict[str, DistillationCallback]]:
    """Return divergence → name → estimator; the exact one first."""
    return {name: _of(divergence, vocabulary) for name, divergence in _DIVERGENCES.items()}


def _of(divergence: Divergence, vocabulary: int) -> dict[str, DistillationCallback]:
    found: dict[str, DistillationCallback] = {
        EXACT: GKD(divergence=divergence, on_policy_fraction=1.0)
    }
    if vocabulary > TOP_K:
        coarse = TopK(divergence, TOP_K)
        found[TOP_K_NAME] = GKD(divergence=coarse, on_policy_fraction=1.0)
    found["stopped_reward"] = OPD(divergence)
    for variant in ("as_published", "centred", "value_baseline"):
        found[variant] = OPDPlus(divergence, variant)
    return found


@dataclass(frozen=True)
class ProbedPart:
    """The parameters whose gradients are taken.

    Attributes:
        name: Their place in the student, for people.
        parameters: All trained ones of that place.
        is_whole: True where their gradients are kept as they are, False for a sketch.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    is_whole: bool


def probed_part(student: PreTrainedModel) -> ProbedPart:
    """Return all trained parameters of a small student, or those of the last block of a large one.

    In a student without known blocks the parameters outside the largest tables are taken.
    """
    trained = tuple(p for p in student.parameters() if p.requires_grad)
    if sum(p.numel() for p in trained) <= MOST_PARAMETERS:
        return ProbedPart("all trained parameters", trained, True)
    blocks = blocks_of(student)
    for number in range(len(blocks), 0, -1):
        found = tuple(p for p in blocks[number - 1].parameters() if p.requires_grad)
        if found:
            return ProbedPart(f"block {number} of {len(blocks)}", found, False)
    tables = {
        id(p) for m in student.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    found = tuple(p for p in trained if id(p) not in tables)
    return ProbedPart("all but the embeddings", found or trained, False)


class Sketch:
    """A linear map of gradients to ``SKETCH_SIZE`` numbers that keeps inner products on average.

    Every entry gets a random sign and is added to one of the numbers (a count sketch; Charikar et
    al., 2002). The standard error of an inner product is at most √(2/``SKETCH_SIZE``) = 0.6 % of
    the product of both norms, for entries that are spread over the numbers.

    Args:
        num: Gradient entries.
        seed: Of the signs.
        device: Of the gradients.
    """

    def __init__(self, num: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        rows = -(-num // SKETCH_SIZE)
        bits = torch.randint(0, 2, (rows * SKETCH_SIZE,), generator=generator, dtype=torch.int8)
        self._signs = (2 * bits - 1).view(rows, SKETCH_SIZE).to(device)

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [SKETCH_SIZE] of the concatenated parts, float32."""
        found = torch.zeros(SKETCH_SIZE, device=self._signs.device)
        signs, start = self._signs.view(-1), 0
        for part in parts:
            entries = part.flatten().float()
            signed = entries * signs[start : start + len(entries)]
            before = start % SKETCH_SIZE  # where the part before has ended
            padded = nn.functional.pad(signed, (before, -(before + len(entries)) % SKETCH_SIZE))
            found += padded.view(-1, SKETCH_SIZE).sum(0)
            start += len(entries)
        return found


class GradientProbe:
    """Collection of gradients, batch by batch.

    Args:
        module: A module whose models are on their devices.
        seed: Of the sketch of a large student.
    """

    def __init__(self, module: DistillationModule, seed: int = 0) -> None:
        assert module.student is not None
        self.module = module
        methods = estimators(module.vocabulary.size)
        self.terms = {
            (divergence, name): method.term
            for divergence, group in methods.items()
            for name, method in group.items()
        }
        self.trained = module.trained_parameters(module.student)
        self.part = probed_part(module.student)
        num = sum(p.numel() for p in self.part.parameters)
        self._sketch = None if self.part.is_whole else Sketch(num, seed, module.device)
        self._found: dict[tuple[str, str], list[Tensor]] = {}
        self._rows = self._batches = 0

    def add(self, batch: DistillBatch) -> None:
        """Add one batch of on-policy samples.

        Args:
            batch: A batch on the models' device.
        """
        module = self.module
        asked = [quantity for term in self.terms.values() for quantity in term.quantities]
        take = self._whole if self.part.is_whole else self._sketched
        with torch.enable_grad(), self._others_frozen():
            sides = module.pair.sides(batch, asked)
            for key, gradient in zip(self.terms, take(sides, batch), strict=True):
                self._found.setdefault(key, []).append(gradient.cpu())
        self._rows, self._batches = max(self._rows, len(batch)), self._batches + 1

    def finding(self) -> GradientFinding:
        """Compare every estimator with its divergence's exact gradient, over all batches."""
        gradients = {key: torch.stack(parts) for key, parts in self._found.items()}
        rows = tuple(
            EstimatorFinding(divergence, name, gradient_fidelity(own, gradients[divergence, EXACT]))
            for (divergence, name), own in gradients.items()
        )
        return GradientFinding(
            rows,
            self._batches,
            self._rows,
            parameters=sum(p.numel() for p in self.part.parameters),
            of_parameters=sum(p.numel() for p in self.trained),
            part=self.part.name,
            sketch=None if self._sketch is None else SKETCH_SIZE,
        )

    @contextmanager
    def _others_frozen(self) -> Iterator[None]:
        """Record no graph below the probed part, and no gradient of the head's weight."""
        probed = {id(p) for p in self.part.parameters}
        for parameter in self.trained:
            parameter.requires_grad_(id(parameter) in probed)
        try:
            yield
        finally:
            for parameter in self.trained:
                parameter.requires_grad_(True)

    def _whole(self, sides: Sides, batch: DistillBatch) -> Iterator[Tensor]:
        """Yield each term's gradient as [parameters], float32, the head's among them."""
        student, teacher, base = sides
        module, about = self.module, Measured.about(batch)
        for weighted in self._weighted(batch):
            loss = fused_loss(
                [weighted],
                student,
                teacher,
                batch.student_reads.targets,
                about,
                module.vocabulary.size,
                module.pair.settings.tile_positions,
                base,
            )
            found = _gradients(loss.total, self.part.parameters)
            yield torch.cat([part.flatten().float() for part in found])

    def _sketched(self, sides: Sides, batch: DistillBatch) -> Iterator[Tensor]:
        """Yield the sketch of each term's gradient."""
        student, teacher, _ = sides
        assert teacher is not None
        assert self._sketch is not None
        weighted = self._weighted(batch)
        width = self.module.vocabulary.size
        for upstream in hidden_gradients(weighted, student, teacher, batch, width):
            found = _gradients(
                student.hidden, self.part.parameters, upstream.to(student.hidden.dtype)
            )
            yield self._sketch(found)

    def _weighted(self, batch: DistillBatch) -> list[WeightedTerm]:
        return [WeightedTerm(term, 1.0 / len(batch)) for term in self.terms.values()]


def hidden_gradients(
    terms: Sequence[WeightedTerm],
    student: Side,
    teacher: Side,
    batch: DistillBatch,
    vocab_size: int,
) -> Tensor:
    """Return [terms, positions, hidden] gradients of several losses to the student's head's input.

    Args:
        terms: One loss each, with its factor; all positionwise.
        student: The student's hidden states and head, whose own parameters get no gradient.
        teacher: The teacher's.
        batch: The rows.
        vocab_size: Width of the logits.
    """
    targets, about = batch.student_reads.targets, Measured.about(batch)
    found = student.hidden.new_empty(len(terms), *student.hidden.shape, dtype=torch.float32)
    quantities = dict.fromkeys(q for weighted in terms for q in weighted.term.quantities)
    with torch.no_grad():
        heads = [projection(side, vocab_size) for side in (student, teacher)]
    # all terms' graphs and gradients of one tile are in memory together
    size = max(1, tile_size(vocab_size, student.hidden.device) // len(terms))
    for at in slices(len(targets), size):
        with torch.no_grad():
            raw, other = (head.project(at) for head in heads)
        leaf = raw.detach().requires_grad_()
        tile = Tile(
            heads[0].finish(leaf),
            heads[1].finish(other),
            targets[at],
            None,
            student.end_ids,
            None if about.merges_ends is None else about.merges_ends[at],
        )
        measured = about.part(at, {quantity: quantity.measure(tile) for quantity in quantities})
        losses = [weighted_loss([weighted], measured).total for weighted in terms]
        parts = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in losses]
        found[:, at] = _pulled_back(student, at, torch.stack(parts), vocab_size)
    return found


def _pulled_back(student: Side, at: slice, gradients: Tensor, vocab_size: int) -> Tensor:
    """Return [terms, positions, hidden] from [terms, positions, vocab], in one product."""
    num, positions = gradients.shape[:2]
    copies = student.hidden[at].detach().repeat(num, 1).requires_grad_()
    head: Projection = projection(replace(student, hidden=copies), vocab_size)
    everything = slice(0, num * positions)
    if isinstance(head, GraphProjection):
        head.project(everything)  # its graph is what the gradient is pulled through
    head.pull_back(everything, gradients.flatten(0, 1))
    return head.gradients[0].view(num, positions, -1)


def _gradients(
    outputs: Tensor, parameters: Sequence[Tensor], upstream: Tensor | None = None
) -> Sequence[Tensor]:
    """Return gradients, zeros where there are none; the graph is kept for other terms."""
    return torch.autograd.grad(
        outputs,
        list(parameters),
        upstream,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
