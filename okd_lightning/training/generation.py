"""Generation by the models of a run: one of them, or their mixture for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import cast

import lightning
import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.engines import Blend, MixedDraws, RolloutEngine, TransformersEngine
from okd_lightning.engines.tool_rollouts import ToolEngine
from okd_lightning.errors import ConfigError
from okd_lightning.models.causal_lm import in_eval_mode, within_peft
from okd_lightning.records.requests import Generator, Request, Response, Rollout
from okd_lightning.teachers import GeneratingModels
from okd_lightning.training.distilled_run import DistilledRun
from okd_lightning.training.pair import Pair


@contextmanager
def writing(pair: Pair, *generators: Generator) -> Iterator[list[list[GeneratingModels]]]:
    """Prepare models for generation in the block: unsharded, in eval mode, no gradient.

    Args:
        pair: The student and its teacher.
        generators: Student, teacher or both.

    Yields:
        For each, the models of its parts (``Teacher.generators``), within their PEFT wrappers,
        adapters included. Of several parts the caller enters the contexts, one after the other:
        models in host memory are then on the device one at a time.
    """
    trainer = pair.trainer_of()
    precision = nullcontext if trainer is None else trainer.precision_plugin.forward_context
    found = [_models_of(pair, who) for who in generators]
    models = [model for parts in found for one in parts for model in one.models]
    with torch.no_grad(), precision(), pair.alone(*models), ExitStack() as stack:
        plain = [
            [replace(one, models=tuple(map(within_peft, one.models))) for one in parts]
            for parts in found
        ]
        for parts in plain:
            for context in (in_eval_mode(model) for one in parts for model in one.models):
                stack.enter_context(context)
            if len(parts) == 1:
                stack.enter_context(parts[0].context)
        yield plain


def _models_of(pair: Pair, who: Generator) -> Sequence[GeneratingModels]:
    if who != "student":
        return pair.teacher.generators()
    assert pair.student is not None
    return [GeneratingModels((pair.student,))]


def _engine(module: DistilledRun, own: GeneratingModels, who: Generator) -> RolloutEngine:
    pair = module.pair
    engine = student_engine(module, own) if who == "student" else _built_in(module, own, who)
    return engine if pair.tool_rounds is None else ToolEngine(engine, pair.tool_rounds)


def student_engine(module: DistilledRun, own: GeneratingModels) -> RolloutEngine:
    """Return the engine of the student's responses, without tools; call it within ``writing``."""
    pair = module.pair
    if pair.engine is None:
        return _built_in(module, own, "student")
    return pair.engine.engine(own.models[0], pair.vocabulary, pair.eos_ids)


def _built_in(module: DistilledRun, own: GeneratingModels, who: Generator) -> RolloutEngine:
    engine = module.build_engine(own.models[0])
    if isinstance(engine, TransformersEngine) and module.pair.images.student is not None:
        engine = replace(engine, images=module.pair.images.reader_of(who))
    if own.mix is None:
        return engine
    if not isinstance(engine, TransformersEngine):
        raise ConfigError(
            f"{type(engine).__name__} generates with one model, and the teacher has "
            f"{len(own.models)}: leave build_engine to the built-in engine"
        )
    return replace(engine, blend=MixedDraws(own.models[1:], own.mix))


