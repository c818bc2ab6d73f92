"""Generation by one model of a run, or by both: every token is sampled from their mixture."""

from __future__ import annotations

from dataclasses import replace

from okd_lightning.engines import Blend, RolloutEngine, TransformersEngine
from okd_lightning.engines.tool_rollouts import ToolEngine
from okd_lightning.errors import ConfigError
from okd_lightning.records.requests import Request, Rollout
from okd_lightning.training.distilled_run import DistilledRun


def respond(module: DistilledRun, request: Request) -> Rollout:
    """Generate responses with the student or the teacher, in eval mode and without gradient.

    Where the data has tools, prompts that are chats may call them.
    """
    pair = module.pair
    with pair.writing(request.generator) as (model,):
        if request.generator == "student" and pair.engine is not None:
            engine = pair.engine.engine(model, pair.vocabulary, pair.eos_ids)
        else:
            engine = module.build_engine(model)
        if pair.tool_rounds is not None:
            engine = ToolEngine(engine, pair.tool_rounds)
        return engine.respond(request)


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
                f"the teacher's share in a draw must be between 0 and 1, got {share}; 0 and 1 are "
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
        if module.teacher is None:
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
                f"{type(module.pair.engine).__name__} writes with one model; responses from a "
                "mixture of teacher and student need the built-in engine: leave --model.engine out"
            )
        with module.pair.writing("student", "teacher") as (student, teacher):
            engine = module.build_engine(student)
            if not isinstance(engine, TransformersEngine):
                raise ConfigError(
                    f"{type(engine).__name__} writes with one model; responses from a mixture of "
                    "teacher and student need the built-in engine"
                )
            mixed = replace(engine, blend=Blend(teacher, self._share))
            return mixed.respond(request)
