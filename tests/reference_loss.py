"""The slow reference of every loss: one row at a time, all logits, float64; nothing of ours.

A row is (ids, mask, source). Models are copied to float64 and read without padding, so that neither
masks nor batches can matter; ids beyond the tokenizer's are cut before the softmax.
"""

from __future__ import annotations

import copy

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

INF = float("inf")


def double(model):
    """A float64 copy in eval mode."""
    return copy.deepcopy(model).double().eval()


class Snapshots(Callback):
    """Keep a float64 copy of the student before every optimizer step."""

    def __init__(self) -> None:
        self.students = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.students.append(double(pl_module.student))


def row_logprobs(model, ids: list[int], num_ids: int, temperature: float = 1.0) -> Tensor:
    """[len(ids) - 1, num_ids]: the log-probabilities of tokens 1, 2, ... of one row."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1, :num_ids]
    return (logits / temperature).log_softmax(-1)


def plain_sum(p: Tensor, values: Tensor) -> Tensor:
    """sum_a p(a) values(a), with 0 · anything = 0."""
    return torch.where(p > 0, p * values, torch.zeros_like(p)).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) a position."""
    return plain_sum(log_a.exp(), log_a - log_b)


def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """beta KL(q‖m) + (1 - beta) KL(p‖m), m = beta q + (1 - beta) p; the KLs at the ends."""
    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    log_m = (beta * log_q.exp() + (1 - beta) * log_p.exp()).log()
    return beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)


def skew_forward(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return kl(log_q, (alpha * log_q.exp() + (1 - alpha) * log_p.exp()).log())


def skew_reverse(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    return kl(log_p, ((1 - alpha) * log_q.exp() + alpha * log_p.exp()).log())


def of_u(f):
    """The divergence sum_a p f(q/p) of a textbook f."""
    return lambda log_p, log_q: plain_sum(log_p.exp(), f((log_q - log_p).exp()))


def mean_loss(student, rows, values, num_ids: int, teacher=None, temperature=1.0) -> Tensor:
    """Mean of ``values(log_p, log_q, target_log_p, source)`` over the masked-in tokens of all rows.

    ``values`` gets tempered log-probabilities, and the target's at temperature 1; it gives one
    number per position, or None where it does not act on rows of that source.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, mask, source in rows:
        keep = torch.tensor(mask[1:], dtype=torch.bool)
        if not keep.any():
            continue
        log_p = row_logprobs(student, ids, num_ids, temperature)
        plain = row_logprobs(student, ids, num_ids)
        target = plain.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        log_q = None
        if teacher is not None:
            with torch.no_grad():
                log_q = row_logprobs(teacher, ids, num_ids, temperature)[keep]
        found = values(log_p[keep], log_q, target[keep], source)
        if found is not None:
            total, count = total + found.sum(), count + int(keep.sum())
    return total / max(1, count)


def gradients(model, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients by parameter name."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
