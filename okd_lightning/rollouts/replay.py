"""Replay of responses: the last one to every prompt, also kept in checkpoints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from okd_lightning.engines.engine import Author, Progress, Writer
from okd_lightning.records.batches import PromptBatch, Rollout
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.sampling import Sampling
from okd_lightning.rollouts.stored import pack_rollout, unpack_rollout

Row: TypeAlias = tuple[tuple[int, ...], tuple[float, ...], str, tuple[bool, ...]]
"""Ids, the sampler's log-probs, stop reason, and the mask of sampled ids."""


class KeptResponses:
    """The last response of this process to every prompt, without tool use.

    A prompt that occurs several times in a call has as many responses.
    """

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], Row] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def state_dict(self) -> dict[str, Any]:
        """Return a state that ``weights_only`` loading accepts."""
        if not self._rows:
            return {}
        rollout = _rollout_of(list(self._rows.values()))
        return {"prompts": torch.tensor(list(self._rows)), "rollout": pack_rollout(rollout)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all kept responses by those of ``state_dict``."""
        self._rows = {}
        if state:
            keys = [(index, number) for index, number in state["prompts"].tolist()]
            rows = _rows_of(unpack_rollout(state["rollout"]))
            self._rows = dict(zip(keys, rows, strict=True))

    def answer(
        self, prompts: PromptBatch, write: Callable[[PromptBatch], Rollout], *, replays: bool
    ) -> Rollout:
        """Return one response a prompt, in order; new responses are kept.

        Args:
            prompts: At least one.
            write: Generates responses to some of them.
            replays: Use kept responses where there are any, and generate the others.
        """
        times: Counter[int] = Counter()
        keys = []
        for index in prompts.index:
            keys.append((index, times[index]))
            times[index] += 1
        new = [i for i, key in enumerate(keys) if not (replays and key in self._rows)]
        if new:
            rows = _rows_of(write(_some(prompts, new)))
            self._rows.update(zip((keys[i] for i in new), rows, strict=True))
        return _rollout_of([self._rows[key] for key in keys])


class ReplayWriter:
    """A writer that can replay the student's responses.

    Args:
        writer: Generates new responses.
        kept: Responses that can be replayed.
        replays: Whether a call replays, from the run's seed; must not change after a resume.
    """

    def __init__(self, writer: Writer, kept: KeptResponses, replays: Callable[[int], bool]) -> None:
        self._writer = writer
        self._kept = kept
        self._replays = replays

    def write(
        self,
        author: Author,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """See ``Writer.write``."""

        def write(some: PromptBatch) -> Rollout:
            return self._writer.write(author, some, sampling, generator, max_new_tokens, progress)

        if author != "student" or not len(prompts):
            return write(prompts)
        return self._kept.answer(prompts, write, replays=self._replays(generator.seed))


def _some(prompts: PromptBatch, chosen: Sequence[int]) -> PromptBatch:
    columns = {
        name: tuple(column[i] for i in chosen) for name, column in vars(prompts).items() if column
    }
    return replace(prompts, **columns)


def _rows_of(rollout: Rollout) -> list[Row]:
    columns = (rollout.response_ids, rollout.logprobs, rollout.stop_reasons, rollout.own_masks)
    return list(zip(*columns, strict=True))


def _rollout_of(rows: list[Row]) -> Rollout:
    """Return at least one response as one rollout."""
    ids, logprobs, reasons, masks = zip(*rows, strict=True)
    return Rollout(ids, logprobs, reasons, masks)
