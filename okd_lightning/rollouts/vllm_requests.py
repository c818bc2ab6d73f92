"""What vLLM is asked and what an answer has to be: the same for a server and in this process.

Owns the engine that is common to both; where vLLM runs and how it comes by the student's weights is
a ``Host``'s business.

Sampling means here what it means in the built-in engine: the model's own defaults (its
``generation_config.json``) are overruled one by one, our end-of-sequence ids alone end a response,
and ids that no token has are ruled out. Log-probabilities are those of the distribution drawn from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.errors import ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records import PromptBatch, Rollout
from okd_lightning.rollouts.engine import Progress
from okd_lightning.rollouts.noise import NoiseStream, hashed_uniform
from okd_lightning.rollouts.sampling import Sampling
from okd_lightning.rollouts.weights import weights_label

_PROBE_LENGTH = 12
_PROBE = 0x50524F42  # domain separation
_CERTAIN = 1e-3

_RULED_OUT = -100.0
"""vLLM's lowest bias: what it leaves of a probability is below 1e-43 of its logit's."""


@dataclass(frozen=True)
class Written:
    """One response: ids, their log-probs (nats), and vLLM's reason to stop."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def _sampling_fields(
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
        fields["logit_bias"] = dict.fromkeys(invalid, _RULED_OUT)
    return fields


def _check_written(
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


def _rollout_of(rows: Sequence[Written], sampling: Sampling, eos_ids: Sequence[int]) -> Rollout:
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


_NOTHING = Written((), (), "length")
"""A row that has no room for a token."""


class Host(Protocol):
    """A vLLM somewhere."""

    @property
    def name(self) -> str:
        """Where it is, for messages."""

    def holding(
        self, model: PreTrainedModel, label: str, num_rows: int
    ) -> AbstractContextManager[None]:
        """Within it vLLM samples from ``model`` as it is now; what else it had done is an error.

        Args:
            model: The student.
            label: What its weights are called.
            num_rows: Ids that it gives logits for.
        """

    def write(
        self, requests: Sequence[Mapping[str, Any]], progress: Progress | None
    ) -> list[Written]:
        """One response a request, in order; a request has vLLM's sampling fields and a prompt."""


@dataclass
class HostedEngine:
    """One student on a host.

    Attributes:
        host: Where vLLM is.
        model: The student, in eval mode.
        vocabulary: Ids outside it are never drawn.
        eos_ids: Ids that end a response.
    """

    host: Host
    model: PreTrainedModel
    vocabulary: Vocabulary
    eos_ids: tuple[int, ...]

    def generate(
        self,
        prompts: PromptBatch,
        sampling: Sampling,
        generator: NoiseStream,
        max_new_tokens: int,
        progress: Progress | None = None,
    ) -> Rollout:
        """One response a prompt, in the order of the prompts; see ``RolloutEngine``.

        Raises:
            ServerTimeoutError: vLLM has not answered in time.
            ServerError: It cannot be reached or updated, or answers with something else.
        """
        longest = prompts.limits or (max_new_tokens,) * len(prompts)
        limits = [min(limit, max_new_tokens) for limit in longest]
        written = [_NOTHING] * len(prompts)
        rows = [row for row, limit in enumerate(limits) if limit > 0]
        if rows:
            num_rows = self.model.config.get_text_config().vocab_size
            fields = _sampling_fields(sampling, self.vocabulary, num_rows, self.eos_ids)
            seeds = generator.seeds(prompts.index, prompts.sample)
            requests = [
                {
                    **fields,
                    "prompt": list(prompts.input_ids[row]),
                    "max_tokens": limits[row],
                    "seed": seeds[row],
                }
                for row in rows
            ]
            with self.host.holding(self.model, weights_label(self.model), num_rows):
                found = self.host.write(requests, progress)
            for row, response in zip(rows, found, strict=True):
                _check_written(response, limits[row], self.vocabulary, self.eos_ids, self.host.name)
                written[row] = response
        return _rollout_of(written, sampling, self.eos_ids)


@dataclass(frozen=True)
class Probe:
    """Some ids, and what the student says about them: held against what vLLM says.

    Attributes:
        ids: Any, also such that no token has.
        logprobs: [place, ids that there are] nats, of the token behind each place.
        tolerance: Mean difference (nats) that number formats may make.
    """

    ids: tuple[int, ...]
    logprobs: Tensor
    tolerance: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, num_rows: int, tolerance: float) -> Probe:
        """What ``model`` says, in its own number format.

        Args:
            model: In eval mode.
            num_rows: Ids that it gives logits for.
            tolerance: See the attribute.
        """
        drawn = hashed_uniform(_PROBE, num_rows, torch.arange(_PROBE_LENGTH).numpy())
        ids = tuple(int(value) for value in drawn * num_rows)
        logits = model(torch.tensor([ids], device=model.device)).logits[0, :, :num_rows]
        return cls(ids, logits.float().log_softmax(-1).cpu(), tolerance)

    @property
    def requests(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """One that has the probe scored, and one that draws a token that is certain."""
        least_certain = int(self.logprobs[:-1].amax(-1).argmin())
        fields = {"max_tokens": 1, "temperature": 1.0, "ignore_eos": True}
        scored = {**fields, "prompt": list(self.ids), "prompt_logprobs": 1}
        drawn = {**fields, "prompt": list(self.ids[: least_certain + 1]), "top_k": 1, "logprobs": 0}
        return scored, drawn

    def check(self, said: Sequence[float], drawn: float, where: str) -> None:
        """Refuse another model, old weights, and log-probs of another distribution.

        Args:
            said: What vLLM gave to each id of the probe but the first (nats).
            drawn: The log-probability that it reports of the token that is certain.
            where: The host, for messages.

        Raises:
            ServerError: Naming what to change.
        """
        own = [float(self.logprobs[place, token]) for place, token in enumerate(self.ids[1:])]
        mean = sum(abs(a - b) for a, b in zip(said, own, strict=True)) / len(own)
        if not mean <= self.tolerance:
            raise ServerError(
                f"{where} was given the student's weights and yet differs from the student by "
                f"{mean:.3g} nats a token on a probe (tolerance {self.tolerance:g}): it runs "
                "another architecture, a quantised one, or has not loaded them; check its model "
                "and dtype, or raise --model.engine.tolerance"
            )
        if not abs(drawn) <= _CERTAIN:
            raise ServerError(
                f"{where} reports {drawn:.3g} as the log-probability of a token that was drawn "
                "with top_k 1, which is certain: these are from before temperature and cuts; start "
                "it with --logprobs-mode processed_logprobs"
            )
