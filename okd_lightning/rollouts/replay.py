"""Replay of earlier responses: the last one to every prompt, kept in checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from okd_lightning.engines.engine import RolloutEngine
from okd_lightning.records.requests import Request, Response, Rollout
from okd_lightning.rollouts.stored import pack_rollout, unpack_rollout


class KeptResponses:
    """The last response of this process to every prompt, without tool use.

    A prompt that occurs several times in a request has as many responses.
    """

    def __init__(self) -> None:
        self._responses: dict[tuple[int, int], Response] = {}

    def __len__(self) -> int:
        return len(self._responses)

    def state_dict(self) -> dict[str, Any]:
        """Return a state that ``weights_only`` loading accepts."""
        if not self._responses:
            return {}
        responses = list(self._responses.values())
        return {
            "prompts": torch.tensor(list(self._responses)),
            "rollout": pack_rollout(responses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all kept responses by those of ``state_dict``."""
        self._responses = {}
        if state:
            keys = [(index, number) for index, number in state["prompts"].tolist()]
            self._responses = dict(zip(keys, unpack_rollout(state["rollout"]), strict=True))

    def respond(
        self, request: Request, generate: Callable[[Request], Rollout], *, replays: bool
    ) -> Rollout:
        """Return one response per prompt, in order; new responses are kept.

        Args:
            request: At least one prompt.
            generate: Generates responses to some of them.
            replays: Use kept responses where there are any, and generate the others.
        """
        times: Counter[int] = Counter()
        keys = []
        for prompt in request.prompts:
            keys.append((prompt.index, times[prompt.index]))
            times[prompt.index] += 1
        new = [i for i, key in enumerate(keys) if not (replays and key in self._responses)]
        if new:
            some = replace(request, prompts=tuple(request.prompts[i] for i in new))
            for i, response in zip(new, generate(some), strict=True):
                self._responses[keys[i]] = replace(response, tool_use=None)
        return Rollout(tuple(self._responses[key] for key in keys))


class ReplayEngine:
    """Engine that can replay the student's earlier responses.

    Args:
        engine: Generates new responses.
        kept: Responses that can be replayed.
        replays: Whether a request replays, from the run's seed; must not change after a resume.
    """

    def __init__(
        self, engine: RolloutEngine, kept: KeptResponses, replays: Callable[[int], bool]
    ) -> None:
        self._engine = engine
        self._kept = kept
        self._replays = replays

    def respond(self, request: Request) -> Rollout:
        """See ``RolloutEngine.respond``."""
        if request.generator != "student" or not request.prompts:
            return self._engine.respond(request)
        replays = self._replays(request.noise.seed)
        return self._kept.respond(request, self._engine.respond, replays=replays)
