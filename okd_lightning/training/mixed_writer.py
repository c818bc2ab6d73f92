"""Generation by student and teacher together: every token is sampled from a mixture of both."""

from __future__ import annotations

from dataclasses import replace

from okd_lightning.engines import Blend, NoiseStream, Sampling, TransformersEngine, Writer
from okd_lightning.engines.engine import Author, Progress
from okd_lightning.errors import ConfigError
from okd_lightning.records.batches import PromptBatch, Rollout
from okd_lightning.training.paired_module import PairedModule


class MixedWriter:
    """Generator of student responses from α q + (1-α) p, token by token (arXiv 2306.08543, Eq. 4).

    The rollout's log-probs are the mixture's, so that an importance ratio corrects for it. Both
    models read the student's prompt. A method returns this writer from ``wrap_writer``.

    Args:
        module: Student and teacher.
        share: α, strictly between 0 and 1; q is the teacher's distribution.
        writer: Generates all other responses.

    Raises:
        ConfigError: ``share`` is outside (0, 1).
    """

    def __init__(self, module: PairedModule, share: float, writer: Writer) -> None:
        if not 0 < share < 1:
            raise ConfigError(
                f"the teacher's share in a draw must be between 0 and 1, got {share}; 0 and 1 are "
                "the student's and the teacher's own responses"
            )
        self._module = module
        self._share = share
        self._writer = writer

    def write(
        self,
        author: Author,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """Generate responses; see ``Writer.write``.

        Raises:
            ConfigError: There is no second model, tools are called between the turns, or the engine
                cannot mix.
        """
        call = (prompts, sampling, generator, max_new_tokens, progress)
        if author != "student":
            return self._writer.write(author, *call)
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
        with module.pair.writing("student", "teacher") as (student, teacher):
            engine = module.build_engine(student)
            if not isinstance(engine, TransformersEngine):
                raise ConfigError(
                    f"{type(engine).__name__} writes with one model; responses from a mixture of "
                    "teacher and student need the built-in engine"
                )
            mixed = replace(engine, blend=Blend(teacher, self._share))
            return mixed.generate(*call)
