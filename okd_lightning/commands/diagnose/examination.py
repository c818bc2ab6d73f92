"""All measurements of ``diagnose``, inside a Trainer."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks import GKD, KD, OPDPlus
from okd_lightning.commands.diagnose.ends import end_check
from okd_lightning.commands.diagnose.findings import Cost, Diagnosis, Rows
from okd_lightning.commands.diagnose.gradients import GradientProbe
from okd_lightning.commands.diagnose.positions import measure_tokens, summarise
from okd_lightning.commands.diagnose.quantisation import quantisation_check
from okd_lightning.commands.diagnose.responses import (
    ResponseGenerator,
    Responses,
    chosen,
    given_responses,
)
from okd_lightning.commands.diagnose.steps import StepProbe
from okd_lightning.commands.diagnose.text_checks import text_checks, writing_checks
from okd_lightning.commands.diagnose.trials import run_trials
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ReverseKL
from okd_lightning.records.batches import DistillBatch, Example
from okd_lightning.teachers import Teacher
from okd_lightning.training.module import DistillationModule

_MOST_STEPS = 4  # of the drift


class Examination(Callback):
    """Callback that measures both models when ``trainer.validate`` begins, on their devices.

    Args:
        rows: Responses of each kind.
        batches: Optimizer steps of rollouts, and batches of the gradients, at least 2.
        part: Part of the data that is read as "val": "train" where the run has no validation data.
        say: Called with progress messages.

    Attributes:
        found: The diagnosis; None before.
    """

    def __init__(self, rows: int, batches: int, part: str, say: Callable[[str], None]) -> None:
        self.rows, self.batches, self.part = rows, batches, part
        self.found: Diagnosis | None = None
        self._say = say

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Measure everything; Lightning has disabled gradients, which are enabled where needed."""
        assert isinstance(pl_module, DistillationModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        with trainer.precision_plugin.forward_context(), torch.random.fork_rng():
            self.found = self._examine(trainer, pl_module, data)

    def _examine(
        self, trainer: lightning.Trainer, module: DistillationModule, data: RolloutDataModule
    ) -> Diagnosis:
        examples, learnt = _split(data, self.rows)
        checks = text_checks(module, data, "val", data.examples("val"), examples)
        generator = ResponseGenerator(module, data.sampling, data.max_response_length, data.seed)
        given = given_responses(examples, module.eos_ids)
        self._say(f"both models answer {len(examples)} prompts")
        own, teachers = (
            generator.generate("student", examples),
            generator.generate("teacher", examples),
        )
        checks += writing_checks(own, teachers, data.max_response_length)
        checks.append(end_check(module, (given, own, teachers), data.batch_size))
        self._say("divergences on given, own and the teacher's responses")
        rows = tuple(
            self._measured(module, responses, data.batch_size)
            for responses in (given, own, teachers)
            if responses.num_tokens
        )
        if module.pair.teacher_base is not None:
            forward = rows[0].measures["forward_kl"] if rows[0].source == "given" else None
            kinds = (given, own, teachers)
            checks.append(quantisation_check(module, kinds, forward, data.batch_size))
        per_step = data.global_batch_size or data.batch_size * trainer.accumulate_grad_batches
        self._say(f"rollouts of {self.batches} optimizer steps; gradients, sampled and exact")
        probe, steps = GradientProbe(module), StepProbe(module, trainer.gradient_clip_val)
        written: list[Responses] = []
        on_given, on_own = [], []
        for number, group in enumerate(_groups(learnt, self.batches, per_step, data.seed)):
            written.append(generator.generate("student", group, sample=1 + number))
            on_own.append(list(written[-1].batches(data.batch_size, module.device)))
            answers = given_responses(group, module.eos_ids)
            on_given.append(list(answers.batches(data.batch_size, module.device)))
            probe.add(_middle(on_own[-1]))
        self._say(f"{self.batches} steps of each of several methods, taken back again")
        has_answers = all(on_given)
        return Diagnosis(
            student=_described(module.pair.student_source, module.student),
            teacher=_described(_name_of(module.pair.teacher), module.teacher),
            checks=tuple(checks),
            rows=rows,
            gradients=probe.finding(),
            drift=tuple(steps.drift(_middle(on_own[0]), on_own[1 : 1 + _MOST_STEPS])),
            trials=run_trials(steps, on_given if has_answers else (), on_own, (given, own)),
            cost=Cost(
                seconds=_seconds(steps, on_given[0] if has_answers else (), on_own[0], written),
                rows=per_step,
                prompts=per_step // data.samples_per_prompt,
                tokens_per_second=sum(responses.num_tokens for responses in written)
                / max(sum(responses.seconds for responses in written), 1e-9),
                memory=steps.memory(),
                device=_device_name(module.device),
            ),
            part=self.part,
            learning_rate=module.learning_rate,
            schedule=module.optimization.given.schedule,
            seed=data.seed,
        )

    def _measured(self, module: DistillationModule, responses: Responses, size: int) -> Rows:
        return summarise(responses, measure_tokens(module, responses.batches(size, module.device)))


def _seconds(
    steps: StepProbe,
    on_given: Sequence[DistillBatch],
    on_own: Sequence[DistillBatch],
    written: Sequence[Responses],
) -> dict[str, float]:
    """Return seconds per optimizer step: micro-batches times the median one's, plus generation."""
    micro = len(on_own)
    writing = statistics.fmean(responses.seconds for responses in written)
    exact = GKD(divergence=ReverseKL(), on_policy_fraction=1.0)
    found = {"KD": micro * steps.seconds(KD(), _middle(on_given))} if on_given else {}
    return {
        **found,
        "GKD": micro * steps.seconds(exact, _middle(on_own)) + writing,
        "OPD+": micro * steps.seconds(OPDPlus(), _middle(on_own)) + writing,
        "writing": writing,
    }


def _split(data: RolloutDataModule, num: int) -> tuple[list[Example], list[Example]]:
    """Return the examples to measure and those to train on: the training set, or the other rows."""
    everything = data.examples("val").examples
    if data.sources["train"] not in (None, data.sources["val"]):
        return chosen(everything, num, data.seed), list(data.examples("train").examples)
    held_out = chosen(everything, min(num, max(1, len(everything) // 2)), data.seed)
    taken = {example.index for example in held_out}
    return held_out, [example for example in everything if example.index not in taken]


def _groups(examples: Sequence[Example], num: int, size: int, seed: int) -> Iterator[list[Example]]:
    """Yield the prompts of ``num`` steps; where there are too few, from the start again."""
    picked = itertools.cycle(chosen(examples, num * size, seed + 1))
    for _ in range(num):
        yield list(itertools.islice(picked, size))


def _middle(batches: Sequence[DistillBatch]) -> DistillBatch:
    """Return the median of a step's micro-batches, which are sorted by length."""
    return batches[len(batches) // 2]


def _name_of(teacher: Teacher) -> object:
    return teacher.mark if len(teacher.own_sources) > 1 else teacher.source


def _described(source: object, model: torch.nn.Module | None) -> str:
    name = source if isinstance(source, str) else "a model from a config"
    if model is None:
        return f"{name} (the student itself)"
    return f"{name}, {sum(p.numel() for p in model.parameters()):,} parameters"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num = torch.get_num_threads()
    return f"{device.type}, {num} {'thread' if num == 1 else 'threads'}"
