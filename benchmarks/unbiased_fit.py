"""Bias and error of the steps that ``Trainer.fit`` makes, against the enumerated gradient.

    python benchmarks/unbiased_fit.py [--seconds 20] [--credit centred] [--discount 1]

A tiny Llama of five ids answers one prompt with up to four tokens, so that all 85 prefixes, their
probabilities and the gradient of the objective can be enumerated in float64. Each method then runs
through ``Trainer.fit`` at learning rate 0, with new rollouts for every optimizer step, for
``--seconds`` of CPU time a row. Recorded are the gradients that the optimizer is given, times m,
the mean length of earlier rollouts that the step was divided by: m changes slowly, so that its own
noise (0.02 of a run of 1000 steps of one rollout) would not show in the standard error.

* *along*: the mean step along the true gradient over its length, with its standard error;
  1 is unbiased. ``token_mean`` is what the same steps are with that divisor, times the true mean
  length.
* *error²*: the squared error of the mean step over what its own noise explains; 1 is unbiased.
* *RMSE*: the root mean square error of one step over the length of the true gradient.

The objective is the expected sum of divergences, at discount 0 along fixed prefixes, at 1 with the
prefixes' own dependence on the student.
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

import tiny  # noqa: E402

from okd_lightning import DistillationModule  # noqa: E402
from okd_lightning.callbacks import GKD, DistillationCallback, OPDPlus  # noqa: E402
from okd_lightning.data import RolloutDataModule  # noqa: E402
from okd_lightning.divergences import ReverseKL  # noqa: E402

LETTERS, PROMPT, LONGEST, NOISE = "ab", "ab", 4, 0.35
VARIANTS = ("as_published", "centred", "value_baseline")
STEPS_PER_EPOCH = 200


def pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student, and a teacher that is the student with noise on its weights."""
    tiny.NUM_IDS = 3 + len(LETTERS)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    student = tiny.make_llama(4, rows=tiny.NUM_IDS, **shape, **heads)
    teacher = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in teacher.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(NOISE * weight.std() * noise if weight.numel() > 1 else 0 * noise)
    return student, teacher


@dataclass(frozen=True)
class Truth:
    """The gradients at discount 0 and 1, flat and sorted by name, and the lengths of responses."""

    gradients: tuple[Tensor, Tensor]
    mean_length: float
    length_deviation: float


def flat(gradients: dict[str, Tensor]) -> Tensor:
    """[parameters] float64, sorted by name."""
    return torch.cat([gradients[name].double().flatten() for name in sorted(gradients)])


