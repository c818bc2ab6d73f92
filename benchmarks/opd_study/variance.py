"""Bias and variance of the sampled gradients of one optimizer step, against the exact one.

All estimators see the same rollouts and share one forward pass. Gradients are taken with respect to
all of the student's parameters; both losses are divided by the same number of tokens. Given the
prefixes the exact gradient is the sampled one's expectation, so that their difference has mean zero
where a credit is unbiased, and its mean over batches is measured with less noise than either.
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
from okd_lightning.module import DistillationModule
from okd_lightning.records import Example, collate
from okd_lightning.rollouts import NoiseStream, Sampling
from okd_lightning.rollouts.evaluation import prompt_batch
from okd_lightning.rollouts.rows import written_row

_DIVERGENCES: Mapping[str, Divergence] = {
    "ReverseKL": ReverseKL(),
    "ForwardKL": ForwardKL(),
    "JensenShannon": JensenShannon(0.5),
}
EXACT = "exact"
LENGTH = 32
_CLIPS = {"clip 6": 6.0, "clip 2": 2.0}


def estimators(divergence: Divergence) -> dict[str, DistillationCallback]:
    """The exact term first, then every credit."""
    found: dict[str, DistillationCallback] = {
        EXACT: GKD(divergence=divergence, on_policy_fraction=1.0),
        "stopped_reward": OPD(divergence),
    }
    for variant in ("as_published", "centred", "value_baseline"):
        found[variant] = OPDPlus(divergence, variant)
    for name, bound in _CLIPS.items() if not isinstance(divergence, JensenShannon) else ():
        found[f"centred, {name}"] = OPDPlus(divergence, "centred", max_log_ratio=bound)
    return found


class Gradients:
    """What is known of one estimator after some batches: sums, never the gradients themselves."""

    def __init__(self) -> None:
        self.num = 0
        self.total: Tensor | float = 0.0  # of the gradient
        self.squares = 0.0
        self.gap: Tensor | float = 0.0  # of its difference from the exact one
        self.gap_squares = 0.0
        self.dots: list[float] = []  # with the exact gradient of the same batch

    def add(self, gradient: Tensor, exact: Tensor) -> None:
        """One batch's."""
        gap = gradient - exact
        self.num += 1
        self.total = self.total + gradient
        self.squares += float(gradient @ gradient)
        self.gap = self.gap + gap
        self.gap_squares += float(gap @ gap)

    @property
    def mean(self) -> Tensor:
        """Over batches."""
        assert isinstance(self.total, Tensor)
        return self.total / self.num

    @property
    def trace(self) -> float:
        """Of the covariance of one batch's gradient."""
        return (self.squares - self.num * float(self.mean @ self.mean)) / (self.num - 1)

    def bias(self) -> tuple[Tensor, float]:
        """Mean difference from the exact gradient, and the square of its standard error."""
        assert isinstance(self.gap, Tensor)
        mean = self.gap / self.num
        trace = (self.gap_squares - self.num * float(mean @ mean)) / (self.num - 1)
        return mean, trace / self.num


def summary(own: Gradients, exact: Gradients, along: list[float]) -> dict[str, float]:
    """The numbers of one row of the table; all relative to the exact gradient's norm.

    Args:
        own: Of the estimator.
        exact: Of the exact gradient on the same batches.
        along: (g - g_exact) · g_exact of each batch over |mean exact|², for its standard error.
    """
    size = float(exact.mean @ exact.mean) - exact.trace / exact.num  # without its own noise
    gap, noise = own.bias()
    num = len(along)
    mean = sum(along) / num
    error = math.sqrt(sum((x - mean) ** 2 for x in along) / (num - 1) / num)
    signal = float(own.mean @ own.mean) - own.trace / own.num
    inner = float(own.mean @ exact.mean) - exact.trace / exact.num  # the prefixes are shared
    return {
        "bias": round(math.sqrt(max(0.0, float(gap @ gap) - noise) / size), 4),
        "raw_bias": round(math.sqrt(float(gap @ gap) / size), 4),
        "noise_of_bias": round(math.sqrt(noise / size), 4),
        "along_exact": round(1 + mean, 4),
        "along_exact_error": round(error, 4),
        "cosine": round(inner / math.sqrt(max(signal, 1e-30) * size), 4),
        "variance": round(own.trace / size, 4),
        "snr": round(math.sqrt(max(0.0, signal) / own.trace), 4),
        "batches": num,
    }


class VarianceStudy:
    """Measures both tables on the TinyStories pair.

    Args:
        shared: Folder with models/ and datasets/.
        root: Where Trainers may write.
        rows: Rollouts a batch.
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
        """On-policy, exact reverse KL."""
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
        """Divergence → estimator → the row of its table."""
        examples = self.data.examples("train").examples
        terms = {name: estimators(divergence) for name, divergence in _DIVERGENCES.items()}
        sums = {name: {label: Gradients() for label in group} for name, group in terms.items()}
        inner: dict[tuple[str, str], list[float]] = {}
        self.module.train()
        for number in range(num_batches):
            start = number * self.rows % (len(examples) - self.rows)
            for name, gradients in self._batch(examples[start : start + self.rows], terms).items():
                exact = gradients[EXACT]
                for label, gradient in gradients.items():
                    sums[name][label].add(gradient, exact)
                    along = float((gradient - exact) @ exact)
                    inner.setdefault((name, label), []).append(along)
        return {name: self._rows(name, group, inner) for name, group in sums.items()}

    def _rows(
        self, name: str, group: dict[str, Gradients], inner: dict[tuple[str, str], list[float]]
    ) -> dict[str, dict[str, float]]:
        exact = group[EXACT]
        size = float(exact.mean @ exact.mean) - exact.trace / exact.num
        along = {label: [x / size for x in inner[name, label]] for label in group}
        return {label: summary(own, exact, along[label]) for label, own in group.items()}

    def _batch(
        self, examples: list[Example], terms: Mapping[str, Mapping[str, DistillationCallback]]
    ) -> dict[str, dict[str, Tensor]]:
        """Every estimator's gradient on the student's own responses to some prompts."""
        rollout = self.module.write(
            "student", prompt_batch(examples), Sampling(), NoiseStream(1, 0), LENGTH
        )
        batch = collate(
            [
                written_row(example, "student", ids, logprobs)
                for example, ids, logprobs in zip(
                    examples, rollout.response_ids, rollout.logprobs, strict=True
                )
            ]
        )
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
                flat = torch.cat([part.flatten() for part in parts]).double()
                found.setdefault(name, {})[label] = flat
        return found
