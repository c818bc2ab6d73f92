"""A few real optimizer steps: the change of the student, and their cost.

The student's trained weights are restored bit for bit; nothing on disk changes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from okd_lightning.callbacks import GKD, DistillationCallback
from okd_lightning.commands.diagnose.findings import Drift
from okd_lightning.divergences import ReverseKL
from okd_lightning.losses import DrawnLogProb, WeightedTerm
from okd_lightning.records.batches import SOURCES, DistillBatch, Source
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.optimizers import build_optimizer

_DRAWN = DrawnLogProb("student")
_ADAM_NUMBERS = 2
_BYTES_OF_FLOAT32 = 4
_FAR_DOWN, _FAR_UP = 0.8, 1.25
_REPETITIONS = 2


class StepProbe:
    """Training steps on existing batches.

    Args:
        module: A module whose models are on their devices.
        clip_norm: The Trainer's gradient clipping norm; None for off.
    """

    def __init__(self, module: DistillationModule, clip_norm: float | None) -> None:
        self.module = module
        self.clip_norm = clip_norm
        self.parameters = module.trained_parameters(module.student)

    def seconds(
        self, method: DistillationCallback, batch: DistillBatch, repetitions: int = _REPETITIONS
    ) -> float:
        """Time forward and backward of one micro-batch: the fastest one after a warm-up."""
        taken = []
        for _ in range(1 + repetitions):
            self._synchronize()
            start = time.perf_counter()
            self._backward(method, batch, _tokens_of([batch]))
            self._synchronize()
            taken.append(time.perf_counter() - start)
            self._forget_gradients()
        return min(taken[1:])

    def drift(self, probe: DistillBatch, steps: Sequence[Sequence[DistillBatch]]) -> list[Drift]:
        """Return the drift of other responses after 1, 2, 4, ... exact on-policy steps.

        The steps use the run's learning rate after its warm-up and a new optimizer, whose first
        steps are its largest. All batches were generated before them.

        Args:
            probe: Responses that are measured before and after.
            steps: The micro-batches of every step.
        """
        method = GKD(divergence=ReverseKL(), on_policy_fraction=1.0)
        with self.kept():
            before, found = self._drawn(probe), []
            for step in self.take(method, steps):
                # powers of two
                if step & (step - 1) == 0:
                    found.append(drift_between(step, before, self._drawn(probe)))
        return found

    def take(
        self, method: DistillationCallback, steps: Iterable[Sequence[DistillBatch]]
    ) -> Iterator[int]:
        """Take optimizer steps without warm-up; yield the number of each, from 1, after the step.

        Args:
            method: Whose loss is minimised, with its further terms.
            steps: The micro-batches of every step; each term is divided by the tokens of its own
                rows in all of them.
        """
        module = self.module
        optimizer = build_optimizer(
            self.parameters,
            [],
            module.learning_rate,
            module.weight_decay,
            factory=module.optimization.given.optimizer,
        )
        for step, batches in enumerate(steps, 1):
            tokens = _tokens_of(batches)
            for batch in batches:
                self._backward(method, batch, tokens)
            if self.clip_norm:
                clip_grad_norm_(self.parameters, self.clip_norm)
            optimizer.step()
            self._forget_gradients()
            yield step

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Restore the student's trained weights at the end of the block."""
        copies = [parameter.detach().clone() for parameter in self.parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, copy in zip(self.parameters, copies, strict=True):
                    parameter.copy_(copy)
                    parameter.grad = None

    def memory(self) -> dict[str, int]:
        """Return the bytes that a run holds from its first step on, and the peak so far."""
        teachers = self.module.pair.teacher.models
        trained = sum(p.numel() for p in self.parameters)
        found = {
            "student": _num_bytes(self.module.student),
            "teacher": sum(map(_num_bytes, teachers)),
            "gradients": sum(p.numel() * p.element_size() for p in self.parameters),
            "optimizer (AdamW)": _ADAM_NUMBERS * _BYTES_OF_FLOAT32 * trained,
        }
        if self.module.device.type == "cuda":
            found["peak on the device"] = torch.cuda.max_memory_allocated(self.module.device)
        else:
            # ru_maxrss is in bytes on macOS, in KiB elsewhere
            unit = 1 if sys.platform == "darwin" else 1024
            found["peak of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return found

    def _backward(
        self, method: DistillationCallback, batch: DistillBatch, tokens: Mapping[Source, int]
    ) -> None:
        """Add the gradient of a micro-batch, as in a run: every term's weight over its divisor."""
        weighted = []
        for term in method.terms:
            count = sum(tokens[source] for source in term.sources)
            weighted.append(WeightedTerm(term, term.weight(0) / max(1, count)))
        with torch.enable_grad():
            self.module.pair.loss_of(batch, weighted).total.backward()

    @torch.no_grad()
    def _drawn(self, batch: DistillBatch) -> Tensor:
        """Return [positions] log-probabilities of the sampled tokens, float64."""
        return self.module.measure(batch, (_DRAWN,))[_DRAWN].double()

    def _forget_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _synchronize(self) -> None:
        if self.module.device.type == "cuda":
            torch.cuda.synchronize(self.module.device)


def drift_between(steps: int, before: Tensor, after: Tensor) -> Drift:
    """Return the change of sampled tokens' log-probabilities.

    Args:
        steps: Number of steps between both.
        before: [tokens] nats.
        after: [tokens] nats.
    """
    log_ratio = after - before
    ratio = log_ratio.exp()
    is_far = (ratio < _FAR_DOWN) | (ratio > _FAR_UP)
    effective = ratio.sum().square() / (len(ratio) * ratio.square().sum())
    return Drift(
        steps=steps,
        mean_log_ratio=float(log_ratio.abs().mean()),
        outside=float(is_far.double().mean()),
        effective_share=float(effective),
    )


def _tokens_of(batches: Sequence[DistillBatch]) -> dict[Source, int]:
    """Return the loss tokens of some micro-batches by their generator."""
    found = dict.fromkeys(SOURCES, 0)
    for batch in batches:
        counts = batch.mask[:, 1:].sum(1).tolist()
        for code, count in zip(batch.source.tolist(), counts, strict=True):
            found[SOURCES[code]] += count
    return found


def _num_bytes(model: nn.Module | None) -> int:
    """Return the bytes of a model's weights; shared ones count once."""
    assert model is not None
    return sum(p.numel() * p.element_size() for p in model.parameters())
