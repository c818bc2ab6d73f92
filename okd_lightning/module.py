"""The DistillationModule: student, teacher, terms, and the one training step.

Wiring only: the mathematics is in ``divergences`` and ``losses``, the data in ``rollouts`` and
``data``, and a method is a callback that registers its term here. All of Lightning's hooks stay
free for a subclass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import lightning
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.checkpoints import (
    check_methods,
    close_epoch,
    rng_states,
    set_rng_state,
    weights_to_save,
)
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.losses import (
    DrawnLogProb,
    Measured,
    Quantity,
    Side,
    Term,
    measure,
)
from okd_lightning.metrics import adapted_measures, measure_metrics, measures
from okd_lightning.models import (
    DTypeName,
    LMHead,
    ModelArgument,
    ModelSource,
    OnlineModuleSettings,
    add_adapter,
    attach_online_module,
    base_teacher,
    check_pair,
    eos_token_ids,
    find_tokenizer,
    head_inputs,
    load_causal_lm,
    load_model_config,
    max_positions,
)
from okd_lightning.optimizers import build_optimizer, with_schedule
from okd_lightning.records import SOURCES, DistillBatch, PromptBatch, Rollout
from okd_lightning.reduction import normalise
from okd_lightning.rollouts import NoiseStream, RolloutEngine, Sampling, TransformersEngine
from okd_lightning.rollouts.engine import Author, Progress
from okd_lightning.rollouts.rows import generation_records
from okd_lightning.schedules import ScheduleName, schedule_factor


class DistillationModule(lightning.LightningModule):
    """A student that learns from a teacher by whatever method callbacks the Trainer holds.

    Args:
        student: Folder, hub id, or a config to start from random weights: a mapping with
            model_type and that architecture's fields.
        teacher: The same for the teacher; none for plain SFT.
        tokenizer: Folder or hub id of the tokenizer; by default the student's, else the
            teacher's.
        learning_rate: Of AdamW, after warm-up.
        weight_decay: Of AdamW, on matrices only (not on biases and norms).
        warmup_steps: Optimizer steps over which the learning rate rises.
        schedule: What the learning rate does after warm-up.
        optimizer: A full optimizer class path; overrides learning_rate and weight_decay.
        dtype: Number format of the student's weights.
        teacher_dtype: Number format of the teacher's weights; by default the student's.
        attn_implementation: Attention of both models, such as sdpa or flash_attention_2.
        gradient_checkpointing: Recompute the student's activations in the backward pass.
        student_adapter: A PEFT config (such as LoraConfig): the student's own weights stay
            frozen and the adapter is trained.

    Raises:
        ConfigError: A number out of its range, or no tokenizer.
        ModelError: A model or tokenizer that cannot be loaded.
        VocabularyError: Tokenizers that do not agree.
    """

    def __init__(
        self,
        student: ModelArgument,
        teacher: ModelArgument | None = None,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: ScheduleName = "constant",
        optimizer: OptimizerCallable | None = None,
        dtype: DTypeName = "float32",
        teacher_dtype: DTypeName | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        student_adapter: PeftConfig | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("learning_rate", learning_rate),
            ("weight_decay", weight_decay),
            ("warmup_steps", warmup_steps),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"model.{name} must be a number from 0 on, got {value}")
        self.strict_loading = False  # frozen weights are not in checkpoints; see on_load_checkpoint
        schedule_factor(schedule, 1, 0, 1)  # refuses an unknown one
        if isinstance(student, PreTrainedModel) and student is teacher:
            raise ConfigError(
                "student and teacher are the same object: the teacher is frozen, so the student "
                "would not train; load it twice, or pass copy.deepcopy(student) as the teacher"
            )
        self._sources = (student, teacher)  # a tuple: a loaded model is registered once, as student
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.optimizer_factory = optimizer
        self.dtype_name = dtype
        self.teacher_dtype_name = teacher_dtype or dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.student_adapter = student_adapter
        self.run_config: str | None = None

        self.tokenizer = find_tokenizer(tokenizer, student, teacher)
        self.vocabulary = check_pair(self.tokenizer, student, teacher)
        self.eos_ids = eos_token_ids(student, self.tokenizer)
        self.student: PreTrainedModel | None = None
        self.teacher: PreTrainedModel | None = None
        self.terms: list[Term] = []
        self._terms_of: int | None = None
        self.online_module: OnlineModuleSettings | None = None
        self._has_online_module = False
        self._step_sums: dict[str, Tensor] = {}
        self._rng_to_restore: dict[str, Any] | None = None
        self.evaluation = measure_metrics()

    @property
    def student_source(self) -> ModelSource:
        """What the student is loaded from."""
        return self._sources[0]

    @property
    def teacher_source(self) -> ModelSource | None:
        """What the teacher is loaded from; None without one."""
        return self._sources[1]

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Load both models (once; Lightning calls this again for every entry point)."""
        if self.student is not None:
            return
        size = self.vocabulary.size
        load = partial(load_causal_lm, attn_implementation=self.attn_implementation)
        config = load_model_config(self.student_source, "--model.student", size)
        self.student = load(self.student_source, config, "--model.student", dtype=self.dtype_name)
        if self.student_adapter is not None:
            add_adapter(self.student, self.student_adapter, "--model.student_adapter")
        if self.gradient_checkpointing:
            self.student.gradient_checkpointing_enable({"use_reentrant": False})
            self.student.enable_input_require_grads()
        self.student.train()
        if self.teacher_source is not None:
            config = load_model_config(self.teacher_source, "--model.teacher", size)
            self.teacher = load(
                self.teacher_source, config, "--model.teacher", dtype=self.teacher_dtype_name
            )
            self.teacher.requires_grad_(False).eval()
            if self.online_module is not None:
                self._attach_online_module()

    def add_online_module(self, settings: OnlineModuleSettings) -> None:
        """Put a trainable module on the teacher; callbacks call this at ``setup``.

        Raises:
            ConfigError: No teacher, or two methods that ask for different modules.
        """
        if self.online_module is not None and self.online_module != settings:
            raise ConfigError(
                "two methods ask for different online modules on one teacher; give both the same"
            )
        if self.teacher_source is None:
            raise ConfigError("an online module needs a teacher: give --model.teacher")
        self.online_module = settings
        if self.teacher is not None and not self._has_online_module:
            self._attach_online_module()

    def _attach_online_module(self) -> None:
        assert self.teacher is not None
        assert self.online_module is not None
        option = "--method.online_module"
        adapted = attach_online_module(self.teacher, self.online_module.config, option)
        self.teacher = cast(PreTrainedModel, adapted)  # a PeftModel answers as one
        self._has_online_module = True

    def as_base_teacher(self) -> AbstractContextManager[None]:
        """Within it the teacher is the base one, without its online module."""
        if self.teacher is None or not self._has_online_module:
            return nullcontext()
        return base_teacher(self.teacher)

    def train(self, mode: bool = True) -> DistillationModule:
        """Training mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def add_term(self, term: Term) -> None:
        """Take a method's term into the loss; callbacks call this at ``setup``.

        Raises:
            ConfigError: Two terms of one name, or a term that needs a teacher where none is given.
        """
        if self._terms_of != id(self._trainer):  # what a run that failed has left behind
            self.terms, self._terms_of = [], id(self._trainer)
        if any(term is known for known in self.terms):
            return
        if any(term.name == known.name for known in self.terms):
            raise ConfigError(
                f"two methods of this run are called {term.name!r}; give one of them another name "
                "(--method.name, or name= in Python)"
            )
        needs_teacher = "teacher" in term.sources or any(q.needs_teacher for q in term.quantities)
        if needs_teacher and self.teacher_source is None:
            raise ConfigError(
                f"method {term.name} needs a teacher: give --model.teacher a folder or hub id"
            )
        self.terms.append(term)

    def teardown(self, stage: str) -> None:
        """Forget the terms, so that another Trainer can bring its own."""
        self.terms = []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over the student and the online module, and its schedule."""
        online = self.online_module
        optimizer = build_optimizer(
            self._parameters_of(self.student),
            self._parameters_of(self.teacher),
            self.learning_rate,
            self.weight_decay,
            online.learning_rate if online is not None else None,
            self.optimizer_factory,
        )
        trainer = self.trainer
        return with_schedule(
            optimizer,
            self.schedule,
            self.warmup_steps,
            total_steps=lambda: trainer.estimated_stepping_batches,
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the student by the Trainer's value and the online module by its own norm."""
        if self.online_module is None or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        own = self.online_module.clip_norm
        sides = ((self.student, gradient_clip_val), (self.teacher, own or gradient_clip_val))
        for side, limit in sides:
            if limit:
                clip_grad_norm_(self._parameters_of(side), limit)

    def _parameters_of(self, side: nn.Module | None) -> list[nn.Parameter]:
        return [p for p in side.parameters() if p.requires_grad] if side is not None else []

    # ---------------------------------------------------------------- measuring

    def measure(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Measured:
        """Run the models once over a batch and measure at its masked-in positions.

        The student runs in the caller's gradient mode; the teacher runs without gradient, but
        where a quantity trains its online module.
        """
        mask = batch.mask[:, 1:]
        targets = batch.input_ids[:, 1:][mask]
        student = self._side(self.student, batch, mask)
        teacher = None
        if any(quantity.needs_teacher for quantity in quantities):
            learns = torch.is_grad_enabled() and any(q.trains_teacher for q in quantities)
            with torch.set_grad_enabled(learns):
                teacher = self._side(self.teacher, batch, mask)
        rows = torch.arange(len(batch), device=mask.device)[:, None].expand_as(mask)[mask]
        return Measured(
            values=measure(quantities, student, teacher, targets, self.vocabulary.size),
            source=batch.source[rows],
            row=rows,
            sampler_logprobs=batch.sampler_logprobs[:, 1:][mask],
        )

    def _side(self, model: PreTrainedModel | None, batch: DistillBatch, mask: Tensor) -> Side:
        assert model is not None
        hidden = head_inputs(model, batch.input_ids, batch.attention_mask)[:, :-1]
        return Side(hidden=hidden[mask], head=LMHead.of(model, self.vocabulary))

    def write(
        self,
        author: Author,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """Responses by the student or the teacher, in eval mode and without gradient."""
        model = self.student if author == "student" else self.teacher
        assert model is not None
        if isinstance(model, PeftModel):
            model = cast(PreTrainedModel, model.get_base_model())
        was_training = model.training
        model.eval()
        precision = self._trainer.precision_plugin.forward_context if self._trainer else nullcontext
        try:
            with torch.no_grad(), precision(), self.as_base_teacher():
                return self.build_engine(model).generate(
                    prompts, sampling, generator, max_new_tokens, progress
                )
        finally:
            model.train(was_training)

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """The engine that writes with ``model``; override it to bring another."""
        return TransformersEngine(model, self.vocabulary, self.eos_ids)

    def check_lengths(self, num_tokens: int) -> None:
        """Refuse sequences that are longer than a model was made for.

        Raises:
            ConfigError: Naming the model and both lengths.
        """
        for option, model in (("student", self.student), ("teacher", self.teacher)):
            limit = max_positions(model.config) if model is not None else None
            if limit is not None and num_tokens > limit:
                raise ConfigError(
                    f"prompt and response together take up to {num_tokens} tokens, but the "
                    f"{option} was made for {limit}; lower --data.max_response_length or "
                    "--data.max_prompt_length"
                )

    # ---------------------------------------------------------------- training

    def training_step(self, batch: DistillBatch, batch_idx: int) -> Tensor:
        """Every term's sum over this micro-batch, divided by its count over the whole step."""
        quantities = [quantity for term in self.terms for quantity in term.quantities]
        measured = self.measure(batch, quantities)
        sums = {}
        loss = torch.zeros((), device=self.device)
        for term in self.terms:
            output = term.loss(measured)
            count = _step_count(batch, term)
            mean = normalise(
                output.sum, count, self.trainer.accumulate_grad_batches, self.trainer.world_size
            )
            loss = loss + term.weight * mean
            if count:
                parts = {term.name: output.sum, **output.metrics}
                sums.update({name: value.detach() / count for name, value in parts.items()})
                sums["loss"] = sums.get("loss", 0) + term.weight * sums[term.name]
        self._log_step(batch, sums, batch_idx)
        return loss

    def _log_step(self, batch: DistillBatch, sums: dict[str, Tensor], batch_idx: int) -> None:
        """Add up the micro-batches of a step and log at its last one."""
        self.log_dict(dict(batch.metrics), batch_size=1)
        for name, value in sums.items():
            self._step_sums[name] = self._step_sums.get(name, torch.zeros_like(value)) + value
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            for name, value in self._step_sums.items():
                self.log(
                    f"train/{name}",
                    value,
                    prog_bar=name == "loss",
                    on_step=True,
                    reduce_fx="sum",
                    sync_dist=True,
                    batch_size=1,
                )
            self._step_sums = {}

    # ---------------------------------------------------------------- validation

    def validation_step(self, batch: DistillBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Divergences to the base teacher at temperature 1 (nats a token), on one batch."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: DistillBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The same measures on the test set."""
        self._evaluate("test", batch, dataloader_idx)

    def on_validation_epoch_start(self) -> None:
        """Start the measures anew."""
        self._reset_measures()

    def on_test_epoch_start(self) -> None:
        """Start the measures anew."""
        self._reset_measures()

    def _reset_measures(self) -> None:
        """In the mode of this loop: what inference mode left behind cannot be updated outside."""
        for metric in self.evaluation.values():
            cast(Metric, metric).reset()

    def _evaluate(self, stage: str, batch: DistillBatch, dataloader_idx: int) -> None:
        is_own = SOURCES[int(batch.source[0])] == "student"
        wanted = measures(stage, is_own, has_teacher=self.teacher is not None)
        with self.as_base_teacher():
            self._update_measures(wanted, self.measure(batch, tuple(wanted.values())))
        if self._has_online_module and not is_own:
            wanted = adapted_measures(stage)
            self._update_measures(wanted, self.measure(batch, tuple(wanted.values())))

    def _update_measures(self, wanted: Mapping[str, Quantity], measured: Measured) -> None:
        for name, quantity in wanted.items():
            values = measured[quantity]
            metric = cast(Metric, self.evaluation[name])
            metric.update(-values if isinstance(quantity, DrawnLogProb) else values)
            self.log(name, metric, on_epoch=True, add_dataloader_idx=False, batch_size=1)

    def predict_step(self, batch: DistillBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Prompt and generated response of every row, as text."""
        return generation_records(batch, self.decode, self.eos_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    # ---------------------------------------------------------------- state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out; add the resolved config, the methods and the RNG streams."""
        checkpoint["state_dict"] = weights_to_save(self, checkpoint["state_dict"])
        checkpoint["okd_lightning"] = {
            "config": self.run_config,
            "online_module": None if self.online_module is None else self.online_module.to_dict(),
            "methods": [type(term).__name__ for term in self.terms],
            "metrics": {
                name: float(value)
                for name, value in self.trainer.callback_metrics.items()
                if name.startswith("val/")
            },
            "rng": rng_states(self.trainer.world_size),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is one of this run's methods and models.

        Raises:
            CheckpointError: Another method's or another model's checkpoint.
        """
        own = checkpoint.get("okd_lightning")
        if own is None:
            raise CheckpointError("this checkpoint was not written by okd-lightning")
        if self.terms:
            check_methods(own["methods"], [type(term).__name__ for term in self.terms])
            own_rank = self.trainer.global_rank if len(own["rng"]) == self.trainer.world_size else 0
            self._rng_to_restore = own["rng"][own_rank]
            close_epoch(checkpoint)
        weights = checkpoint["state_dict"]
        expected = weights_to_save(self, self.state_dict())
        missing = [
            name for name in expected if name not in weights and not name.startswith("evaluation.")
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} of the student's weights (such as "
                f"{missing[0]}); it belongs to another model"
            )
        unknown = [n for n in weights if n.startswith("student.") and n not in expected]
        if unknown:
            raise CheckpointError(
                f"the checkpoint holds {len(unknown)} weights that this run does not train "
                f"(such as {unknown[0]}); it belongs to another model"
            )
        for name, value in expected.items():
            if name in weights and weights[name].shape != value.shape:
                raise CheckpointError(
                    f"{name} is {list(weights[name].shape)} in the checkpoint and "
                    f"{list(value.shape)} in this run; it belongs to another model"
                )

    def on_fit_start(self) -> None:
        """Say what is trained."""
        for name, model in (("student", self.student), ("teacher", self.teacher)):
            if model is not None:
                sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
                total, trained = sum(n for n, _ in sizes), sum(n for n, t in sizes if t)
                rank_zero_info(f"{name}: {total:,} parameters, {trained:,} trained")

    def on_train_batch_start(self, batch: DistillBatch, batch_idx: int) -> None:
        """Continue the random streams of a resumed run (dropout), once."""
        if self._rng_to_restore is not None:
            set_rng_state(self._rng_to_restore)
            self._rng_to_restore = None


def _step_count(batch: DistillBatch, term: Term) -> int:
    if batch.step_counts is None:
        raise ConfigError(
            "a training batch without step_counts: train on a RolloutDataModule's batches, or set "
            "DistillBatch.step_counts to the optimizer step's loss tokens by source"
        )
    return sum(batch.step_counts[SOURCES.index(source)] for source in term.sources)