def enumerate_truth(student: PreTrainedModel, teacher: PreTrainedModel) -> Truth:
    """Every prefix that has not ended, level by level, without the library's losses."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    prompt = tiny.make_tokenizer(LETTERS)(PROMPT)["input_ids"]
    going = [token for token in range(tiny.NUM_IDS) if token != tiny.EOS]
    prefixes, logprobs = [prompt], torch.zeros(1).double()
    objectives = [torch.zeros(()).double(), torch.zeros(()).double()]
    moments = [0.0, 0.0]
    for length in range(1, LONGEST + 1):
        ids = torch.tensor(prefixes)
        log_p = student(ids).logits[:, -1].log_softmax(-1)
        log_q = teacher(ids).logits[:, -1].log_softmax(-1).detach()
        values = (log_p.exp() * (log_p - log_q)).sum(-1)
        reach = logprobs.exp()
        objectives[0] = objectives[0] + (reach.detach() * values).sum()
        objectives[1] = objectives[1] + (reach * values).sum()
        ends = reach * (log_p[:, tiny.EOS].exp() if length < LONGEST else 1.0)
        for power in (1, 2):
            moments[power - 1] += float(ends.sum().detach()) * length**power
        logprobs = (logprobs[:, None] + log_p[:, going]).flatten()
        prefixes = [[*prefix, token] for prefix in prefixes for token in going]
    named = dict(student.named_parameters())
    found = []
    for objective in objectives:
        gradients = torch.autograd.grad(objective, list(named.values()), retain_graph=True)
        found.append(flat(dict(zip(named, gradients, strict=True))))
    return Truth((found[0], found[1]), moments[0], (moments[1] - moments[0] ** 2) ** 0.5)


class Steps(Callback):
    """The sum of every optimizer step over its rollouts, and these over its tokens.

    Args:
        seconds: CPU time after which the run ends.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.gradients: list[Tensor] = []
        self.by_tokens: list[float] = []

    def on_train_start(self, trainer, pl_module):
        """Set-up does not count."""
        self.end = time.process_time() + self.seconds

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Remember both divisors."""
        self.mean_tokens = batch.sampled.mean_tokens
        self.by_tokens.append(batch.sampled.rollouts / sum(batch.step_counts))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        """Keep the gradient, without m."""
        found = {name: p.grad for name, p in pl_module.student.named_parameters()}
        self.gradients.append(flat(found) * self.mean_tokens)
        trainer.should_stop = time.process_time() > self.end


def steps_of(
    method: DistillationCallback,
    rollouts: int,
    models: tuple[PreTrainedModel, PreTrainedModel],
    seconds: float,
    seed: int,
) -> Steps:
    """A run of one method."""
    student, teacher = map(copy.deepcopy, models)
    module = DistillationModule(
        student, teacher, tokenizer=tiny.make_tokenizer(LETTERS), learning_rate=0.0
    )
    rows = [{"prompt": PROMPT, "response": LETTERS[0]}] * (rollouts * STEPS_PER_EPOCH)
    data = RolloutDataModule(
        rows, batch_size=rollouts, max_response_length=LONGEST, val_rollouts=0, seed=seed
    )
    steps = Steps(seconds)
    with tempfile.TemporaryDirectory() as folder:
        tiny.make_trainer(Path(folder), [method, steps], max_epochs=-1).fit(module, data)
    return steps


def figures(steps: Steps, truth: Tensor, mean_length: float) -> str:
    """The cells of a row."""
    size = truth.norm()
    found = torch.stack(steps.gradients)
    tokens = torch.tensor(steps.by_tokens[: len(found)]).double()[:, None] * mean_length
    error = found.std(0).square().sum() / len(found)
    cells = []
    for some in (found, found * tokens):
        along = some @ truth / size**2
        cells.append(f"{float(along.mean()):.3f} ± {float(along.std()) / len(along) ** 0.5:.3f}")
    cells.insert(1, f"{float((found.mean(0) - truth).square().sum() / error):.2f}")
    rmse = (found - truth).norm(dim=1).square().mean().sqrt() / size
    return " | ".join([str(len(found)), *cells, f"{float(rmse):.2f}"])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--credit", nargs="+", help="such as value_baseline; all by default")
    parser.add_argument("--discount", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[1, 2, 8])
    options = parser.parse_args()
    seconds = options.seconds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "okd_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    models = pair()
    truth = enumerate_truth(*models)
    print(f"reverse KL; lengths {truth.mean_length:.2f} ± {truth.length_deviation:.2f}\n")
    print("| credit | discount | rollouts | steps | along | error² | `token_mean` | RMSE |")
    print("|---|---|---|---|---|---|---|---|")
    exact = GKD(divergence=ReverseKL(), on_policy_fraction=1.0)
    methods = [("exact (GKD)", 0, exact)] + [
        (variant, discount, OPDPlus(ReverseKL(), variant, float(discount)))
        for discount in (0, 1)
        for variant in VARIANTS
    ]
    for number, (name, discount, method) in enumerate(methods):
        is_wanted = not options.credit or name.split()[0] in options.credit
        if not is_wanted or discount not in options.discount:
            continue
        for rollouts in options.rollouts:
            steps = steps_of(method, rollouts, models, seconds, seed=100 * number + rollouts)
            cells = figures(steps, truth.gradients[discount], truth.mean_length)
            print(f"| {name} | {discount} | {rollouts} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
