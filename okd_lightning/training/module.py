"""The DistillationModule: the terms of a run, and its one training step.

This file only connects parts: a LightningModule that has a ``pair`` (student, teacher, vocabulary,
placement), an optimizer (``optimization``), measures (``evaluation``) and ``frozen_parts``. The
mathematics is in ``divergences`` and ``losses``, the data in ``rollouts`` and ``data``, and a
method is a callback that registers its term here. A subclass may override all of Lightning's hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import okd_lightning.data.parsing_settings  # noqa: F401 - for configs that name it
from okd_lightning.checkpoints.contents import allow_left_out
from okd_lightning.engines import EngineSource
from okd_lightning.engines.ahead import AheadEngine
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Quantity, Term
from okd_lightning.losses.reduction import Normalization, NormalizationName
from okd_lightning.models import (
    DTypeName,
    EndTokensArgument,
    ModelArgument,
    ModelSource,
    Projectors,
    Vocabulary,
)
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.generations import generation_records
from okd_lightning.teachers import OnlineModuleSettings, Teacher, trained
from okd_lightning.teachers.online_module import ScheduleName
from okd_lightning.training.ahead import ahead_engine
from okd_lightning.training.evaluation import Evaluation
from okd_lightning.training.frozen_parts import FrozenParts
from okd_lightning.training.generation import GeneratingModule
from okd_lightning.training.lightning_privates import begin_step, count_steps
from okd_lightning.training.opening import open_run
from okd_lightning.training.optimization import Optimization, OptimizerBuilder
from okd_lightning.training.pair import Pair
from okd_lightning.training.pair_settings import PairSettings
from okd_lightning.training.rank_agreement import check_ranks_agree, weights_digest
from okd_lightning.training.run_settings import one_line
from okd_lightning.training.run_state import REFUSED_ARGUMENTS, RunState, module_of_checkpoint
from okd_lightning.training.safeguards import with_safeguards
from okd_lightning.training.step import StepLoss, check_fits


class DistillationModule(GeneratingModule):
    """A student and its teacher as a LightningModule, trained by the Trainer's method callbacks.

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
        schedule: Schedule of the learning rate after warm-up.
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
        freeze_vision: Keep the vision tower of a vision-language student as it was loaded; its
            projector and its language model are trained.

    Raises:
        ConfigError: A number out of its range, or no tokenizer.
        ModelError: A model or tokenizer that cannot be loaded.
        VocabularyError: Tokenizers that differ.
    """

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
        freeze_vision: bool = True,
    ) -> None:
        given = {name: value for name, value in locals().items() if name in _ARGUMENTS}
        super().__init__()
        optimization, settings = Optimization.of(given), PairSettings.of(given)
        self.pair = Pair(student, teacher, settings, self._current_trainer, engine)
        self.optimization = OptimizerBuilder(optimization)
        self.frozen_parts = FrozenParts(shared_by_copies=("terms", "acting"))
        self.evaluation = Evaluation(len(self.pair.teacher.names))
        self.student: PreTrainedModel | None = None  # the pair's models, registered for Lightning
        self.teacher: nn.Module | None = None
        self.projectors: Projectors | None = None
        self.learning_rate = self.optimization.settings.learning_rate
        self.weight_decay = self.optimization.settings.weight_decay
        self.normalization = Normalization(normalization)
        self.terms: list[Term] = []
        self.acting: list[Term] = []  # in the last micro-batch
        self.step_loss = StepLoss()
        self.run_state = RunState(given)
        self.chosen_options: Mapping[str, Mapping[str, Any]] | None = None
        self._online_weights: dict[str, Any] = {}  # of an online module that is not attached yet
        self.strict_loading = False  # frozen weights are not in checkpoints; see on_load_checkpoint
        self.register_load_state_dict_post_hook(allow_left_out)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer."""
        return self.pair.tokenizer

    @property
    def vocabulary(self) -> Vocabulary:
        """Ids on which both sides are compared."""
        return self.pair.vocabulary

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self.pair.eos_ids

    @property
    def has_teacher(self) -> bool:
        """True where there is a teacher; ``teacher`` may be None all the same."""
        return self.pair.teacher.exists

    # ---------------------------------------------------------------- setting up

    def add_term(self, term: Term) -> None:
        """Add a method's term to the loss; callbacks call this at ``setup``.

        Raises:
            ConfigError: Two terms of one name, or a term that needs a teacher where there is none.
        """
        check_fits(term, self.terms)
        self.pair.teacher.check_term(term)
        self.terms.append(term)

    def add_online_module(self, settings: OnlineModuleSettings) -> None:
        """Add a trainable module to the teacher; callbacks call this at ``setup``; see ``Pair``."""
        self.pair.add_online_module(settings)
        if self.student is not None:
            self._register()

    def add_teacher_base(self, source: ModelSource, option: str) -> None:
        """Compare the teacher with another frozen model in this fit; see ``Pair``."""
        self.pair.add_teacher_base(source, option)

    def configure_callbacks(self) -> list[Callback]:
        """Return the safeguards that the Trainer lacks; move ModelsFirst to the front."""
        self.terms, self.pair.layer_pairs = (
            [],
            (),
        )  # a failed run leaves its terms
        self.pair.begin()
        return [] if self._trainer is None else with_safeguards(self._trainer)

    def configure_model(self) -> None:
        """Build the pair once; Lightning calls this again for every entry point."""
        self.pair.begin()
        self.pair.build()
        self._register()
        if self._trainer is not None and self._trainer.world_size > 1:
            self.run_state.weights_read = weights_digest(self.pair.models_read)

    def _register(self) -> None:
        """Register the pair's models, and load weights that waited for an online module."""
        self.student, self.teacher = self.pair.student, self.pair.teacher.module
        self.projectors = self.pair.projectors if self.pair.layer_pairs else None
        if self._online_weights and self.pair.teacher.online_module is not None:
            super().load_state_dict(self._online_weights, strict=False)
            self._online_weights = {}

    def setup(self, stage: str) -> None:
        """List all weights again, and record the run's settings, after the callbacks' ``setup``."""
        self.frozen_parts.show()
        if stage == "fit":
            self.run_state.begin(self, self.optimization.described(self))

    def teardown(self, stage: str) -> None:
        """Remove the terms and the teacher's base, so that another Trainer can add its own."""
        self.terms, self.pair.teacher_base, self.pair.layer_pairs = [], None, ()
        self.acting, self.step_loss = [], StepLoss()

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    trained_parameters = staticmethod(trained)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules; while callbacks set up, those without trained parts are omitted."""
        found = super().named_modules(memo, prefix, remove_duplicate)
        return self.frozen_parts.listed(self, found) if self.frozen_parts.are_hidden else found

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy trained parts; share frozen tensors, terms and arguments."""
        return self.frozen_parts.copy_of(self, memo)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; a copy within a run does not change the original's tensors."""
        return super()._apply(self.frozen_parts.moving(fn), recurse)

    def measure(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Measured:
        """Run both sides once over a batch and measure at its unmasked positions; see ``Pair``."""
        return self.pair.measure(batch, quantities)

    def ahead_engine(self, lag: int) -> Callable[[], AheadEngine]:
        """Return the function that starts an engine for rollouts ahead of training."""
        return ahead_engine(self, lag)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build one optimizer over the student and the online module, each with its schedule."""
        return self.optimization.build(self)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip student and projectors by the Trainer's value, the online module by its own norm."""
        if not self.step_loss.clip(self, gradient_clip_val, gradient_clip_algorithm):
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimizer; then update a teacher that follows the student."""
        super().optimizer_step(*args, **kwargs)
        self.pair.teacher.after_step()

    def training_step(self, batch: DistillBatch, batch_idx: int) -> Tensor:
        """Return this micro-batch's loss: each term's sum over its divisor of the whole step."""
        return self.step_loss.loss(self, batch, batch_idx)

    def on_validation_start(self) -> None:
        """Reset the measures; log them at the step of the weights, resumed or loaded."""
        self.evaluation.reset()
        if not self.trainer.sanity_checking:
            count_steps(self.trainer, self.run_state.measured_step(self.trainer))

    on_test_start = on_validation_start

    def validation_step(self, batch: DistillBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Measure divergences to the base teacher at temperature 1, in nats per token."""
        self.evaluation.update_from(self, "test" if self.trainer.testing else "val", batch)

    test_step = validation_step

    def predict_step(
        self, batch: DistillBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Return prompt and generated response of every row, as text."""
        return generation_records(batch, self.decode)

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
            checkpoint_path: A file, or a sharded checkpoint's folder.
            map_location: Device to move the module to; by default it stays on the CPU.
            hparams_file: None: checkpoints hold the constructor's arguments.
            strict: Refuse unknown weights; frozen weights, which are not stored, are never missing.
            weights_only: True or None: checkpoints are always read weights-only.
            kwargs: Arguments of the constructor that replace the checkpoint's.

        Raises:
            CheckpointError: See ``module_of_checkpoint``.
            ConfigError: ``hparams_file`` or ``weights_only=False``.
        """
        if hparams_file is not None or weights_only is False:
            raise ConfigError(REFUSED_ARGUMENTS)
        module: Self = module_of_checkpoint(cls, str(checkpoint_path), kwargs, bool(strict))
        return module if map_location is None else module.to(map_location)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights (strategies with processes of their own do); build missing models first.

        Those of an online module are kept until a method adds one.
        """
        if self.student is None and any(name.startswith("student.") for name in state_dict):
            self.configure_model()
            if self.teacher is not None and self.pair.teacher.online_module is None:
                unknown = state_dict.keys() - self.state_dict().keys()
                self._online_weights = {name: state_dict[name] for name in unknown}
        return super().load_state_dict(state_dict, strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave frozen weights out; add the resolved config, the methods and the RNG streams."""
        self.run_state.save(self, checkpoint, self.optimization.settings.to_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint has this run's methods, models and optimizers."""
        self.run_state.load(self, checkpoint)
        if self.terms:
            self.optimization.resume(checkpoint, self.student)

    def on_fit_start(self) -> None:
        """Report the trained parameters, and open or write the teacher's cache."""
        open_run(self)
        rank_zero_info(one_line(self.run_state.settings or self.optimization.described(self)))

    def on_train_start(self) -> None:
        """Compare the ranks' data and weights; apply optimizer settings that a resume changes."""
        state = self.run_state
        check_ranks_agree(self.trainer, state.weights_read, state.config, self.tokenizer)
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        self.optimization.start(optimizer, scheduler, self.learning_rate)

    def on_train_batch_start(self, batch: DistillBatch, batch_idx: int) -> None:
        """Restore a resumed run's random streams (dropout), once; reset the last step's metrics."""
        if self.run_state.rng is not None:
            self.run_state.restore_streams()
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            begin_step(self.trainer)


_ARGUMENTS = frozenset(inspect.signature(DistillationModule).parameters)
