"""Gradients of every estimator on the same rollouts, compared with the exact gradient.

Both models run once per batch. Every estimator then runs through the tiles of the training loss, so
memory is that of a training step. Of a large student only the gradients of the last parameters are
kept: bias and noise of an advantage show there as they do in earlier layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from okd_lightning.callbacks import GKD, OPD, DistillationCallback, OPDPlus
from okd_lightning.commands.diagnose.findings import EstimatorFinding, GradientFinding
from okd_lightning.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, TopK
from okd_lightning.losses import Measured, WeightedTerm, fused_loss
from okd_lightning.metrics import gradient_fidelity
from okd_lightning.records.batches import DistillBatch
from okd_lightning.training.module import DistillationModule

EXACT = "exact"
MOST_PARAMETERS = 250_000
"""Largest number of gradient entries that are kept, per estimator and batch."""

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


def probed_parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the last parameters with at most ``MOST_PARAMETERS`` entries in all.

    All parameters of a small student. Matrices that are larger alone (heads, embeddings) are
    skipped.
    """
    found, left = [], MOST_PARAMETERS
    for parameter in reversed(list(parameters)):
        if parameter.numel() <= left:
            found.append(parameter)
            left -= parameter.numel()
    return found


class GradientProbe:
    """Collection of gradients, batch by batch.

    Args:
        module: A module whose models are on their devices.
    """

    def __init__(self, module: DistillationModule) -> None:
        self.module = module
        self.methods = estimators(module.vocabulary.size)
        trained = module.trained_parameters(module.student)
        self.parameters = probed_parameters(trained)
        self.of_parameters = sum(p.numel() for p in trained)
        self._found: dict[tuple[str, str], list[Tensor]] = {}
        self._rows = self._batches = 0

    def add(self, batch: DistillBatch) -> None:
        """Add one batch of on-policy samples.

        Args:
            batch: A batch on the models' device.
        """
        module = self.module
        terms = {
            (divergence, name): method.term
            for divergence, group in self.methods.items()
            for name, method in group.items()
        }
        asked = [quantity for term in terms.values() for quantity in term.quantities]
        with torch.enable_grad():
            student, teacher, base = module.pair.sides(batch, asked)
            for key, term in terms.items():
                loss = fused_loss(
                    [WeightedTerm(term, 1.0 / len(batch))],
                    student,
                    teacher,
                    batch.student_reads.targets,
                    Measured.about(batch),
                    module.vocabulary.size,
                    module.pair.settings.tile_positions,
                    base,
                )
                self._found.setdefault(key, []).append(self._gradient(loss.total))
        self._rows, self._batches = max(self._rows, len(batch)), self._batches + 1

    def finding(self) -> GradientFinding:
        """Compare every estimator with its divergence's exact gradient, over all batches."""
        gradients = {key: torch.stack(parts) for key, parts in self._found.items()}
        rows = tuple(
            EstimatorFinding(divergence, name, gradient_fidelity(own, gradients[divergence, EXACT]))
            for (divergence, name), own in gradients.items()
        )
        kept = sum(p.numel() for p in self.parameters)
        return GradientFinding(rows, self._batches, self._rows, kept, self.of_parameters)

    def _gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient as [parameters], float32 on the CPU."""
        parts = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        flat = [
            (torch.zeros_like(p) if part is None else part).flatten().float()
            for part, p in zip(parts, self.parameters, strict=True)
        ]
        return torch.cat(flat).cpu()
