"""The DistillationModule: terms, the one training step, validation, and state.

Wiring only: ``pair`` holds both models, the mathematics is in ``divergences`` and
``losses``, the data in ``rollouts`` and ``data``, and a method is a callback that registers its
term here. All of Lightning's hooks stay free for a subclass.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import okd_lightning.data.parsing_settings  # noqa: F401 - for configs that name it
from okd_lightning.checkpoints.contents import set_rng_state
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.checkpoints.signature import is_own_run
from okd_lightning.engines import EngineSource
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.losses import (
    Term,
    WeightedTerm,
)
from okd_lightning.losses.reduction import Normalization, NormalizationName
from okd_lightning.models import DTypeName, EndTokensArgument, ModelArgument
from okd_lightning.models.schedules import ScheduleName
from okd_lightning.records.batches import DistillBatch
from okd_lightning.teachers import Teacher
from okd_lightning.training.arguments import (
    check_arguments,
    restored_arguments,
    stored_arguments,
)
from okd_lightning.training.kept_checkpoints import settle_kept
from okd_lightning.training.loop_state import begin_step
from okd_lightning.training.opening import open_run
from okd_lightning.training.optimized_module import Optimization, OptimizedModule
from okd_lightning.training.pair import Pair
from okd_lightning.training.pair_settings import PairSettings
from okd_lightning.training.rank_agreement import check_ranks_agree
from okd_lightning.training.run_settings import one_line
from okd_lightning.training.run_state import add_state, check_state, load_weights
from okd_lightning.training.safeguards import SAFEGUARDS, in_setup_order
from okd_lightning.training.step_metrics import forget_last_step
from okd_lightning.training.step_terms import (
    acting_terms,
    check_counts,
    check_fits,
    step_means,
)


class DistillationModule(OptimizedModule):
    """A student that learns from a teacher by the Trainer's method callbacks.

    Args:
        student: Folder, hub id (org/name or org/name@revision), PEFT folder (merged into its base),
            .gguf file, or a config to start from random weights: a mapping with model_type and that
            architecture's fields. From Python also a model (the adapter of a PeftModel is trained);
            docs/concepts/models.md.
        teacher: The teacher, in the same forms; or a class of okd_lightning.teachers with its
            settings: FrozenSelf, AveragedSelf or LiveSelf (the student itself), TeacherEnsemble
            (several models as one), RoutedTeachers (one for each row), CachedTeacher (its
            log-probabilities on disk), ServedTeacher (on a server). None for plain SFT.
        tokenizer: Folder or hub id of the tokenizer; the student's by default, else the teacher's.
        learning_rate: After warm-up; 5e-5 by default, or the one set in ``optimizer``.
        weight_decay: Of matrices only (not of biases and norms); 0 by default, or the one set in
            ``optimizer``.
        warmup_steps: Optimizer steps over which the learning rate rises.
        schedule: Course of the learning rate after warm-up.
        optimizer: Optimizer instead of AdamW: a class path, or in Python a function of parameter
            groups. learning_rate and weight_decay are its lr and weight_decay.
        lr_scheduler: Scheduler class path instead of schedule and warmup_steps; advances with
            optimizer steps.
        dtype: Number format of the student's weights; a loaded model keeps its own. float64 is for
            comparing runs.
        teacher_dtype: Number format of the teacher's weights; by default ``dtype``.
        attn_implementation: Attention implementation of loaded models, such as sdpa.
        gradient_checkpointing: Recompute activations in the backward pass: the student's, and the
            teacher's where its online module is trained.
        student_adapter: A PEFT config (such as LoraConfig): the student's weights stay frozen and
            the adapter is trained.
        ema_decay: Share of an AveragedSelf that an optimizer step keeps, between 0 and 1; 0.99 by
            default.
        tile_positions: Positions per tile of the loss, whose logits are in memory at once; by
            default chosen from the vocabulary size.
        packing: Concatenate rows of a micro-batch to avoid padding, where the model supports it.
        compile_blocks: Compile the blocks of both models with torch.compile, for training and
            measuring; takes seconds to a minute at the start, and needs a C++ compiler on a CPU.
        engine: Generates the student's responses instead of the built-in engine, such as
            VLLMServer; docs/vllm.md.
        normalization: Divisor of the sum over on-policy samples: their number times the mean length
            of earlier rollout batches (running_mean), times data.max_response_length (constant) or
            times a number; or their tokens (token_mean, which biases a step of few rollouts);
            docs/concepts/losses.md.
        end_tokens: Ids or tokens that mean "the response ends here", one outcome for both models;
            by default those of both generation configs, the tokenizer and the data;
            docs/concepts/end-tokens.md.

    Raises:
        ConfigError: A number out of its range, or no tokenizer.
        ModelError: A model or tokenizer that cannot be loaded.
        VocabularyError: Tokenizers that differ.
    """

    shared_by_copies = (*OptimizedModule.shared_by_copies, "terms", "_checked", "_constructed_with")

    def __init__(
        self,
        student: ModelArgument,
        teacher: Teacher | ModelArgument | None = None,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        warmup_steps: int = 0,
        schedule: ScheduleName = "constant",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        dtype: DTypeName = "float32",
        teacher_dtype: DTypeName | None = None,
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        student_adapter: PeftConfig | None = None,
        ema_decay: float | None = None,
        tile_positions: int | None = None,
        packing: bool = True,
        compile_blocks: bool = False,
        engine: EngineSource | None = None,
        normalization: NormalizationName | float = "running_mean",
        end_tokens: EndTokensArgument | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        if tile_positions is not None and tile_positions < 1:
            raise ConfigError(f"model.tile_positions must be at least 1, got {tile_positions}")
        optimization = Optimization(
            learning_rate, weight_decay, warmup_steps, schedule, optimizer, lr_scheduler
        )
        settings = PairSettings(
            tokenizer=tokenizer,
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            student_adapter=student_adapter,
            ema_decay=ema_decay,
            tile_positions=tile_positions,
            packing=packing,
            compile_blocks=compile_blocks,
            end_tokens=end_tokens,
        )
        pair = Pair(student, teacher, settings, self._current_trainer)
        super().__init__(optimization, pair, engine)
        self.normalization = Normalization(normalization)
        self._constructed_with = given
        self._arguments: dict[str, Any] | None = None
        self.strict_loading = False  # frozen weights are not in checkpoints; see on_load_checkpoint
        self.run_config: str | None = None
        self.resume_flag = ""  # that a printed command needs to resume this run
        self.started_in: str | None = None  # base of the config's relative paths
        self._step_sums: dict[str, Tensor] = {}
        self.measured_before: dict[str, float] = {}  # by the last validation before a resume
        self.rng_to_restore: dict[str, Any] | None = None  # at the first step after a resume

    # ---------------------------------------------------------------- setting up

    def add_term(self, term: Term) -> None:
        """Add a method's term to the loss; callbacks call this at ``setup``.

        Raises:
            ConfigError: Two terms of one name, or a term that needs a teacher where there is none.
        """
        check_fits(term, self.terms)
        self.pair.teacher.check_term(term)
        self.terms.append(term)

    def configure_callbacks(self) -> list[Callback]:
        """Return the safeguards that the Trainer lacks; move ModelsFirst to the front."""
        self.terms = []  # a run begins; one that failed has left its own
        trainer = self._trainer
        present: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
        if trainer is not None:
            trainer.callbacks = in_setup_order(present)  # type: ignore[attr-defined]
        return [kind() for kind in SAFEGUARDS if not any(isinstance(c, kind) for c in present)]

    def teardown(self, stage: str) -> None:
        """Remove the terms and the teacher's base, so that another Trainer can add its own."""
        self.terms, self._checked, self.pair.teacher_base = [], [], None

    # ---------------------------------------------------------------- training

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step; then let the teacher follow, once per optimizer step."""
        super().optimizer_step(*args, **kwargs)
        self.pair.teacher.after_step()

    def training_step(self, batch: DistillBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's loss: each term's sum over its divisor of the whole step."""
        trainer = self.trainer
        terms = acting_terms(
            self.terms,
            batch,
            trainer.global_step,
            trainer.accumulate_grad_batches,
            trainer.world_size,
            self.normalization,
        )
        acting = [weighted.term for weighted in terms]
        is_new, self._checked = acting != self._checked, acting
        loss = self.loss_of(batch, terms, checks=is_new)
        if is_new:
            check_counts(terms, loss.outputs, batch)
        names = self.teacher_names
        means = step_means(terms, loss, batch, trainer.global_step, names)
        self._log_step(batch, means, batch_idx)
        return loss.total + self._idle_loss(terms)

    def _idle_loss(self, terms: Sequence[WeightedTerm]) -> Tensor:
        """Return 0, tied to an online module that no term trains in this step, as DDP expects."""
        idle = torch.zeros((), device=self.device)
        if not any(weighted.term.trains_teacher for weighted in terms):
            own = self.pair.teacher.trained_parameters()
            for parameter in self.pair.placement.tied_to_loss(own):
                idle = idle + 0.0 * parameter.sum()
        return idle

    def _log_step(self, batch: DistillBatch, sums: Mapping[str, Tensor], batch_idx: int) -> None:
        """Add up the metrics of a step's micro-batches and log them at the last one."""
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

    # ---------------------------------------------------------------- state

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return a module with the models and weights of a checkpoint; both models are built.

        Args:
            checkpoint_path: A file, or a sharded checkpoint's folder; always read weights-only.
            map_location: Device to move the module to; by default it stays on the CPU.
            hparams_file: Refused: checkpoints hold the constructor's arguments.
            strict: Refuse unknown weights; frozen weights are never missing, as checkpoints lack
                them.
            weights_only: True or None.
            kwargs: Arguments of the constructor that replace the checkpoint's.

        Raises:
            CheckpointError: The checkpoint cannot be read or rebuilt, is of another model, or names
                a server and is not signed by this user.
            ConfigError: ``hparams_file`` or ``weights_only=False``.
        """
        if hparams_file is not None or weights_only is False:
            raise ConfigError(
                "load_from_checkpoint reads a checkpoint's own arguments and weights alone: leave "
                "hparams_file and weights_only=False out, and name what to change as arguments"
            )
        checkpoint = read_checkpoint(str(checkpoint_path), with_weights=True)
        own = checkpoint["okd_lightning"]
        if not is_own_run(own):
            check_arguments(own.get("arguments"), kwargs, str(checkpoint_path))
        module = cls(**restored_arguments(own.get("arguments"), kwargs))
        load_weights(module, checkpoint, strict=bool(strict))
        return module if map_location is None else module.to(map_location)

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments of the module, as a checkpoint stores them."""
        if self._arguments is None:
            self._arguments = stored_arguments(self._constructed_with)
        return self._arguments

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out; add the resolved config, the methods and the RNG streams.

        Raises:
            CheckpointError: The run was in processes that have ended.
        """
        if self._trainer is None:
            raise CheckpointError(
                "the run was in processes of its own (ddp_fork, ddp_spawn or ddp_notebook), and "
                "its optimizer and loops ended with them: have the run write its checkpoints, by "
                "LastCheckpoint or ModelCheckpoint among the Trainer's callbacks"
            )
        add_state(self, checkpoint, self.arguments)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is one of this run's methods and models.

        Raises:
            CheckpointError: Another method's, model's or optimizer's checkpoint.
        """
        self.rng_to_restore = check_state(self, checkpoint)
        if self._trainer is not None:
            settle_kept(self._trainer, checkpoint)
        if self.terms:
            self.resume_optimizer(checkpoint)
        self._loaded_step = checkpoint["global_step"]

    def on_fit_start(self) -> None:
        """Report what is trained, and open or write the teacher's cache."""
        open_run(self, self.terms, self.learning_rate)
        rank_zero_info(one_line(self.run_settings or self.settings_of_run()))

    def on_train_start(self) -> None:
        """Compare what the ranks have read; apply optimizer settings that a resume changes."""
        check_ranks_agree(self.trainer, self.weights_read, self.run_config, self.tokenizer)
        super().on_train_start()

    def on_train_batch_start(self, batch: DistillBatch, batch_idx: int) -> None:
        """Restore a resumed run's random streams (dropout), once; drop the last step's metrics."""
        if self.rng_to_restore is not None:
            set_rng_state(self.rng_to_restore)
            self.rng_to_restore = None
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            forget_last_step(self.trainer)
            begin_step(self.trainer)


_ARGUMENTS = frozenset(inspect.signature(DistillationModule).parameters)
