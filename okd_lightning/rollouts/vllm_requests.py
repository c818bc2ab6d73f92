"""What a request to vLLM says, and what an answer has to be: the same for a server and in process.

Sampling means here what it means in the built-in engine: the model's own defaults (its
``generation_config.json``) are overruled one by one, our end-of-sequence ids alone end a response,
and ids that no token has are ruled out. Log-probabilities are those of the distribution drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from okd_lightning.errors import ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records import Rollout
from okd_lightning.rollouts.sampling import Sampling

_RULED_OUT = -100.0
"""vLLM's lowest bias: what it leaves of a probability is below 1e-43 of its logit's."""


@dataclass(frozen=True)
class Written:
    """One response: ids, their log-probs (nats), and vLLM's reason to stop."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def sampling_fields(
    sampling: Sampling, vocabulary: Vocabulary, num_rows: int, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """What all requests of a call share.

    Args:
        sampling: How tokens are drawn.
        vocabulary: What can be drawn.
        num_rows: Ids that the served model gives logits for.
        eos_ids: Ids that end a response.
    """
    invalid = [*vocabulary.invalid_ids, *range(vocabulary.size, num_rows)]
    fields: dict[str, Any] = {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,
        "ignore_eos": True,  # the model's own; ours are below
        "stop_token_ids": list(eos_ids),
        "skip_special_tokens": False,
    }
    if invalid:
        fields["logit_bias"] = {str(i): _RULED_OUT for i in invalid}
    return fields


def check_written(
    written: Written, limit: int, vocabulary: Vocabulary, eos_ids: Sequence[int], where: str
) -> None:
    """Refuse an answer that is not a response as it was asked for.

    Args:
        written: The answer.
        limit: Tokens that were asked for at most.
        vocabulary: What can be drawn.
        eos_ids: Ids that end a response.
        where: The engine, for messages.

    Raises:
        ServerError: Naming what is wrong.
    """
    invalid = set(vocabulary.invalid_ids)
    strange = [i for i in written.ids if not 0 <= i < vocabulary.size or i in invalid]
    problem = ""
    if len(written.ids) != len(written.logprobs):
        problem = f"{len(written.ids)} ids with {len(written.logprobs)} log-probabilities"
    elif not written.ids or len(written.ids) > limit:
        problem = f"{len(written.ids)} tokens where 1 to {limit} were asked for"
    elif strange:
        problem = f"id {strange[0]}, which the student's tokenizer does not have"
    elif written.finish_reason not in ("stop", "length"):
        problem = f"finish_reason {written.finish_reason!r}"
    elif written.finish_reason == "stop" and written.ids[-1] not in eos_ids:
        problem = f"a response that ends at id {written.ids[-1]}, which ends none of this run's"
    if problem:
        raise ServerError(
            f"{where} gives {problem}; check that it serves the student's model with the student's "
            "tokenizer, and that no default stop words or plugins change what is drawn"
        )


def rollout_of(rows: Sequence[Written], sampling: Sampling, eos_ids: Sequence[int]) -> Rollout:
    """Checked responses as a rollout; greedy ones have the log-probability 0 of a certain draw."""
    return Rollout(
        response_ids=tuple(row.ids for row in rows),
        logprobs=tuple(
            (0.0,) * len(row.ids) if sampling.temperature == 0 else row.logprobs for row in rows
        ),
        stop_reasons=tuple(
            "eos" if row.ids and row.ids[-1] in eos_ids else "length" for row in rows
        ),
    )


NOTHING = Written((), (), "length")
"""A row that has no room for a token."""
