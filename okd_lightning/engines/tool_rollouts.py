"""Rollouts of several turns: the model calls tools, reads their results, and continues.

Owns the turns and the mask of sampled tokens. The wrapped engine generates; a ``Conversation``
formats tool results. Unfinished rows are one batch in every round. The noise of a position does not
depend on its turn, so that a row does not depend on the others' turns. Prompt and response so far
are read again in every round: engines keep no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from okd_lightning.engines.engine import Progress, RolloutEngine
from okd_lightning.records.batches import Chat, PromptBatch, Rollout, ToolUse
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.sampling import Sampling
from okd_lightning.tools import Toolbox
from okd_lightning.tools.tool_calls import ToolCall, parse_tool_calls


@dataclass(frozen=True)
class Exchange:
    """The calls of one turn and their results."""

    calls: tuple[ToolCall, ...]
    results: tuple[str, ...]


class Conversation(Protocol):
    """Formatting of turns as text and ids: a tokenizer and its chat template."""

    def read(self, ids: Sequence[int]) -> str:
        """Return the text of a generated turn, without the token that ended it."""

    def continuations(
        self, chats: Sequence[tuple[Chat, Sequence[Exchange]]]
    ) -> list[tuple[int, ...]]:
        """Return the ids between the end of each chat's last turn and the start of its next one.

        Args:
            chats: Chats with their exchanges so far; the last exchange is to be formatted.
        """


@dataclass(frozen=True)
class ToolRounds:
    """Tool settings of a run's rollouts.

    Attributes:
        toolbox: The tools.
        conversation: Formats their results in the chat.
        max_turns: Most turns of a response; calls in the last turn are not executed.
    """

    toolbox: Toolbox
    conversation: Conversation
    max_turns: int


@dataclass
class _Row:
    """One response during generation; its lists have equal lengths."""

    prompt: tuple[int, ...]
    chat: Chat | None
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    use: ToolUse = field(default_factory=lambda: ToolUse(turns=0))
    stop_reason: str = ""

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.limit - len(self.ids)

    def append(self, ids: Sequence[int], logprobs: Sequence[float], *, is_own: bool) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.own += [is_own] * len(ids)


@dataclass
class ToolEngine:
    """Any engine, with tools: generates turn by turn until a turn has no calls.

    A response ends with a turn without calls ("eos"), with a call in turn ``max_turns`` ("turns"),
    or at its length limit ("length"), for which all tokens after the prompt count. If no prompt has
    a chat, the wrapped engine generates alone.
    """

    engine: RolloutEngine
    rounds: ToolRounds

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """Generate one response a prompt, in the order of the prompts; see ``RolloutEngine``."""
        if not any(prompts.chats):
            return self.engine.generate(prompts, sampling, generator, max_new_tokens, progress)
        limits = prompts.limits or (max_new_tokens,) * len(prompts)
        rows = [
            _Row(ids, chat, min(limit, max_new_tokens))
            for ids, chat, limit in zip(prompts.input_ids, prompts.chats, limits, strict=True)
        ]
        writing, num_row_steps = list(range(len(rows))), 0
        gaps: list[float] = []
        while writing:
            num_before = sum(sum(row.own) for row in rows)
            turn = self._write_turn(rows, writing, prompts, sampling, generator)
            num_row_steps += turn.num_row_steps
            gaps += [turn.engine_gap] if turn.engine_gap is not None else []
            num_tokens = sum(sum(row.own) for row in rows) - num_before
            self._answer([rows[i] for i in writing if not rows[i].stop_reason])
            still = [i for i in writing if not rows[i].stop_reason]
            if progress is not None:
                progress(len(writing) - len(still), num_tokens)
            writing = still
        return Rollout(
            response_ids=tuple(tuple(row.ids) for row in rows),
            logprobs=tuple(tuple(row.logprobs) for row in rows),
            stop_reasons=tuple(row.stop_reason for row in rows),
            masks=tuple(tuple(row.own) for row in rows),
            tool_use=tuple(row.use for row in rows),
            num_row_steps=num_row_steps,
            engine_gap=max(gaps, default=None),
        )

    def _write_turn(
        self,
        rows: list[_Row],
        writing: list[int],
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
    ) -> Rollout:
        """Generate one turn of every unfinished row in one call; return the engine's rollout."""
        keys = [(prompts.index[i], prompts.sample[i]) for i in writing]
        batch = PromptBatch(
            input_ids=tuple((*rows[i].prompt, *rows[i].ids) for i in writing),
            index=tuple(index for index, _ in keys),
            sample=tuple(sample for _, sample in keys),
            limits=tuple(rows[i].room for i in writing),
        )
        starts = {key: len(rows[i].ids) for key, i in zip(keys, writing, strict=True)}
        noise = generator.starting_at(starts)
        written = self.engine.generate(batch, sampling, noise, max(batch.limits))
        columns = (written.response_ids, written.logprobs, written.stop_reasons)
        for i, ids, logprobs, reason in zip(writing, *columns, strict=True):
            row, room = rows[i], rows[i].room
            row.append(ids[:room], logprobs[:room], is_own=True)
            row.use = replace(row.use, turns=row.use.turns + 1)
            if reason != "eos" or len(ids) > room:
                row.stop_reason = "length"
                continue
            calls = parse_tool_calls(self.rounds.conversation.read(ids[:-1]))
            if not calls or row.chat is None:
                row.stop_reason = "eos"
            elif row.use.turns == self.rounds.max_turns:
                row.stop_reason = "turns"
            else:
                row.exchanges.append(self._run(row, calls))
        return written

    def _run(self, row: _Row, calls: tuple[ToolCall, ...]) -> Exchange:
        results = [self.rounds.toolbox.run(call) for call in calls]
        row.use = replace(
            row.use,
            calls=row.use.calls + len(calls),
            errors=row.use.errors + sum(result.is_error for result in results),
        )
        return Exchange(calls, tuple(result.text for result in results))

    def _answer(self, rows: list[_Row]) -> None:
        """Append tool results after their calls; a row without room for a next turn ends here."""
        chats = [(row.chat, row.exchanges) for row in rows if row.chat is not None]
        for row, ids in zip(rows, self.rounds.conversation.continuations(chats), strict=True):
            is_cut = len(ids) > row.room
            if len(ids) >= row.room:
                row.stop_reason = "length"
            ids = ids[: row.room]
            row.append(ids, (0.0,) * len(ids), is_own=False)
            row.use = replace(row.use, cuts=row.use.cuts + is_cut)
