"""The PairModule: a student and its teacher in one LightningModule.

Owns building both, the online module on the teacher, running them over a batch to measure, and
having them write. What is trained, and by which loss, is ``module``'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Self, cast

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.checkpoint_folders import read_folders
from okd_lightning.errors import ConfigError
from okd_lightning.losses import (
    Measured,
    Quantity,
    Side,
    WeightedLoss,
    WeightedTerm,
    fused_loss,
    measure,
    weighted_loss,
)
from okd_lightning.models import (
    DTypeName,
    LMHead,
    ModelArgument,
    ModelSource,
    OnlineModuleSettings,
    SelfTeacher,
    WithinContext,
    add_adapter,
    attach_online_module,
    base_teacher,
    check_causal,
    check_lengths,
    check_pair,
    detached,
    eos_token_ids,
    find_tokenizer,
    head_inputs,
    in_eval_mode,
    load_causal_lm,
    load_model_config,
    recompute_activations,
    teacher_copy,
)
from okd_lightning.records import DistillBatch, PromptBatch, Rollout, Sequences
from okd_lightning.rollouts import NoiseStream, RolloutEngine, Sampling, TransformersEngine
from okd_lightning.rollouts.engine import Author, Progress
from okd_lightning.rollouts.tool_rollouts import ToolEngine, ToolRounds
from okd_lightning.sharding import Placement, WholeModels


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
    ) -> None:
        super().__init__()
        if isinstance(student, PreTrainedModel) and student is teacher:
            raise ConfigError(
                "student and teacher are the same object: the teacher is frozen, so the student "
                "would not train; load it twice, or give self_teacher in place of the teacher"
            )
        self._sources = (student, teacher)  # a tuple: a loaded model is registered once, as student
        self.dtype_name = dtype
        self.teacher_dtype_name = teacher_dtype or dtype
        self.attn_implementation = attn_implementation
        self.gradient_checkpointing = gradient_checkpointing
        self.student_adapter = student_adapter
        self.self_teacher = self_teacher
        self.tile_positions = tile_positions
        self.tokenizer = find_tokenizer(tokenizer, student, teacher)
        self.vocabulary = check_pair(self.tokenizer, student, teacher)
        self.eos_ids = eos_token_ids(student, self.tokenizer)
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
        return self.teacher_source is not None

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Load both models (once; Lightning calls this again for every entry point).

        What starts random (a student from a config, adapters) depends on the seed alone, not on
        what a strategy drew before.
        """
        if self.student is not None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            self._build_student()
            self._build_teacher()

    def _build_student(self) -> None:
        config = load_model_config(self.student_source, "--model.student", self.vocabulary.size)
        self.student = load_causal_lm(
            self.student_source,
            config,
            "--model.student",
            dtype=self.dtype_name,
            attn_implementation=self.attn_implementation,
        )
        check_causal(self.student, "--model.student")
        if self.self_teacher == "frozen" and not self._teaches_as_base:
            self.teacher = teacher_copy(self.student)
        if self.student_adapter is not None:
            add_adapter(self.student, self.student_adapter, "--model.student_adapter")
        if self.self_teacher == "ema":
            self.teacher = teacher_copy(self.student)
        if self.gradient_checkpointing:
            recompute_activations(self.student, "--model.student")
        self.student.train()

    @property
    def _teaches_as_base(self) -> bool:
        """Whether a frozen self-teacher is the student without its adapter, and no copy."""
        return self.student_adapter is not None and self.online_module is None

    def _build_teacher(self) -> None:
        if self.teacher_source is None:
            return
        if self.self_teacher is None:
            config = load_model_config(self.teacher_source, "--model.teacher", self.vocabulary.size)
            self.teacher = load_causal_lm(
                self.teacher_source,
                config,
                "--model.teacher",
                dtype=self.teacher_dtype_name,
                attn_implementation=self.attn_implementation,
            )
            self.teacher.requires_grad_(False).eval()
            check_causal(self.teacher, "--model.teacher")
        if self.online_module is not None:
            self._attach_online_module()

    def setup(self, stage: str) -> None:
        """Refuse Lightning's "true" precisions: models are loaded in their own number format."""
        read_folders(self.trainer)
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise ConfigError(
                f"trainer.precision {precision} would convert batches and losses as well; give "
                "--trainer.precision bf16-mixed (and --model.teacher_dtype bfloat16), or load the "
                "weights themselves in bfloat16 with --model.dtype bfloat16"
            )

    def add_online_module(self, settings: OnlineModuleSettings) -> None:
        """Put a trainable module on the teacher; callbacks call this at ``setup``.

        Raises:
            ConfigError: No teacher or one that follows the student, or two methods that ask for
                different modules.
        """
        if self.online_module is not None and self.online_module != settings:
            raise ConfigError(
                "two methods ask for different online modules on one teacher; give both the same"
            )
        if self.teacher_source is None:
            raise ConfigError("an online module needs a teacher: give --model.teacher")
        if self.self_teacher in ("ema", "live"):
            raise ConfigError(
                f"model.self_teacher {self.self_teacher} follows the student, and an online module "
                "is trained on a teacher that stays: use --model.self_teacher frozen, or another "
                "method"
            )
        if self.student is not None and self.teacher is None:
            raise ConfigError(
                "this module was built for a method without an online module, with the student's "
                "base as its teacher; make a new DistillationModule for this one"
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

    def as_base_teacher(self) -> AbstractContextManager[None]:
        """Within it the teacher is the base one, without its online module."""
        if self.teacher is None or not self._has_online_module:
            return nullcontext()
        return base_teacher(self.teacher)

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
        student, teacher, base = self._sides(batch, quantities)
        values = measure(
            quantities,
            student,
            teacher,
            batch.as_student_reads().targets,
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
        quantities = [quantity for weighted in terms for quantity in weighted.term.quantities]
        if not all(weighted.term.is_positionwise for weighted in terms):
            return weighted_loss(terms, self.measure(batch, quantities))
        student, teacher, base = self._sides(batch, quantities)
        return fused_loss(
            terms,
            student,
            teacher,
            batch.as_student_reads().targets,
            Measured.about(batch),
            self.vocabulary.size,
            self.tile_positions,
            base,
            checks,
        )

    def _sides(
        self, batch: DistillBatch, quantities: Sequence[Quantity]
    ) -> tuple[Side, Side | None, Side | None]:
        """Hidden states at the masked-in positions, with heads: student, teacher, base teacher."""
        assert self.student is not None
        student = self._side(self.student, batch.as_student_reads())
        teacher = base = None
        if any(quantity.needs_teacher for quantity in quantities):
            learns = torch.is_grad_enabled() and any(q.trains_teacher for q in quantities)
            teacher = self._teacher_side(batch.as_teacher_reads(), learns)
            assert len(teacher.hidden) == len(student.hidden), "other loss tokens than the student"
        if any(quantity.needs_base_teacher for quantity in quantities):
            base = self._base_side(batch.as_teacher_reads())
        return student, teacher, base

    def _side(self, model: PreTrainedModel, read: Sequences) -> Side:
        hidden = head_inputs(model, read.input_ids, read.attention_mask)[:, :-1]
        return Side(hidden=hidden[read.mask[:, 1:]], head=LMHead.of(model, self.vocabulary))

    def _teacher_side(self, read: Sequences, learns: bool) -> Side:
        """The teacher's half; where the student teaches itself, no gradient goes through it."""
        if self.teacher is not None:
            with torch.set_grad_enabled(learns):
                return self._side(self.teacher, read)
        assert self.student is not None
        with torch.no_grad(), self._student_as_teacher():
            side = self._side(self.student, read)
            head = LMHead.of(self.student, self.vocabulary)
            return replace(side, head=replace(head, module=detached(head.module)))

    @contextmanager
    def _student_as_teacher(self) -> Iterator[None]:
        """The student in eval mode; as a frozen teacher without its adapter."""
        assert self.student is not None
        assert self.self_teacher is not None
        adapter = base_teacher(self.student) if self.self_teacher == "frozen" else nullcontext()
        with in_eval_mode(self.student), adapter:
            yield

    def _base_side(self, read: Sequences) -> Side:
        """The teacher's half without its online module, which may sit on the head as well."""
        with self.as_base_teacher():
            side = self._teacher_side(read, learns=False)
        assert isinstance(side.head, LMHead)
        within = WithinContext(side.head.module, self.as_base_teacher)
        return replace(side, head=replace(side.head, module=within))

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
        assert self.student is not None
        model = self.student if author == "student" else self.teacher
        as_author: AbstractContextManager[None] = self.as_base_teacher()
        if model is None:
            model, as_author = self.student, self._student_as_teacher()
        phase = self.placement.alone(model)
        if isinstance(model, PeftModel):
            model = cast(PreTrainedModel, model.get_base_model())
        precision = self._trainer.precision_plugin.forward_context if self._trainer else nullcontext
        with torch.no_grad(), precision(), phase, in_eval_mode(model), as_author:
            engine = self.build_engine(model)
            if self.tool_rounds is not None:
                engine = ToolEngine(engine, self.tool_rounds)
            return engine.generate(prompts, sampling, generator, max_new_tokens, progress)

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """The engine that writes with ``model``; override it to bring another."""
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
        teacher = (self.teacher or self.student) if self.has_teacher else None
        check_lengths(self.student, teacher, num_tokens, teacher_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
