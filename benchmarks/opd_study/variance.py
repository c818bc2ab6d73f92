"""Bias and variance of the sampled gradients of one optimizer step, against the exact one.

All estimators see the same rollouts and share one forward pass. Gradients are taken with respect to
all of the student's parameters; both losses are divided by the same number of tokens. Given the
prefixes, the exact gradient is the expectation of the sampled one, so their difference has mean
zero where an advantage is unbiased. Products of means are taken over pairs of different batches, so
that the noise of one batch is not multiplied with itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from okd_lightning.callbacks import GKD, OPD, DistillationCallback, OPDPlus
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.metrics import gradient_fidelity
from okd_lightning.records.batches import Example
from okd_lightning.records.collation import collate, sampled_rows
from okd_lightning.records.requests import Request
from okd_lightning.training.module import DistillationModule

_DIVERGENCES: Mapping[str, Divergence] = {
    "ReverseKL": ReverseKL(),
    "ForwardKL": ForwardKL(),
    "JensenShannon": JensenShannon(0.5),
}
EXACT = "exact"
LENGTH = 32


def estimators(divergence: Divergence) -> dict[str, DistillationCallback]:
    """Return the exact term first, then the distinct advantages."""
    found: dict[str, DistillationCallback] = {
        EXACT: GKD(divergence=divergence, on_policy_fraction=1.0),
        "centred": OPDPlus(divergence, "centred"),
    }
    if isinstance(divergence, ReverseKL):  # stopped_reward equals centred here
        found["centred, clip 6"] = OPDPlus(divergence, "centred", max_log_ratio=6.0)
    else:
        found["stopped_reward"] = OPD(divergence)
    if not isinstance(divergence, JensenShannon):  # JSD's as_published is the centred one
        found["as_published"] = OPDPlus(divergence, "as_published")
        found["centred, clip 2"] = OPDPlus(divergence, "centred", max_log_ratio=2.0)
    if not isinstance(divergence, ForwardKL):  # forward KL's value is what centring subtracts
        found["value_baseline"] = OPDPlus(divergence, "value_baseline")
    return found


def summary(own: Tensor, exact: Tensor) -> dict[str, float | None]:
    """Return the numbers of one row; ``variance`` is GradientFidelity's ``noise``."""
    found = gradient_fidelity(own, exact)
    row: dict[str, float | None] = {"variance": round(found.noise, 3), "batches": found.batches}
    for name, value, error in (
        ("along_exact", found.along_exact, found.along_error),
        ("cosine", found.cosine, found.cosine_error),
    ):
        row[name] = round(value, 4) if math.isfinite(error) else None
        row[f"{name}_error"] = round(error, 4) if math.isfinite(error) else None
    return row


class VarianceStudy:
    """Measurement of both tables on the TinyStories pair.

    Args:
        shared: Folder with models/ and datasets/.
        root: Folder in which Trainers may write.
        rows: Rollouts per batch.
    """

    def __init__(self, shared: Path, root: Path, rows: int = 16) -> None:
        lightning.seed_everything(0, verbose=False)
        models, data = shared / "models", shared / "datasets" / "tinystories"
        self.root, self.rows = root, rows
        self.module = DistillationModule(
            str(models / "student75K"), str(models / "stories260K"), learning_rate=1e-3
        )
        self.data = RolloutDataModule(
            str(data / "train.jsonl"),
            batch_size=16,
            max_prompt_length=48,
            max_response_length=LENGTH,
            seed=0,
        )

    def train(self, steps: int) -> None:
        """Train on-policy with exact reverse KL."""
        lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            callbacks=[GKD(divergence=ReverseKL(), on_policy_fraction=1.0)],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            inference_mode=False,
            gradient_clip_val=1.0,
            default_root_dir=self.root,
        ).fit(self.module, self.data)

    def measure(self, num_batches: int) -> dict[str, dict[str, Any]]:
        """Return divergence → estimator → its row."""
        examples = self.data.examples("train").examples
        terms = {name: estimators(divergence) for name, divergence in _DIVERGENCES.items()}
        self.module.train()
        drawn = [
            self._batch(examples[start : start + self.rows], terms)
            for start in range(0, num_batches * self.rows, self.rows)
        ]
        return {name: self._rows(name, list(group), drawn) for name, group in terms.items()}

    def _rows(
        self, name: str, labels: list[str], drawn: list[dict[str, dict[str, Tensor]]]
    ) -> dict[str, dict[str, float | None]]:
        exact = torch.stack([batch[name][EXACT] for batch in drawn])
        return {
            label: summary(torch.stack([batch[name][label] for batch in drawn]), exact)
            for label in labels
        }

    def _batch(
        self, examples: list[Example], terms: Mapping[str, Mapping[str, DistillationCallback]]
    ) -> dict[str, dict[str, Tensor]]:
        """Return every estimator's gradient on on-policy samples of some prompts."""
        prompts = tuple(example.prompt_for("student") for example in examples)
        rollout = self.module.respond(Request(prompts, Sampling(), NoiseStream(1, 0), LENGTH))
        batch = collate(sampled_rows(examples, "student", rollout))
        asked = [q for group in terms.values() for term in group.values() for q in term.quantities]
        measured = self.module.measure(batch, asked)
        parameters = self.module.trained_parameters(self.module.student)
        found: dict[str, dict[str, Tensor]] = {}
        for name, group in terms.items():
            for label, term in group.items():
                output = term.loss(measured)
                parts = torch.autograd.grad(
                    output.sum / (self.rows * LENGTH), parameters, retain_graph=True
                )
                flat = torch.cat([part.flatten() for part in parts])
                found.setdefault(name, {})[label] = flat
        return found
