"""The examination of a pair: everything that ``diagnose`` measures, inside a Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks import GKD, KD, OPDPlus
from okd_lightning.data import RolloutDataModule
from okd_lightning.diagnose.findings import Cost, Diagnosis, Rows
from okd_lightning.diagnose.gradients import GradientProbe
from okd_lightning.diagnose.positions import measure_tokens, summarise
from okd_lightning.diagnose.responses import Responses, ResponseWriter, chosen, given_responses
from okd_lightning.diagnose.steps import StepProbe
from okd_lightning.diagnose.text_checks import text_checks, writing_checks
from okd_lightning.diagnose.trials import run_trials
from okd_lightning.divergences import ReverseKL
from okd_lightning.module import DistillationModule
from okd_lightning.records import DistillBatch, Example

_MOST_STEPS = 4  # of the drift


class Examination(Callback):
    """Examines both models when a ``trainer.validate`` begins, where they are on their devices.

    Args:
        rows: Responses of each kind.
        batches: Batches of the gradients, at least 2.
        say: Called with what is being done.

    Attributes:
        found: The diagnosis; None before.
    """

    def __init__(self, rows: int, batches: int, say: Callable[[str], None]) -> None:
        self.rows, self.batches = rows, batches
        self.found: Diagnosis | None = None
        self._say = say

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """All of it; Lightning has switched gradients off, they are switched on where needed."""
        assert isinstance(pl_module, DistillationModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        with trainer.precision_plugin.forward_context(), torch.random.fork_rng():
            self.found = self._examine(trainer, pl_module, data)

    def _examine(
        self, trainer: lightning.Trainer, module: DistillationModule, data: RolloutDataModule
    ) -> Diagnosis:
        part = "val" if data.sources["val"] is not None else "train"
        everything = data.examples(part)
        examples = chosen(everything.examples, self.rows, data.seed)
        checks = text_checks(module, data, part, everything, examples)
        writer = ResponseWriter(module, data.sampling, data.max_response_length, data.seed)
        given = given_responses(examples, module.eos_ids)
        self._say(f"both models answer {len(examples)} prompts")
        own, teachers = writer.write("student", examples), writer.write("teacher", examples)
        checks += writing_checks(own, teachers, data.max_response_length)
        self._say("divergences on given, own and the teacher's responses")
        rows = tuple(
            self._measured(module, responses, data.batch_size)
            for responses in (given, own, teachers)
            if responses.num_tokens
        )
        self._say(f"gradients of {self.batches} batches, sampled and exact")
        prompts = _prompts(data, everything.examples, self.batches * data.batch_size)
        probe, written = GradientProbe(module), []
        for number, group in enumerate(prompts):
            responses = writer.write("student", group, sample=1 + number)
            batches = list(responses.batches(data.batch_size, module.device))
            if batches:
                probe.add(batches[0])
                written.append((responses, batches[0]))
        self._say(f"{len(written)} steps of each of several methods, taken back again")
        steps = StepProbe(module, trainer.gradient_clip_val)
        batches = [batch for _, batch in written]
        drift = steps.drift(batches[0], batches[1 : 1 + _MOST_STEPS])
        to_learn = _given_batches(module, data, self.batches, held_out=examples)
        trials = run_trials(steps, to_learn, batches, (given, own))
        return Diagnosis(
            student=_described(module.student_source, module.student),
            teacher=_described(module.teacher_source, module.teacher),
            checks=tuple(checks),
            rows=rows,
            gradients=probe.finding(),
            drift=tuple(drift),
            trials=trials,
            cost=self._cost(trainer, data, steps, given, written),
            learning_rate=module.learning_rate,
            seed=data.seed,
        )

    def _measured(self, module: DistillationModule, responses: Responses, size: int) -> Rows:
        return summarise(responses, measure_tokens(module, responses.batches(size, module.device)))

    def _cost(
        self,
        trainer: lightning.Trainer,
        data: RolloutDataModule,
        steps: StepProbe,
        given: Responses,
        written: list[tuple[Responses, DistillBatch]],
    ) -> Cost:
        """Of an optimizer step: micro-batches times what one of them takes."""
        per_step = data.global_batch_size or data.batch_size * trainer.accumulate_grad_batches
        micro = max(1, per_step // data.batch_size)
        batch = written[0][1]
        writing = sum(responses.seconds for responses, _ in written) / len(written)
        exact = GKD(divergence=ReverseKL(), on_policy_fraction=1.0)
        seconds = {
            "GKD": micro * (steps.seconds(exact, batch) + writing),
            "OPD+": micro * (steps.seconds(OPDPlus(), batch) + writing),
            "writing": micro * writing,
        }
        on_given = next(iter(given.batches(data.batch_size, steps.module.device)), None)
        if on_given is not None:
            seconds = {"KD": micro * steps.seconds(KD(), on_given), **seconds}
        tokens = sum(responses.num_tokens for responses, _ in written)
        spent = sum(responses.seconds for responses, _ in written)
        return Cost(
            seconds=seconds,
            rows=per_step,
            tokens_per_second=tokens / max(spent, 1e-9),
            memory=steps.memory(),
            device=_device_name(steps.module.device),
        )


def _prompts(
    data: RolloutDataModule, examples: tuple[Example, ...], num: int
) -> list[list[Example]]:
    """Batches of prompts: each as often as it takes, in one batch once."""
    picked = chosen(examples, num, data.seed + 1)
    endless = list(itertools.islice(itertools.cycle(picked), num))
    size = data.batch_size
    return [endless[start : start + size] for start in range(0, num, size)]


def _given_batches(
    module: DistillationModule, data: RolloutDataModule, num: int, held_out: Sequence[Example]
) -> list[DistillBatch]:
    """Batches of given responses of the training set, or else of what is not held out."""
    part = "train" if data.sources["train"] is not None else "val"
    is_same = data.sources["train"] in (None, data.sources["val"])
    taken = {example.index for example in held_out} if is_same else set()
    rows = [e for e in data.examples(part).examples if e.response_ids and e.index not in taken]
    groups = _prompts(data, tuple(rows), num * data.batch_size) if rows else []
    responses = (given_responses(group, module.eos_ids) for group in groups)
    return [batch for own in responses for batch in own.batches(data.batch_size, module.device)]


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
