"""Rows, models and evaluation of the study on a real pair.

The teacher is SmolLM2-135M-Instruct. The student is a part of its layers, which a warm start on
other texts (GSM8K and TinyStories, KD) makes into a language model again. The tasks are
self-instruct's user-oriented instructions, GSM8K and TinyStories (rows that the warm start does not
have): rows with short prompts, with a fixed split.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from transformers import AutoTokenizer, PreTrainedModel

from okd_lightning.callbacks import KD, DistillationCallback, TaskScore
from okd_lightning.data import RolloutDataModule, load_rows
from okd_lightning.rewards import RougeL
from okd_lightning.training.module import DistillationModule

Row = Mapping[str, Any]
Model = str | PreTrainedModel

NUM_VAL = 32
NUM_WARM = 400
MOST_ROWS = 32  # training rows, before the held-out ones
PROMPT, RESPONSE, BATCH = 64, 32, 4
WARM_STEPS, WARM_RATE = 40, 5e-4
VALIDATION_INTERVAL = 12
SPLIT_SEED = 20


@dataclass(frozen=True)
class Places:
    """Folders of the study.

    Attributes:
        teacher: SmolLM2-135M-Instruct.
        student: Its layers, before the warm start.
        datasets: Folder with self_instruct/, gsm8k/ and tinystories/.
        work: Folder for the student after its warm start and for fine-tuned teachers.
        task: Key of TASKS.
        rows: Number of training rows.
    """

    teacher: Path
    student: Path
    datasets: Path
    work: Path
    task: str = "instructions"
    rows: int = 32

    @property
    def warm(self) -> Path:
        """Folder of the student after its warm start."""
        return self.work / f"warm-{self.student.name}-{WARM_STEPS}"


def chat_row(prompt: str, response: str) -> Row:
    """Return a chat. An empty system prompt replaces the template's own, of 20 tokens."""
    texts = {"system": "", "user": prompt, "assistant": response}
    return {"messages": [{"role": role, "content": text} for role, text in texts.items()]}


def instructions(datasets: Path) -> Iterator[Row]:
    """Yield self-instruct's user-oriented instructions as chats."""
    for row in load_rows(str(datasets / "self_instruct/user_oriented_instructions.jsonl")):
        instance = row["instances"][0]
        prompt = "\n\n".join(part for part in (row["instruction"], instance["input"]) if part)
        yield chat_row(prompt, instance["output"])


def problems(datasets: Path) -> Iterator[Row]:
    """Yield GSM8K's problems as chats."""
    for row in load_rows(str(datasets / "gsm8k/train.jsonl")):
        yield chat_row(row["question"], row["answer"])


def stories(datasets: Path) -> Iterator[Row]:
    """Yield TinyStories' first sentences and their continuations as chats."""
    for row in load_rows(str(datasets / "tinystories/train.jsonl")):
        yield chat_row(row["prompt"], row["response"])


TASKS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "instructions": instructions,
    "gsm8k": problems,
    "tinystories": stories,
}
"""Task → its rows. Of the last two the warm start has the first NUM_WARM."""


def task_rows(places: Places) -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows: prompts of at most PROMPT tokens as a chat."""
    tokenizer = AutoTokenizer.from_pretrained(places.teacher)
    first = 0 if places.task == "instructions" else NUM_WARM
    rows = []
    for row in islice(TASKS[places.task](places.datasets), first, first + 600):
        text = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        if len(tokenizer(text, add_special_tokens=False).input_ids) <= PROMPT:
            rows.append(row)
    random.Random(SPLIT_SEED).shuffle(rows)
    val = rows[MOST_ROWS : MOST_ROWS + NUM_VAL]
    return rows[: places.rows], val


def data_of(train: Sequence[Row], val: Sequence[Row] | None, seed: int) -> RolloutDataModule:
    """Return a data module of the rows as chats."""
    return RolloutDataModule(
        train,
        val,
        batch_size=BATCH,
        max_prompt_length=PROMPT,
        max_response_length=RESPONSE,
        val_rollouts=0,
        prompt_column=None,
        messages_column="messages",
        seed=seed,
    )


def trainer_of(places: Places, callbacks: list[Callback], **settings: Any) -> lightning.Trainer:
    """Return a Trainer on the CPU without output."""
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        inference_mode=False,
        gradient_clip_val=1.0,
        default_root_dir=places.work,
        **settings,
    )


def warm_start(places: Places) -> Path:
    """Train the cut student by KD on GSM8K and TinyStories; return its folder."""
    if not places.warm.is_dir():
        rows = list(islice(problems(places.datasets), NUM_WARM))
        rows += islice(stories(places.datasets), NUM_WARM)
        lightning.seed_everything(0, verbose=False)
        module = DistillationModule(
            str(places.student), str(places.teacher), learning_rate=WARM_RATE, warmup_steps=10
        )
        started = time.process_time()
        method: list[Callback] = [KD()]
        trainer = trainer_of(places, method, max_steps=WARM_STEPS, limit_val_batches=0)
        trainer.fit(module, data_of(rows, None, seed=0))
        print(f"warm start: {time.process_time() - started:.0f} s of CPU", flush=True)
        assert module.student is not None
        module.student.save_pretrained(places.warm)
        AutoTokenizer.from_pretrained(places.teacher).save_pretrained(places.warm)
    return places.warm


def evaluate(places: Places, student: Model) -> dict[str, float]:
    """Return the held-out measures of a model: against references and against the base teacher."""
    train, val = task_rows(places)
    module = DistillationModule(student, str(places.teacher), tokenizer=str(places.teacher))
    score: list[Callback] = [KD(), TaskScore(RougeL())]
    trainer = trainer_of(places, score)
    trainer.validate(module, data_of(train, val, seed=0), verbose=False)
    return {name: round(float(v), 5) for name, v in trainer.callback_metrics.items()}


class Spent(Callback):
    """CPU seconds of training and rollouts, without validation; ends the fit when they are used up.

    Args:
        budget: CPU seconds.
    """

    def __init__(self, budget: float) -> None:
        self.budget, self.seconds = budget, 0.0
        self.curve: list[dict[str, float]] = []
        self._since = 0.0

    def on_train_start(self, *_: Any) -> None:
        """Begin to count."""
        self._since = time.process_time()

    def on_validation_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Pause."""
        self._count()

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Keep the measures; continue to count."""
        measured = {
            name: round(float(v), 5)
            for name, v in trainer.callback_metrics.items()
            if name.startswith("val/")
        }
        cost = {"step": trainer.global_step, "cpu_seconds": round(self.seconds, 2)}
        self.curve.append(cost | measured)
        self._since = time.process_time()

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """End the fit after the step that uses up the budget."""
        self._count()
        if self.seconds >= self.budget:
            trainer.should_stop = True

    def _count(self) -> None:
        now = time.process_time()
        self.seconds += now - self._since
        self._since = now


def fit(
    places: Places,
    module: DistillationModule,
    method: DistillationCallback | list[DistillationCallback],
    budget: float,
    seed: int,
    validates: bool = True,
) -> tuple[Spent, int]:
    """Train within a budget of CPU seconds; return what was spent, and the optimizer steps."""
    train, val = task_rows(places)
    spent = Spent(budget)
    limits: dict[str, Any] = {"limit_val_batches": 0}
    if validates:
        limits = {"val_check_interval": VALIDATION_INTERVAL, "check_val_every_n_epoch": None}
    methods = method if isinstance(method, list) else [method]
    trainer = trainer_of(places, [*methods, spent], **limits)
    trainer.fit(module, data_of(train, val if validates else None, seed))
    return spent, trainer.global_step
