"""The PairModule: a student and its teacher in one LightningModule.

Owns building both and the online module on the teacher; ``pair_runs`` runs them. ``module`` decides
what is trained, and by which loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, cast

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.checkpoints.contents import allow_left_out
from okd_lightning.checkpoints.folders import read_folders
from okd_lightning.engines.engine import EngineSource
from okd_lightning.engines.tool_rollouts import ToolRounds
from okd_lightning.errors import ConfigError
from okd_lightning.models import (
    DTypeName,
    EndTokensArgument,
    GivenPair,
    ModelArgument,
    ModelSource,
    add_adapter,
    check_pair,
    check_precision,
    compile_blocks,
    dtype_of,
    find_end_tokens,
    find_tokenizer,
    load_checked,
    recompute_activations,
)
from okd_lightning.sharding import Placement, WholeModels
from okd_lightning.teachers import (
    CachedTeacher,
    OnlineModuleSettings,
    SelfTeacher,
    ServedTeacher,
    TeacherBase,
    TeacherCache,
    TeacherServer,
    attach_online_module,
    check_cached_teacher,
    check_online_module,
    check_served_teacher,
    teacher_copy,
)
from okd_lightning.training.frozen_parts import own_memory
from okd_lightning.training.optimizers import float16_refusal
from okd_lightning.training.pair_runs import PairRuns
from okd_lightning.training.pair_sides import tried_model
from okd_lightning.training.rank_agreement import weights_digest


class PairModule(PairRuns):
    """Both models of a distillation; see ``DistillationModule`` for the arguments."""

    shared_by_copies: tuple[str, ...] = (
        "tokenizer",
        "vocabulary",
        "ends",
        "engine",
        "cached_teacher",
        "served_teacher",
        "tool_rounds",
        "placement",
        "teacher_base",
    )

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
        end_tokens: EndTokensArgument | None = None,
    ) -> None:
        super().__init__()
        others = {"teacher": teacher, "self_teacher": self_teacher, "teacher_cache": teacher_cache}
        check_served_teacher(teacher_server, {**others, "teacher_dtype": teacher_dtype})
        check_cached_teacher(teacher_cache, self_teacher, teacher is not None)
        given = GivenPair.of(student, teacher, student_adapter)
        self._given = given  # not a module: a loaded model is registered once, as student
        self.dtype_name = dtype_of(student, dtype)
        self.teacher_dtype_name = dtype_of(teacher, teacher_dtype or dtype)
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.student_adapter = given.adapter
        self.self_teacher = self_teacher
        self.tile_positions = tile_positions
        self.packing = packing
        self.compile_blocks = compile_blocks
        self.engine = engine
        self.packs_student = self.packs_teacher = False  # before there are models
        self.tokenizer = find_tokenizer(tokenizer, given.student, given.teacher)
        self.vocabulary = check_pair(self.tokenizer, given.student, given.teacher)
        ends = find_end_tokens(
            given.student, given.teacher, self.tokenizer, self.vocabulary, end_tokens
        )
        self.cached_teacher: CachedTeacher | None = None
        if teacher_cache is not None:
            self.cached_teacher = CachedTeacher(TeacherCache.of(teacher_cache), self.vocabulary)
        self.served_teacher: ServedTeacher | None = None
        if teacher_server is not None:
            server = TeacherServer.of(teacher_server)
            wide = torch.promote_types(getattr(torch, self.dtype_name), torch.float32)
            self.served_teacher = ServedTeacher(server, self.vocabulary, self.tokenizer, wide)
        self.use_ends(ends)
        self.weights_read = ""  # digest of the weights, in a run of several processes
        self.student: PreTrainedModel | None = None
        self.teacher: PreTrainedModel | None = None
        self.online_module: OnlineModuleSettings | None = None
        self.teacher_base: TeacherBase | None = None
        self._has_online_module = False
        self._online_weights: dict[str, Any] = {}  # of an online module that is not attached yet
        self.tool_rounds: ToolRounds | None = None
        self.placement: Placement = WholeModels()  # a sharding strategy replaces it
        self.register_load_state_dict_post_hook(allow_left_out)

    @property
    def student_source(self) -> ModelSource:
        """Source from which the student is loaded."""
        return self._given.student

    @property
    def teacher_source(self) -> ModelSource | None:
        """Source from which the teacher is loaded (a self-teacher's is the student's), or None."""
        return self._given.teacher if self.self_teacher is None else self._given.student

    @property
    def has_teacher(self) -> bool:
        """True where there is a teacher; if it is the student itself, ``teacher`` may be None."""
        return self.teacher_source is not None or self.served_teacher is not None

    @property
    def cache_in_use(self) -> CachedTeacher | ServedTeacher | None:
        """Replacement of a teacher in memory: a server always, a cache while a run trains."""
        if self.served_teacher is not None:
            return self.served_teacher
        is_training = self._trainer is not None and self._trainer.state.fn == "fit"
        return self.cached_teacher if is_training else None

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Load both models once; Lightning calls this again for every entry point.

        Random initial weights (a student from a config, adapters) depend on the seed alone, not on
        random numbers that a strategy drew before. A run that trains from a cache has no teacher in
        memory.
        """
        with _drawing_from_the_seed():
            if self.student is None:
                self._build_student()
            if self.cache_in_use is not None:
                self.teacher = None
            elif self.teacher_source is not None:
                self._build_teacher()
        if self.teacher_base is not None:
            self._check_one_base()
            self.teacher_base.load(self.teacher_dtype_name, self.attn_implementation, self.packing)
        if self._trainer is not None and self._trainer.world_size > 1:
            base = None if self.teacher_base is None else self.teacher_base.model
            self.weights_read = weights_digest((self.student, self.teacher, base))

    def _build_student(self) -> None:
        self.student = load_checked(
            self.student_source,
            "--model.student",
            self.vocabulary.size,
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
            learns="all" if self.student_adapter is None else "adapter",
        )
        if self.self_teacher == "frozen" and not self._teaches_as_base:
            self.teacher = teacher_copy(self.student)
        if self.student_adapter is not None and not self._given.has_adapter:
            add_adapter(self.student, self.student_adapter, "--model.student_adapter")
        if self.self_teacher == "ema":
            self.teacher = teacher_copy(self.student)
        if self.gradient_checkpointing:
            recompute_activations(self.student, "--model.student")
        self.packs_student = tried_model(self.student, self.packing, "student")
        if self.compile_blocks:
            compile_blocks(self.student)
        own_memory(self.trained_parameters(self.student))
        self.student.train()

    @property
    def _teaches_as_base(self) -> bool:
        """True where a frozen self-teacher is the student without its adapter, and no copy."""
        is_new = self.student_adapter is not None and not self._given.has_adapter
        return is_new and self.online_module is None

    def _build_teacher(self) -> None:
        if self.self_teacher is None and self.teacher is None:
            self.teacher = self.load_teacher()
        if self.online_module is not None and not self._has_online_module:
            self._attach_online_module()
        elif self.teacher is not None and self.self_teacher is not None:
            self.packs_teacher = tried_model(self.teacher, self.packing, "teacher")

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights; build the models first where they are missing.

        Strategies that train in their own processes (ddp_notebook, ddp_fork, ddp_spawn) return the
        trained weights to the module of the first process this way. Those of an online module are
        kept until a method adds one.
        """
        if self.student is None and any(name.startswith("student.") for name in state_dict):
            self.configure_model()
            if self.teacher is not None and not self._has_online_module:
                unknown = state_dict.keys() - self.state_dict().keys()
                self._online_weights = {name: state_dict[name] for name in unknown}
        return super().load_state_dict(state_dict, strict, assign)

    def load_teacher(self) -> PreTrainedModel:
        """Load the teacher, frozen and in eval mode; the module does not keep it."""
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

    def check_run(self, stage: str) -> None:
        """Check everything that needs no models; ``ModelsFirst`` calls it at its ``setup``.

        Raises:
            ConfigError: One of Lightning's "true" precisions (models are loaded in their own number
                format), float16 weights that would be trained, or a module that torch.compile
                wraps.
        """
        if stage == "fit" and self.dtype_name == "float16" and self.student_adapter is None:
            raise ConfigError(float16_refusal("the student"))
        read_folders(self.trainer)
        check_precision(str(self.trainer.precision))
        if self._compiler_ctx is not None or self._compiled_call_impl is not None:
            raise ConfigError(
                "the module is wrapped by torch.compile, which cannot trace rollouts and losses; "
                "give the module as it is, and compile the blocks of both models with "
                "model.compile_blocks (--model.compile_blocks true, or compile_blocks=True)"
            )

    def setup(self, stage: str) -> None:
        """List all weights again, after the callbacks' ``setup`` has seen the trained ones."""
        self.list_all_parts()

    def add_online_module(self, settings: OnlineModuleSettings) -> None:
        """Add a trainable module to the teacher; callbacks call this at ``setup``.

        Raises:
            ConfigError: No teacher or one that follows the student, or two methods that need
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
            with _drawing_from_the_seed():
                self._attach_online_module()

    def add_teacher_base(self, source: ModelSource, option: str) -> None:
        """Compare the teacher with another frozen model; callbacks call this at ``setup`` of a fit.

        Quantities with ``needs_base_teacher`` read that model then. It is loaded in the teacher's
        number format, is in no checkpoint, and is forgotten when the run ends.

        Args:
            source: Folder or hub id, such as that of the teacher before its post-training.
            option: How the user named it, for messages, such as ``--method.teacher_base``.

        Raises:
            ConfigError: Another method of the run compares with another model.
            ModelError, VocabularyError: It cannot be read, or has other ids.
        """
        if self.teacher_base is not None:
            if self.teacher_base.source != source:
                raise ConfigError(
                    f"{option} {source!r} and {self.teacher_base.source!r}: the methods of a run "
                    "compare the teacher with one model; name the same one"
                )
            return
        base = TeacherBase(source, option, self.vocabulary)
        base.check(self.tokenizer)
        self.teacher_base = base

    def _check_one_base(self) -> None:
        if self.online_module is not None:
            assert self.teacher_base is not None
            raise ConfigError(
                f"{self.teacher_base.option} names the teacher's base, and a method of this run "
                "(OKD) puts an online module on the teacher, whose base is the teacher without it; "
                "use one of both methods"
            )

    def _attach_online_module(self) -> None:
        assert self.teacher is not None
        assert self.online_module is not None
        option = "--method.online_module"
        adapted = attach_online_module(
            self.teacher, self.online_module.config, option, self.gradient_checkpointing
        )
        self.teacher = cast(PreTrainedModel, adapted)  # a PeftModel forwards the attributes of one
        self._has_online_module = True
        self.packs_teacher = tried_model(self.teacher, self.packing, "teacher")
        if self._online_weights:
            super().load_state_dict(self._online_weights, strict=False)
            self._online_weights = {}

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def trained_parameters(self, side: nn.Module | None) -> list[nn.Parameter]:
        """Return the trained parameters of one of the two models."""
        return [p for p in side.parameters() if p.requires_grad] if side is not None else []


@contextmanager
def _drawing_from_the_seed() -> Iterator[None]:
    """Make random weights depend on the seed alone, not on earlier random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield
