"""Generation by student and teacher together: every token is sampled from a mixture of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from okd_lightning.engines import Blend, MixedDraws, RolloutEngine, TransformersEngine
from okd_lightning.errors import ConfigError
from okd_lightning.records.requests import Request, Rollout
from okd_lightning.training.paired_module import PairedModule


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

    def __init__(self, module: PairedModule, share: float, engine: RolloutEngine) -> None:
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
        if module.tool_rounds is not None:
            raise ConfigError(
                "responses from a mixture of teacher and student cannot call tools: leave "
                "--data.tools out"
            )
        if module.engine is not None:
            raise ConfigError(
                f"{type(module.engine).__name__} writes with one model; responses from a mixture "
                "of teacher and student need the built-in engine: leave --model.engine out"
            )
        with module.pair.writing("student", "teacher") as ((student,), teachers):
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
                    f"{type(engine).__name__} writes with one model; responses from a mixture of "
                    "teacher and student need the built-in engine"
                )
            own, mix = Blend(teacher.models[0], self._share), teacher.mix

            def mixing(logits: Sequence[Tensor]) -> Tensor:
                return own.mix(logits[0], logits[1] if mix is None else mix(logits[1:]))

            mixed = replace(engine, blend=MixedDraws(teacher.models, mixing))
            return mixed.respond(request)
