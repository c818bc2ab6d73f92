"""The PairModule: a student and its teacher in one LightningModule.

Owns building both, the online module on the teacher, running them over a batch to measure, and
having them write. What is trained, and by which loss, is ``module``'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Self, cast

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.checkpoints.folders import read_folders
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Measured,
    Quantity,
    WeightedLoss,
    WeightedTerm,
    fused_loss,
    measure,
    weighted_loss,
)
from okd_lightning.models import (
    DTypeName,
    ModelArgument,
    ModelSource,
    OnlineModuleSettings,
    SelfTeacher,
    add_adapter,
    attach_online_module,
    check_lengths,
    check_online_module,
    check_pair,
    check_precision,
    compile_blocks,
    dtype_of,
    eos_token_ids,
    find_tokenizer,
    load_checked,
    load_model_config,
    recompute_activations,
    teacher_copy,
)
from okd_lightning.records import DistillBatch, PromptBatch, Rollout
from okd_lightning.rollouts import NoiseStream, RolloutEngine, Sampling, TransformersEngine
from okd_lightning.rollouts.engine import Author, EngineSource, Progress
from okd_lightning.rollouts.tool_rollouts import ToolEngine, ToolRounds
from okd_lightning.sharding import Placement, WholeModels
from okd_lightning.teacher_cache import (
    CachedTeacher,
    ServedTeacher,
    TeacherCache,
    TeacherServer,
    cached_terms,
    check_cached_teacher,
    check_served_teacher,
)
from okd_lightning.training.pair_sides import PairSides, tried_model


class PairModule(lightning.LightningModule):
    """Both models of a distillation; see ``DistillationModule`` for the arguments."""

    def __init__(
        self,
        student: ModelArgument,
        teacher: ModelArgument | None,
        *,
        tokenizer: str | PreTrainedTokenizerBase | None,
        dtype: DTypeName,
        teacher_dtype: DTypeName | None,
        attn_implementation: str | None,
        gradient_checkpointing: bool,
        student_adapter: PeftConfig | None,
        self_teacher: SelfTeacher | None = None,
        tile_positions: int | None = None,
        packing: bool = True,
        compile_blocks: bool = False,
        teacher_cache: TeacherCache | str | None = None,
        teacher_server: TeacherServer | str | None = None,
        engine: EngineSource | None = None,
    ) -> None:
        super().__init__()
        others = {"teacher": teacher, "self_teacher": self_teacher, "teacher_cache": teacher_cache}
        check_served_teacher(teacher_server, {**others, "teacher_dtype": teacher_dtype})
        check_cached_teacher(teacher_cache, self_teacher, teacher is not None)
        if isinstance(student, PreTrainedModel) and student is teacher:
            raise ConfigError(
                "student and teacher are the same object: the teacher is frozen, so the student "
                "would not train; load it twice, or give self_teacher in place of the teacher"
            )
        self._sources = (student, teacher)  # a tuple: a loaded model is registered once, as student
        self.dtype_name = dtype_of(student, dtype)
        self.teacher_dtype_name = dtype_of(teacher, teacher_dtype or dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.student_adapter = student_adapter
        self.self_teacher = self_teacher
        self.tile_positions = tile_positions
        self.packing = packing
        self.compile_blocks = compile_blocks
        self.engine = engine
        self.packs_student = self.packs_teacher = False  # before there are models
        self.tokenizer = find_tokenizer(tokenizer, student, teacher)
        self.vocabulary = check_pair(self.tokenizer, student, teacher)
        self.eos_ids = eos_token_ids(student, self.tokenizer)
        self.cached_teacher: CachedTeacher | None = None
        if teacher_cache is not None:
            self.cached_teacher = CachedTeacher(TeacherCache.of(teacher_cache), self.vocabulary)
        self.served_teacher: ServedTeacher | None = None
        if teacher_server is not None:
            server = TeacherServer.of(teacher_server)
            self.served_teacher = ServedTeacher(server, self.vocabulary, self.tokenizer)
        self.student: PreTrainedModel | None = None
        self.teacher: PreTrainedModel | None = None
        self.online_module: OnlineModuleSettings | None = None
        self._has_online_module = False
        self.tool_rounds: ToolRounds | None = None
        self.placement: Placement = WholeModels()  # a strategy that shards brings its own

    @property
    def student_source(self) -> ModelSource:
        """What the student is loaded from."""
        return self._sources[0]

    @property
    def teacher_source(self) -> ModelSource | None:
        """What the teacher is loaded from (a self-teacher as the student is); None without one."""
        return self._sources[1] if self.self_teacher is None else self._sources[0]

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher; where it is the student itself, ``teacher`` may be None."""
        return self.teacher_source is not None or self.served_teacher is not None

    @property
    def cache_in_use(self) -> CachedTeacher | ServedTeacher | None:
        """What stands for the teacher: a server always, a cache while a run trains."""
        if self.served_teacher is not None:
            return self.served_teacher
        is_training = self._trainer is not None and self._trainer.state.fn == "fit"
        return self.cached_teacher if is_training else None

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Load both models (once; Lightning calls this again for every entry point).

        What starts random (a student from a config, adapters) depends on the seed alone, not on
        what a strategy drew before. A run that trains from a cache has no teacher in memory.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            if self.student is None:
                self._build_student()
            if self.cache_in_use is not None:
                self.teacher = None
            elif self.teacher_source is not None:
                self._build_teacher()

    def _build_student(self) -> None:
        self.student = load_checked(
            self.student_source,
            "--model.student",
            self.vocabulary.size,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
        )
        if self.self_teacher == "frozen" and not self._teaches_as_base:
            self.teacher = teacher_copy(self.student)
        if self.student_adapter is not None:
            add_adapter(self.student, self.student_adapter, "--model.student_adapter")
        if self.self_teacher == "ema":
            self.teacher = teacher_copy(self.student)
        if self.gradient_checkpointing:
            recompute_activations(self.student, "--model.student")
        self.packs_student = tried_model(self.student, self.packing, "student")
        if self.compile_blocks:
            compile_blocks(self.student)
        self.student.train()

    @property
    def _teaches_as_base(self) -> bool:
        """Whether a frozen self-teacher is the student without its adapter, and no copy."""
        return self.student_adapter is not None and self.online_module is None

    def _build_teacher(self) -> None:
        if self.self_teacher is None and self.teacher is None:
            self.teacher = self.load_teacher()
        if self.online_module is not None and not self._has_online_module:
            self._attach_online_module()
        elif self.teacher is not None and self.self_teacher is not None:
            self.packs_teacher = tried_model(self.teacher, self.packing, "teacher")

    def load_teacher(self) -> PreTrainedModel:
        """The teacher from what was named, frozen and in eval mode; the module does not keep it."""
        assert self.teacher_source is not None
        teacher = load_checked(
            self.teacher_source,
            "--model.teacher",
            self.vocabulary.size,
            dtype=self.teacher_dtype_name,
            attn_implementation=self.attn_implementation,
        )
        self.packs_teacher = tried_model(teacher, self.packing, "teacher")
        if self.compile_blocks:
            compile_blocks(teacher)
        return teacher.requires_grad_(False).eval()

    def setup(self, stage: str) -> None:
        """Refuse Lightning's "true" precisions: models are loaded in their own number format."""
        read_folders(self.trainer)
        check_precision(str(self.trainer.precision))

    def add_online_module(self, settings: OnlineModuleSettings) -> None:
        """Put a trainable module on the teacher; callbacks call this at ``setup``.

        Raises:
            ConfigError: No teacher or one that follows the student, or two methods that ask for
                different modules.
        """
        check_online_module(
            settings,
            self.online_module,
            has_teacher=self.teacher_source is not None,
            is_cached=self.cached_teacher is not None,
            self_teacher=self.self_teacher,
            is_built_without=self.student is not None and self.teacher is None,
        )
        self.online_module = settings
        if self.teacher is not None and not self._has_online_module:
            self._attach_online_module()

    def _attach_online_module(self) -> None:
        assert self.teacher is not None
        assert self.online_module is not None
        option = "--method.online_module"
        adapted = attach_online_module(
            self.teacher, self.online_module.config, option, self.gradient_checkpointing
        )
        self.teacher = cast(PreTrainedModel, adapted)  # a PeftModel answers as one
        self._has_online_module = True
        self.packs_teacher = tried_model(self.teacher, self.packing, "teacher")

    def as_base_teacher(self) -> AbstractContextManager[None]:
        """Within it the teacher is the base one, without its online module."""
        return self.sides.as_base_teacher()

    def train(self, mode: bool = True) -> Self:
        """Training mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def trained_parameters(self, side: nn.Module | None) -> list[nn.Parameter]:
        """What is trained of one of the two models."""
        return [p for p in side.parameters() if p.requires_grad] if side is not None else []

    # ---------------------------------------------------------------- running

    def measure(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Measured:
        """Run the models once over a batch and measure at its masked-in positions.

        The student runs in the caller's gradient mode; the teacher runs without gradient, but
        where a quantity trains its online module, and a second time without that module, where a
        quantity compares with the base. It reads its own prompts where the batch has them; the
        positions are those of the same response tokens on both sides.
        """
        student, teacher, base = self.sides.of(batch, quantities)
        values = measure(
            quantities,
            student,
            teacher,
            batch.student_reads.targets,
            self.vocabulary.size,
            self.tile_positions,
            base,
        )
        if not torch.is_grad_enabled():
            self.placement.release(self.student, self.teacher)
        return replace(Measured.about(batch), values=values)

    def loss_of(
        self, batch: DistillBatch, terms: Sequence[WeightedTerm], checks: bool = False
    ) -> WeightedLoss:
        """Run the models once over a batch and sum its weighted terms; gradient flows as they say.

        It is done tile by tile where all terms are positionwise; ``checks`` sees whether they are.
        """
        if self.cache_in_use is not None:
            terms = cached_terms(terms, self.cache_in_use.k, self.vocabulary.size)
        quantities = [quantity for weighted in terms for quantity in weighted.term.quantities]
        if not all(weighted.term.is_positionwise for weighted in terms):
            return weighted_loss(terms, self.measure(batch, quantities))
        student, teacher, base = self.sides.of(batch, quantities)
        return fused_loss(
            terms,
            student,
            teacher,
            batch.student_reads.targets,
            Measured.about(batch),
            self.vocabulary.size,
            self.tile_positions,
            base,
            checks,
        )

    @property
    def sides(self) -> PairSides:
        """Both models as what the loss layer reads."""
        assert self.student is not None
        return PairSides(
            student=self.student,
            teacher=self.teacher,
            vocabulary=self.vocabulary,
            self_teacher=self.self_teacher,
            packs=(self.packs_student, self.packs_teacher),
            has_online_module=self._has_online_module,
            absent=self.cache_in_use,
        )

    def write(
        self,
        author: Author,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """Responses by the student or the teacher, in eval mode and without gradient.

        Where the data brings tools (``tool_rounds``), prompts that are chats may call them.
        """
        with self.writing(author) as (model,):
            if author == "student" and self.engine is not None:
                engine = self.engine.engine(model, self.vocabulary, self.eos_ids)
            else:
                engine = self.build_engine(model)
            if self.tool_rounds is not None:
                engine = ToolEngine(engine, self.tool_rounds)
            return engine.generate(prompts, sampling, generator, max_new_tokens, progress)

    def writing(self, *authors: Author) -> AbstractContextManager[list[PreTrainedModel]]:
        """Within it the authors' models can write; see ``PairSides.writing``."""
        precision = self._trainer.precision_plugin.forward_context if self._trainer else nullcontext
        return self.sides.writing(authors, self.placement, precision())

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """The built-in engine on ``model``; override it to bring another for both models."""
        return TransformersEngine(model, self.vocabulary, self.eos_ids)

    def add_eos_ids(self, ids: Iterable[int]) -> None:
        """Let further ids end a response, such as a chat template's end of turn; said once."""
        new = [i for i in ids if i not in self.eos_ids]
        if new:
            self.eos_ids = (*self.eos_ids, *new)
            names = ", ".join(repr(self.tokenizer.decode([i])) for i in new)
            rank_zero_info(f"responses also end at {names}, as the data's own responses do")

    def check_lengths(self, num_tokens: int, teacher_tokens: int | None = None) -> None:
        """Refuse sequences that are longer than a model was made for.

        Args:
            num_tokens: The longest that the student reads.
            teacher_tokens: The longest that the teacher reads; None for the same.

        Raises:
            ConfigError: Naming the model and both lengths.
        """
        student = self.student.config if self.student is not None else None
        teacher = None if self.self_teacher is None else student
        if (
            self.self_teacher is None and self.teacher_source is not None
        ):  # which may be in a cache alone
            size = self.vocabulary.size
            teacher = load_model_config(self.teacher_source, "--model.teacher", size)
        check_lengths(student, teacher, num_tokens, teacher_tokens or num_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
