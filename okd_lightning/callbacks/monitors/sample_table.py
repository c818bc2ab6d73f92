"""Table of a few prompts with the answers of the teacher, the initial and the present student."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import rich
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.callbacks.monitors.progress_bar import RunProgressBar
from okd_lightning.callbacks.monitors.sample_views import Sample, samples_markdown, samples_table
from okd_lightning.callbacks.monitors.throughput import Throughput
from okd_lightning.data import RolloutDataModule
from okd_lightning.data.progress import rollout_progress
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.errors import ConfigError
from okd_lightning.records.batches import Example
from okd_lightning.records.noise import NoiseDomain, hashed_choice
from okd_lightning.records.requests import Generator, Request
from okd_lightning.rollouts import RolloutLoader
from okd_lightning.rollouts.generation import Agreement, naming_the_prompts
from okd_lightning.rollouts.plan import share
from okd_lightning.training.module import DistillationModule


class SampleTable(Callback):
    """Shows answers to the same few prompts, every few optimizer steps and after the last one.

    Answers are greedy; one that is cut at ``max_tokens`` ends in an ellipsis. They are the base
    teacher's, the student's before training (kept in checkpoints) and the present student's. A
    teacher that is not in memory (a cache, a server) gives no answers; a self-teacher that follows
    the student answers again every time. Prompts are from the validation data, or from the training
    data without validation, chosen by ``data.seed``.

    They go to the terminal, to TensorBoard or Weights & Biases, and to ``rollouts.jsonl`` as
    records of the kind "sample". No random numbers are used: training is not changed.

    Args:
        every_n_steps: Optimizer steps between two tables.
        num_prompts: Prompts per table; 0 for no tables.
        max_tokens: Most tokens of an answer; never more than ``data.max_response_length``.
        terminal: Whether to print it; by default if output is a terminal.

    Raises:
        ConfigError: A number below its minimum.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        num_prompts: int = 3,
        max_tokens: int = 64,
        terminal: bool | None = None,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("num_prompts", num_prompts, 0),
            ("max_tokens", max_tokens, 1),
        ):
            if value < least:
                raise ConfigError(f"SampleTable: {name} must be at least {least}, got {value}")
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.max_tokens = max_tokens
        self.terminal = terminal
        self._examples: list[Example] = []
        self._part = ""
        self._last_step = float("inf")
        self._prompts: list[str] = []
        self._teacher: list[str] | None = None
        self._before: list[str] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the prompts with the teacher's answers and the student's before training."""
        return {"prompts": self._prompts, "teacher": self._teacher, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the answers before training, which cannot be generated again."""
        self._prompts = list(state_dict["prompts"])
        self._teacher, self._before = state_dict["teacher"], state_dict["before"]

    @property
    def generates(self) -> bool:
        """True if it makes the models generate responses."""
        return self.num_prompts > 0

    # ---------------------------------------------------------------- hooks

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Choose the prompts; at the start of a run, generate the teacher's and student's answers.

        Raises:
            ConfigError: The run's data is not a RolloutDataModule, or its module not a
                DistillationModule.
        """
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, RolloutDataModule) or not isinstance(pl_module, DistillationModule):
            raise ConfigError(
                "SampleTable shows the prompts of a RolloutDataModule with the answers of a "
                "DistillationModule; this Trainer has others: leave SampleTable out"
            )
        self._examples = []
        if not self.num_prompts:
            return
        self._last_step = trainer.estimated_stepping_batches
        self._part, examples = _prompts_of(trainer, data)
        chosen = hashed_choice(
            len(examples), self.num_prompts, NoiseDomain.SHOWN_PROMPTS, data.seed
        )
        self._examples = [examples[i] for i in chosen]
        prompts = [pl_module.decode(example.prompt_ids) for example in self._examples]
        if prompts != self._prompts:
            if self._prompts:
                rank_zero_warn(
                    "SampleTable: this run's prompts are not those of its checkpoint, so that the "
                    "student's answers before training are unknown and are left out"
                )
            self._prompts, self._teacher = prompts, None
            is_new = trainer.global_step == 0
            with clocks_stopped(trainer):
                self._before = self._answers(pl_module, data, "student") if is_new else None
        if self._teacher is None and pl_module.pair.teacher.generates:
            with clocks_stopped(trainer):
                self._teacher = self._answers(pl_module, data, "teacher")

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the table at the interval, and after the last step."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self._examples:
            return
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step >= self._last_step:
            assert isinstance(pl_module, DistillationModule)
            with clocks_stopped(trainer):
                self._show(trainer, self._samples(trainer, pl_module))

    # ---------------------------------------------------------------- answers

    def _samples(self, trainer: lightning.Trainer, module: DistillationModule) -> list[Sample]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        now = self._answers(module, data, "student")
        teacher = self._teacher
        if module.pair.teacher.follows_student:
            teacher = self._answers(module, data, "teacher")
        return [
            Sample(
                index=example.index,
                prompt=example.question if example.chat or example.images else self._prompts[i],
                teacher=teacher[i] if teacher is not None else None,
                student_before=self._before[i] if self._before is not None else None,
                student_now=now[i],
            )
            for i, example in enumerate(self._examples)
        ]

    def _answers(
        self, module: DistillationModule, data: RolloutDataModule, generator: Generator
    ) -> list[str]:
        """Return greedy answers to all prompts, on every rank; each rank generates its share."""
        trainer = module.trainer
        own = list(share(self._examples, trainer.global_rank, trainer.world_size))
        request = Request(
            prompts=tuple(example.prompt_for(generator) for example in own),
            sampling=Sampling(temperature=0),
            noise=NoiseStream(0, 0),
            max_new_tokens=min(self.max_tokens, data.max_response_length),
            generator=generator,
        )

        def generate() -> list[str]:
            shown = rollout_progress(trainer, f"samples of the {generator}", len(own))
            with naming_the_prompts(request), shown as progress:
                rollout = module.respond(replace(request, progress=progress))
            return [
                module.decode(response.ids) + ("…" if response.stop_reason == "length" else "")
                for response in rollout
            ]

        answers = Agreement(data.gather).together(generate)
        return [text for of_rank in data.gather(answers) for text in of_rank]

    # ---------------------------------------------------------------- showing

    def _show(self, trainer: lightning.Trainer, samples: Sequence[Sample]) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step = trainer.global_step - 1  # as in metrics.csv: the number of the finished step
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "rollouts.jsonl").open("a", encoding="utf-8") as file:
            for sample in samples:
                record = {"step": step, "kind": "sample", "part": self._part, **sample.record()}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", samples_markdown(samples), step)
            elif isinstance(logger, WandbLogger):
                columns = ["prompt", *samples[0].answers]
                rows = [[sample.prompt, *sample.answers.values()] for sample in samples]
                logger.log_text("samples", columns, rows, step=step)
        console = rich.get_console()
        if console.is_terminal if self.terminal is None else self.terminal:
            what = f"{len(samples)} prompts of {self._part} after {trainer.global_step} steps"
            console.print(samples_table(samples, what, console))


@contextmanager
def clocks_stopped(trainer: lightning.Trainer) -> Iterator[None]:
    """Stop the run's clocks (of ``Throughput`` and the progress bar) within the context."""
    with ExitStack() as clocks:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Throughput | RunProgressBar):
                clocks.enter_context(callback.stopped())
        yield


def _prompts_of(
    trainer: lightning.Trainer, data: RolloutDataModule
) -> tuple[str, Sequence[Example]]:
    """Return the part whose prompts are shown, and its examples."""
    if data.sources["val"] is not None and trainer.limit_val_batches != 0:
        return "val", data.examples("val").examples
    loader = trainer.train_dataloader
    if isinstance(loader, RolloutLoader):  # read with the needs of its methods
        return "train", loader.examples
    return "train", data.examples("train").examples
