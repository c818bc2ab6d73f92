"""Advantages of whole responses: rewards, computed once for each rollout batch.

Owns the texts that scorers read, and the groups: all samples of one prompt, on any rank. Tool
results are not in these texts, because the model did not generate them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from okd_lightning.errors import RewardError
from okd_lightning.losses import RowScorer, Term
from okd_lightning.records.batches import Example
from okd_lightning.records.requests import Chat, Response


@dataclass(frozen=True)
class SampledResponse:
    """One response of the student that trains.

    Attributes:
        example: The example of its prompt.
        sample: Its sample number.
        response: The response.
        step: The optimizer step in which it is trained on.
    """

    example: Example
    sample: int
    response: Response
    step: int


class RolloutScorer(Protocol):
    """Computes the advantages of a rollout batch for a RolloutLoader."""

    def __call__(self, responses: Sequence[SampledResponse]) -> RolloutScores:
        """Score responses; called on every rank for every rollout batch, also without responses."""


@dataclass(frozen=True)
class RolloutScores:
    """Scores of this rank's responses of a rollout batch.

    Attributes:
        credits: One advantage per response, by the term's name.
        metrics: Means over all ranks, to be logged.
    """

    credits: dict[str, list[float]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class TermScorer:
    """Scores responses by a run's terms with scorers, each in the steps in which it acts.

    Attributes:
        terms: The terms that have a scorer; at least one.
        decode: Ids to text.
        samples_per_prompt: Responses of a group: one occurrence of a prompt.
        gather: Collects one object of every rank, on every rank.
        rank: This rank.
    """

    terms: Sequence[Term]
    decode: Callable[[Sequence[int]], str]
    samples_per_prompt: int
    gather: Callable[[Any], list[Any]]
    rank: int

    def __call__(self, responses: Sequence[SampledResponse]) -> RolloutScores:
        """Score this rank's responses; baselines use all ranks' responses.

        Raises:
            RewardError: A scorer raised it on some rank; raised on all ranks.
        """
        turns = [[self.decode(ids) for ids in row.response.turns] for row in responses]
        groups = [(row.example.index, row.sample // self.samples_per_prompt) for row in responses]
        credits, metrics = {}, {}
        for term in self.terms:
            scorer = term.scorer
            assert scorer is not None
            rows = [i for i, row in enumerate(responses) if term.acts_in(row.step)]
            read = [turns[row][-1:] if scorer.reads_last_turn else turns[row] for row in rows]
            own, problem = _scores(
                scorer,
                [responses[row].example.prompt for row in rows],
                ["\n".join(texts) for texts in read],
                [responses[row].example.response for row in rows],
                [responses[row].example.chat for row in rows],
            )
            keys = [groups[row] for row in rows]
            everyone = self.gather((own, keys, scorer.new_scores(), problem))
            for *_, found in everyone:  # all ranks stop together
                if found is not None:
                    raise RewardError(found)
            for _, _, new, _ in everyone:
                scorer.remember(new)
            scores = [score for part, *_ in everyone for score in part]
            credit = scorer.credit_rows(scores, [key for _, part, *_ in everyone for key in part])
            first = sum(len(part) for part, *_ in everyone[: self.rank])
            given = dict(zip(rows, credit[first : first + len(own)], strict=True))
            credits[term.name] = [given.get(row, 0.0) for row in range(len(responses))]
            metrics.update(_summary(term.name, scores))
        return RolloutScores(credits, metrics)


def _scores(
    scorer: RowScorer,
    prompts: list[str],
    responses: list[str],
    references: list[str],
    chats: list[Chat | None],
) -> tuple[list[float], str | None]:
    """Return the scores of this rank's responses, or none and the error message."""
    if not responses:
        return [], None
    try:
        return scorer.score(prompts, responses, references, chats), None
    except RewardError as error:
        return [], str(error)


def _summary(name: str, scores: Sequence[float]) -> dict[str, float]:
    found = [score for score in scores if not math.isnan(score)]
    if not scores:
        return {}
    metrics = {f"rollout/{name}_failures": float(len(scores) - len(found))}
    if found:
        metrics[f"rollout/{name}"] = sum(found) / len(found)
    return metrics
