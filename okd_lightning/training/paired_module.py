"""The PairedModule: a LightningModule that has a pair.

Owns when the pair is built, the registration of its models under ``student`` and ``teacher``, and
the loading of their weights. The pair runs them; ``module`` decides what is trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.checkpoints.contents import allow_left_out
from okd_lightning.checkpoints.folders import read_folders
from okd_lightning.engines import MixedDraws, RolloutEngine, Sampling, TransformersEngine
from okd_lightning.engines.engine import EngineSource
from okd_lightning.engines.tool_rollouts import ToolEngine, ToolRounds
from okd_lightning.errors import ConfigError
from okd_lightning.losses import Measured, Quantity, WeightedLoss, WeightedTerm
from okd_lightning.models import EndTokens, ModelSource, Vocabulary, check_precision
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.requests import Generator, Request, Response, Rollout
from okd_lightning.teachers import GeneratingModels, OnlineModuleSettings, trained
from okd_lightning.training.frozen_parts import FrozenPartsModule
from okd_lightning.training.optimizers import float16_refusal
from okd_lightning.training.pair import Pair
from okd_lightning.training.rank_agreement import weights_digest


class PairedModule(FrozenPartsModule):
    """A LightningModule around a pair; see ``DistillationModule`` for the arguments.

    Attributes:
        pair: The student, its teacher, their vocabulary and their placement.
        student: The student's model, registered here for Lightning; None before it is built.
        teacher: The teacher's models; None before it is built, and where it has none.
        engine: Source of the engine for the student's responses.
    """

    shared_by_copies: tuple[str, ...] = ("engine",)

    def __init__(self, pair: Pair, engine: EngineSource | None) -> None:
        super().__init__()
        self.pair = pair
        self.engine = engine
        self.student: PreTrainedModel | None = None
        self.teacher: nn.Module | None = None
        self.weights_read = ""  # digest of the weights, in a run of several processes
        self._online_weights: dict[str, Any] = {}  # of an online module that is not attached yet
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
    def ends(self) -> EndTokens:
        """Ids that end a response, one outcome for both models."""
        return self.pair.ends

    @property
    def has_teacher(self) -> bool:
        """True where there is a teacher; ``teacher`` may be None all the same."""
        return self.pair.teacher.exists

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of the teachers that rows choose from; none where there is one for all rows."""
        return self.pair.given_teacher.names

    @property
    def online_module(self) -> OnlineModuleSettings | None:
        """Settings of the teacher's online module; None where it has none."""
        return self.pair.teacher.online_module

    @property
    def tool_rounds(self) -> ToolRounds | None:
        """The tools of the data, which prompts that are chats may call."""
        return self.pair.tool_rounds

    @tool_rounds.setter
    def tool_rounds(self, rounds: ToolRounds | None) -> None:
        self.pair.tool_rounds = rounds

    # ---------------------------------------------------------------- building

    def configure_model(self) -> None:
        """Build the pair once; Lightning calls this again for every entry point."""
        self.pair.build()
        self._register()
        if self._trainer is not None and self._trainer.world_size > 1:
            base = self.pair.teacher_base
            own = None if base is None else base.model
            self.weights_read = weights_digest([*self.pair.models, own])

    def _register(self) -> None:
        """Register the pair's models, and load weights that waited for an online module."""
        self.student, self.teacher = self.pair.student, self.pair.teacher.module
        if self._online_weights and self.online_module is not None:
            super().load_state_dict(self._online_weights, strict=False)
            self._online_weights = {}

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
            if self.teacher is not None and self.online_module is None:
                unknown = state_dict.keys() - self.state_dict().keys()
                self._online_weights = {name: state_dict[name] for name in unknown}
        return super().load_state_dict(state_dict, strict, assign)

    def check_run(self, stage: str) -> None:
        """Check everything that needs no models; ``ModelsFirst`` calls it at its ``setup``.

        Raises:
            ConfigError: One of Lightning's "true" precisions (models are loaded in their own number
                format), float16 weights that would be trained, or a module that torch.compile
                wraps.
        """
        if stage == "fit" and self.pair.dtype == "float16" and self.pair.student_adapter is None:
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
            ConfigError: A teacher that cannot have one, or two methods that need different modules.
        """
        self.pair.add_online_module(settings)
        if self.student is not None:
            self._register()

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
        self.pair.add_teacher_base(source, option)

    def train(self, mode: bool = True) -> Self:
        """Set training mode for the student; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def trained_parameters(self, side: nn.Module | None) -> list[nn.Parameter]:
        """Return the trained parameters of one of the two models."""
        return trained(side)

    def _current_trainer(self) -> Any:
        return self._trainer

    # ---------------------------------------------------------------- running

    def as_base_teacher(self) -> AbstractContextManager[None]:
        """Disable the teacher's online module within the block, which gives the base teacher."""
        return self.pair.teacher.as_base()

    def measure(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Measured:
        """Run both sides once over a batch and measure at its unmasked positions.

        The student runs in the caller's gradient mode; the teacher runs without gradient, except
        where a quantity trains its online module. Where a quantity compares with the base, that
        runs as well: the model of ``add_teacher_base``, or the teacher a second time without its
        online module. The teacher reads its own prompts where the batch has them; the positions are
        those of the same response tokens on both sides.
        """
        return self.pair.measure(batch, quantities)

    def loss_of(
        self, batch: DistillBatch, terms: Sequence[WeightedTerm], checks: bool = False
    ) -> WeightedLoss:
        """Run both sides once over a batch and sum the weighted terms, which decide the gradient.

        The sum is computed tile by tile where all terms are positionwise; ``checks`` verifies that
        they are.
        """
        return self.pair.loss_of(batch, terms, checks)

    def respond(self, request: Request) -> Rollout:
        """Generate responses with the student or the teacher, in eval mode and without gradient.

        Where the data has tools (``tool_rounds``), prompts that are chats may call them.
        """
        with self.pair.writing(request.generator) as (parts,):
            if len(parts) == 1:
                return self._engine_of(parts[0], request.generator).respond(request)
            numbers = [self.pair.teacher.generator_of(prompt) for prompt in request.prompts]
            written: dict[int, Response] = {}
            row_steps = 0
            for number, own in enumerate(parts):
                rows = [row for row, part in enumerate(numbers) if part == number]
                prompts = tuple(request.prompts[row] for row in rows)
                engine = self._engine_of(own, request.generator)
                rollout = engine.respond(replace(request, prompts=prompts))
                written |= dict(zip(rows, rollout, strict=True))
                row_steps += rollout.num_row_steps
            return Rollout(tuple(written[row] for row in range(len(numbers))), row_steps)

    def _engine_of(self, own: GeneratingModels, who: Generator) -> RolloutEngine:
        if who == "student" and self.engine is not None:
            engine = self.engine.engine(own.models[0], self.vocabulary, self.eos_ids)
        else:
            engine = self._built_in_engine(own)
        return engine if self.tool_rounds is None else ToolEngine(engine, self.tool_rounds)

    def _built_in_engine(self, own: GeneratingModels) -> RolloutEngine:
        engine = self.build_engine(own.models[0])
        if own.mix is None:
            return engine
        if not isinstance(engine, TransformersEngine):
            raise ConfigError(
                f"{type(engine).__name__} writes with one model, and the teacher has "
                f"{len(own.models)}: leave build_engine to the built-in engine"
            )
        return replace(engine, blend=MixedDraws(own.models[1:], own.mix))

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """Build the built-in engine on ``model``; override to use another for both models."""
        return TransformersEngine(model, self.vocabulary, self.eos_ids)

    def use_ends(self, ends: EndTokens) -> None:
        """Take these ids as the ends of a response; before training, and equal on all ranks."""
        self.pair.use_ends(ends)

    def keep_apart(self, ids: Collection[int]) -> None:
        """Take ids after which a response goes on out of the ends; logged once."""
        self.pair.keep_apart(ids)

    def add_eos_ids(self, ids: Iterable[int]) -> None:
        """Let further ids end a response, such as a chat template's end of turn; logged once."""
        self.pair.add_eos_ids(ids)

    def check_teacher_prompts(self, are_given: bool) -> None:
        """Refuse data with, or without, prompts for the teacher.

        Raises:
            ConfigError: The teacher cannot use them, or needs them.
        """
        self.pair.teacher.check_prompts(are_given)

    def check_lengths(self, num_tokens: int, teacher_tokens: int | None = None) -> None:
        """Refuse sequences that are longer than a model's maximum.

        Args:
            num_tokens: The longest that the student reads.
            teacher_tokens: The longest that the teacher reads; None for ``num_tokens``.

        Raises:
            ConfigError: A sequence is too long; the message names the model and both lengths.
        """
        self.pair.check_lengths(num_tokens, teacher_tokens or num_tokens)
        if self.engine is not None:
            self.engine.check_length(num_tokens)

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse, before training, sampling settings that the student's engine does not support.

        Raises:
            ConfigError: The engine does not support them; the message names what it does support.
        """
        if self.engine is not None:
            self.engine.check_sampling(sampling)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some ids, without special tokens."""
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )
