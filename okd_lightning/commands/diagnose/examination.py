"""All measurements of ``diagnose``, inside a Trainer."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from okd_lightning.callbacks import GKD, KD, OPDPlus
from okd_lightning.commands.diagnose.ends import end_check
from okd_lightning.commands.diagnose.expected_time import MOST_STEPS, Plan, measured_costs
from okd_lightning.commands.diagnose.findings import Cost, Diagnosis, Drift, Rows, Trial
from okd_lightning.commands.diagnose.gradients import GradientProbe
from okd_lightning.commands.diagnose.positions import measure_tokens, summarise
from okd_lightning.commands.diagnose.quantisation import quantisation_check
from okd_lightning.commands.diagnose.responses import (
    ResponseGenerator,
    Responses,
    chosen,
    given_responses,
)
from okd_lightning.commands.diagnose.stages import (
    DIVERGENCES,
    GRADIENTS,
    RESPONSES,
    ROLLOUTS,
    STEPS,
    TRIALS,
    Stages,
    duration,
    expectation,
    followed,
)
from okd_lightning.commands.diagnose.steps import StepProbe
from okd_lightning.commands.diagnose.text_checks import text_checks, writing_checks
from okd_lightning.commands.diagnose.trials import run_trials
from okd_lightning.data import RolloutDataModule
from okd_lightning.data.end_tokens import adopt_ends
from okd_lightning.divergences import ReverseKL
from okd_lightning.records.batches import DistillBatch, Example
from okd_lightning.teachers import Teacher
from okd_lightning.training.module import DistillationModule
from okd_lightning.training.pair import Pair


class Examination(Callback):
    """Callback that measures both models when ``trainer.validate`` begins, on their devices.

    Args:
        rows: Responses of each kind.
        batches: Optimizer steps of rollouts, and batches of the gradients, at least 2.
        part: Part of the data that is read as "val": "train" where the run has no validation data.
        say: Called with progress messages.
        skipped: Stages to leave out.
        minutes: Expected minutes that it may take: rows and batches are lowered until it does.

    Attributes:
        found: The diagnosis; None before.
    """

    def __init__(
        self,
        rows: int,
        batches: int,
        part: str,
        say: Callable[[str], None],
        skipped: frozenset[str] = frozenset(),
        minutes: float = math.inf,
    ) -> None:
        self.rows, self.batches, self.part, self.skipped = rows, batches, part, skipped
        self.minutes = minutes
        self.found: Diagnosis | None = None
        self._stages = Stages(say)

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
        generator = ResponseGenerator(module, data.sampling, data.max_response_length, data.seed)
        steps = StepProbe(module, trainer.gradient_clip_val)
        per_step = data.global_batch_size or data.batch_size * trainer.accumulate_grad_batches
        plan = Plan(self.rows, self.batches, per_step, data.batch_size, self.skipped)
        plan = self._fitting(plan, steps, generator, data)
        examples, learnt = _split(module.pair, data, plan.rows)
        checks = text_checks(module, data, "val", data.examples("val"), examples)
        given = given_responses(examples, module.eos_ids)
        own, teachers = self._responses(generator, examples)
        checks += writing_checks(own, teachers, data.max_response_length)
        checks.append(end_check(module, (given, own, teachers), data.batch_size))
        kinds = (given, own, teachers)
        rows = self._divergences(module, kinds, data.batch_size)
        if module.pair.teacher_base is not None:
            forward = rows[0].measures["forward_kl"] if rows[0].source == "given" else None
            checks.append(quantisation_check(module, kinds, forward, data.batch_size))
        probe = GradientProbe(module, data.seed)
        rollouts = self._rollouts(generator, _groups(learnt, plan, data.seed), plan, probe)
        drift, cost = self._steps(steps, rollouts, plan, data.samples_per_prompt, own)
        return Diagnosis(
            student=_described(module.pair.student_source, module.pair.models[:1]),
            teacher=_described(_name_of(module.pair.teacher), module.pair.teacher.models),
            checks=tuple(checks),
            rows=rows,
            gradients=probe.finding(),
            drift=drift,
            trials=self._trials(steps, rollouts, (given, own)),
            cost=cost,
            part=self.part,
            learning_rate=module.learning_rate,
            schedule=module.optimization.given.schedule,
            seed=data.seed,
            stage_seconds=dict(self._stages.seconds),
            skipped=tuple(sorted(self.skipped)),
        )

    def _fitting(
        self, plan: Plan, steps: StepProbe, generator: ResponseGenerator, data: RolloutDataModule
    ) -> Plan:
        """Return the plan that fits into the minutes, and say how long it will take."""
        examples, _ = _split(steps.module.pair, data, plan.rows)
        plan = replace(plan, rows=len(examples))
        given = given_responses(examples, steps.module.eos_ids)
        costs = measured_costs(plan, steps, generator, examples, given)
        fitting = plan.at_most(60 * self.minutes, costs)
        if fitting != plan:
            self._stages.say(
                f"--minutes {self.minutes:g}: {fitting.rows} rows and {fitting.batches} batches; "
                f"{plan.rows} and {plan.batches} would take "
                f"{duration(sum(costs.of(plan).values()))}"
            )
        self._stages.say(expectation(costs.of(fitting)))
        return fitting

    def _responses(
        self, generator: ResponseGenerator, examples: Sequence[Example]
    ) -> tuple[Responses, Responses]:
        what = f"both models answer {len(examples)} prompts"
        with self._stages.run(RESPONSES, what) as progress:
            return (
                generator.generate("student", examples, progress=partial(progress, of=(0, 2))),
                generator.generate("teacher", examples, progress=partial(progress, of=(1, 2))),
            )

    def _divergences(
        self, module: DistillationModule, kinds: Sequence[Responses], size: int
    ) -> tuple[Rows, ...]:
        measured = [responses for responses in kinds if responses.num_tokens]
        what = "on dataset responses, the student's and the teacher's"
        with self._stages.run(DIVERGENCES, what) as progress:
            return tuple(
                summarise(
                    responses,
                    measure_tokens(
                        module,
                        followed(
                            responses.batches(size, module.device),
                            -(-len(responses.rows) // size),
                            partial(progress, of=(number, len(measured))),
                        ),
                    ),
                )
                for number, responses in enumerate(measured)
            )

    def _rollouts(
        self,
        generator: ResponseGenerator,
        groups: Iterator[list[Example]],
        plan: Plan,
        probe: GradientProbe,
    ) -> Rollouts:
        """Generate the rollouts of all steps; take their gradients, unless that is left out."""
        module, found = generator.module, Rollouts([], [], [])
        if not plan.num_rollouts:
            return found
        what = f"{plan.num_rollouts} optimizer steps of {plan.per_step} rows"
        with self._stages.run(ROLLOUTS, what) as progress:
            for number, group in enumerate(groups):
                own = generator.generate("student", group, sample=1 + number)
                found.written.append(own)
                found.on_own.append(list(own.batches(plan.size, module.device)))
                answers = given_responses(group, module.eos_ids)
                found.on_given.append(list(answers.batches(plan.size, module.device)))
                progress(number + 1, plan.num_rollouts)
        if GRADIENTS not in self.skipped:
            what = f"sampled and exact ones of {probe.part.name}, {len(found.on_own)} batches"
            with self._stages.run(GRADIENTS, what) as progress:
                for number, batches in enumerate(found.on_own):
                    probe.add(_middle(batches))
                    progress(number + 1, len(found.on_own))
        return found

    def _steps(
        self, steps: StepProbe, found: Rollouts, plan: Plan, samples: int, own: Responses
    ) -> tuple[tuple[Drift, ...], Cost]:
        """Return the drift of a few steps, and the cost of a step."""
        written = found.written or [own]
        speed = sum(responses.num_tokens for responses in written) / max(
            sum(responses.seconds for responses in written), 1e-9
        )
        device = _device_name(steps.module.device)
        prompts = plan.per_step // samples
        if STEPS in self.skipped:
            return (), Cost({}, plan.per_step, prompts, speed, {}, device)
        with self._stages.run(STEPS, "drift of earlier rollouts; seconds of each kind of step"):
            on_own = found.on_own
            drift = tuple(steps.drift(_middle(on_own[0]), on_own[1 : 1 + MOST_STEPS]))
            on_given = found.on_given[0] if all(found.on_given) else ()
            seconds = _seconds(steps, on_given, on_own[0], found.written)
            return drift, Cost(seconds, plan.per_step, prompts, speed, steps.memory(), device)

    def _trials(
        self, steps: StepProbe, found: Rollouts, held_out: Sequence[Responses]
    ) -> tuple[Trial, ...]:
        if TRIALS in self.skipped:
            return ()
        what = (
            f"{len(found.on_own)} steps of each of several methods; then the weights are restored"
        )
        with self._stages.run(TRIALS, what) as progress:
            on_given = found.on_given if all(found.on_given) else ()
            return run_trials(steps, on_given, found.on_own, held_out, progress)


@dataclass(frozen=True)
class Rollouts:
    """The rows of all steps.

    Attributes:
        written: The student's responses of each step.
        on_own: Their micro-batches.
        on_given: Micro-batches of the dataset responses to the same prompts; empty lists where
            there are none.
    """

    written: list[Responses]
    on_own: list[list[DistillBatch]]
    on_given: list[list[DistillBatch]]


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


def _split(pair: Pair, data: RolloutDataModule, num: int) -> tuple[list[Example], list[Example]]:
    """Return the examples to measure and those to train on: the training set, or the other rows."""
    everything = data.examples("val").examples
    if data.sources["train"] not in (None, data.sources["val"]):
        found = data.examples("train")
        adopt_ends(pair, found, data.columns.chat_template_kwargs)  # as training would
        return chosen(everything, num, data.seed), list(found.examples)
    held_out = chosen(everything, min(num, max(1, len(everything) // 2)), data.seed)
    taken = {example.index for example in held_out}
    return held_out, [example for example in everything if example.index not in taken]


def _groups(examples: Sequence[Example], plan: Plan, seed: int) -> Iterator[list[Example]]:
    """Yield the prompts of every step; where there are too few, from the start again."""
    size = plan.per_step
    picked = itertools.cycle(chosen(examples, plan.num_rollouts * size, seed + 1))
    for _ in range(plan.num_rollouts):
        yield list(itertools.islice(picked, size))


def _middle(batches: Sequence[DistillBatch]) -> DistillBatch:
    """Return the median of a step's micro-batches, which are sorted by length."""
    return batches[len(batches) // 2]


def _name_of(teacher: Teacher) -> object:
    return teacher.mark if len(teacher.own_sources) > 1 else teacher.source


def _described(source: object, models: Sequence[torch.nn.Module]) -> str:
    name = source if isinstance(source, str) else "a model from a config"
    if not models:
        return f"{name} (the student itself)"
    return f"{name}, {sum(p.numel() for one in models for p in one.parameters()):,} parameters"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num = torch.get_num_threads()
    return f"{device.type}, {num} {'thread' if num == 1 else 'threads'}"
