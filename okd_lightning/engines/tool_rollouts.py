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

from okd_lightning.engines.engine import RolloutEngine
from okd_lightning.records.requests import Chat, Prompt, Request, Response, Rollout, ToolUse
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

    prompt: Prompt
    limit: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    use: ToolUse = field(default_factory=lambda: ToolUse(turns=0))
    stop_reason: str = ""
    merges_ends: bool = False

    @property
    def room(self) -> int:
        """Tokens that may still be added."""
        return self.limit - len(self.ids)

    @property
    def response(self) -> Response:
        """The finished response."""
        return Response(
            tuple(self.ids),
            tuple(self.logprobs),
            self.stop_reason,
            tuple(self.mask),
            self.use,
            self.merges_ends,
        )

    def append(self, ids: Sequence[int], logprobs: Sequence[float], *, is_own: bool) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.mask += [is_own] * len(ids)


@dataclass
class ToolEngine:
    """Any engine, with tools: generates turn by turn until a turn has no calls.

    A response ends with a turn without calls ("eos"), with a call in turn ``max_turns`` ("turns"),
    or at its length limit ("length"), for which all tokens after the prompt count. If no prompt has
    a chat, the wrapped engine generates alone.
    """

    engine: RolloutEngine
    rounds: ToolRounds

    def respond(self, request: Request) -> Rollout:
        """Generate one response per prompt, in the order of the prompts; see ``RolloutEngine``."""
        if not any(prompt.chat for prompt in request.prompts):
            return self.engine.respond(request)
        rows = [
            _Row(prompt, limit)
            for prompt, limit in zip(request.prompts, request.limits, strict=True)
        ]
        unfinished, num_row_steps = rows, 0
        gaps: list[float] = []
        while unfinished:
            turn = self._generate_turn(unfinished, request)
            num_row_steps += turn.num_row_steps
            gaps += [turn.engine_gap] if turn.engine_gap is not None else []
            self._answer([row for row in unfinished if not row.stop_reason])
            num_before = len(unfinished)
            unfinished = [row for row in unfinished if not row.stop_reason]
            if request.progress is not None:
                request.progress(num_before - len(unfinished), turn.num_tokens)
        return Rollout(
            responses=tuple(row.response for row in rows),
            num_row_steps=num_row_steps,
            engine_gap=max(gaps, default=None),
        )

    def _generate_turn(self, rows: list[_Row], request: Request) -> Rollout:
        """Generate one turn of every unfinished row in one call; return the engine's rollout."""
        prompts = tuple(
            replace(row.prompt, ids=(*row.prompt.ids, *row.ids), chat=None, limit=row.room)
            for row in rows
        )
        starts = {(row.prompt.index, row.prompt.sample): len(row.ids) for row in rows}
        turn = self.engine.respond(
            replace(
                request,
                prompts=prompts,
                noise=request.noise.starting_at(starts),
                max_new_tokens=max(row.room for row in rows),
                progress=None,
            )
        )
        for row, response in zip(rows, turn, strict=True):
            self._read_turn(row, response)
        return turn

    def _read_turn(self, row: _Row, turn: Response) -> None:
        """Append a turn; run its calls, or end the row."""
        room = row.room
        row.append(turn.ids[:room], turn.logprobs[:room], is_own=True)
        row.use = replace(row.use, turns=row.use.turns + 1)
        row.merges_ends = turn.merges_ends  # one engine generates all turns
        if turn.stop_reason != "eos" or len(turn.ids) > room:
            row.stop_reason = "length"
            return
        calls = parse_tool_calls(self.rounds.conversation.read(turn.ids[:-1]))
        if not calls or row.prompt.chat is None:
            row.stop_reason = "eos"
        elif row.use.turns == self.rounds.max_turns:
            row.stop_reason = "turns"
        else:
            row.exchanges.append(self._run(row, calls))

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
        chats = [(row.prompt.chat, row.exchanges) for row in rows if row.prompt.chat is not None]
        for row, ids in zip(rows, self.rounds.conversation.continuations(chats), strict=True):
            is_cut = len(ids) > row.room
            if len(ids) >= row.room:
                row.stop_reason = "length"
            ids = ids[: row.room]
            row.append(ids, (0.0,) * len(ids), is_own=False)
            row.use = replace(row.use, cuts=row.use.cuts + is_cut)