class MixtureEngine:
    """Engine of student responses from α q + (1-α) p, token by token (arXiv 2306.08543, Eq. 4).

    The rollout's log-probs are the mixture's, so that an importance ratio corrects for it. Both
    models read the student's prompt. A method returns this engine from ``wrap_engine``.

    Args:
        module: Student and teacher.
        share: α, strictly between 0 and 1; q is the teacher's distribution.
        engine: Generates all other responses.

    Raises:
        ConfigError: ``share`` is outside (0, 1).
    """

    def __init__(self, module: DistilledRun, share: float, engine: RolloutEngine) -> None:
        if not 0 < share < 1:
            raise ConfigError(
                f"the teacher's share in the mixture must be between 0 and 1, got {share}; 0 and 1 "
                "are "
                "the student's and the teacher's own responses"
            )
        self._module = module
        self._share = share
        self._engine = engine

    def respond(self, request: Request) -> Rollout:
        """Generate responses; see ``RolloutEngine.respond``.

        Raises:
            ConfigError: There is no second model, tools are called between the turns, or the engine
                cannot mix.
        """
        if request.generator != "student":
            return self._engine.respond(request)
        module = self._module
        if not module.pair.teacher.models:
            raise ConfigError(
                "responses from a mixture of teacher and student need a second model in memory: "
                "give --model.teacher a folder or hub id"
            )
        if module.pair.tool_rounds is not None:
            raise ConfigError(
                "responses from a mixture of teacher and student cannot call tools: leave "
                "--data.tools out"
            )
        if module.pair.engine is not None:
            raise ConfigError(
                f"{type(module.pair.engine).__name__} generates with one model; responses from a "
                "mixture of teacher and student need the built-in engine: leave --model.engine out"
            )
        with writing(module.pair, "student", "teacher") as ((student,), teachers):
            if len(teachers) > 1:
                raise ConfigError(
                    "responses from a mixture of teacher and student need one teacher for all "
                    f"rows, and {type(module.pair.teacher).__name__} has {len(teachers)}: give "
                    "--model.teacher a folder, a hub id or TeacherEnsemble"
                )
            (teacher,) = teachers
            engine = module.build_engine(student.models[0])
            if not isinstance(engine, TransformersEngine):
                raise ConfigError(
                    f"{type(engine).__name__} generates with one model; responses from a mixture "
                    "of "
                    "teacher and student need the built-in engine"
                )
            own, mix = Blend(teacher.models[0], self._share), teacher.mix
            engine = replace(engine, images=module.pair.images.shared_reader(request.prompts))

            def mixing(logits: Sequence[Tensor]) -> Tensor:
                return own.mix(logits[0], logits[1] if mix is None else mix(logits[1:]))

            mixed = replace(engine, blend=MixedDraws(teacher.models, mixing))
            return mixed.respond(request)


class GeneratingModule(lightning.LightningModule):
    """A LightningModule that generates with the models of its pair.

    Attributes:
        pair: The student and its teacher.
    """

    pair: Pair

    def respond(self, request: Request) -> Rollout:
        """Generate responses with the student or the teacher, in eval mode and without gradient.

        Where the data has tools, prompts that are chats may call them.
        """
        who, teacher, run = request.generator, self.pair.teacher, cast(DistilledRun, self)
        # a server that generates ahead of training has one set of weights
        if who == "student" and self.pair.settle is not None:
            self.pair.settle()
        with writing(self.pair, who) as (parts,):
            if len(parts) == 1:
                return _engine(run, parts[0], who).respond(request)
            numbers = [teacher.generator_of(prompt) for prompt in request.prompts]
            written: dict[int, Response] = {}
            num_row_steps = 0
            for number, own in enumerate(parts):
                rows = [row for row, part in enumerate(numbers) if part == number]
                prompts = tuple(request.prompts[row] for row in rows)
                with own.context if rows else nullcontext():
                    rollout = _engine(run, own, who).respond(replace(request, prompts=prompts))
                written |= dict(zip(rows, rollout, strict=True))
                num_row_steps += rollout.num_row_steps
        return Rollout(tuple(written[row] for row in range(len(numbers))), num_row_steps)

    def _current_trainer(self) -> lightning.Trainer | None:
        return self._trainer

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """Build the built-in engine on ``model``; override to use another for both models."""
        return TransformersEngine(model, self.pair.vocabulary, self.pair.ends.stop_ids)

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Return the text of some ids, with or without special tokens."""
        kept = {"skip_special_tokens": not special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.pair.tokenizer.decode(list(ids), **kept))
