"""Requests to vLLM and checks of its responses, common to a server and vLLM in this process.

Owns the common engine. A ``Host`` owns the place where vLLM runs and the transfer of weights.

Sampling is the same as in the built-in engine: the model's defaults (``generation_config.json``)
are overridden one by one, only our end-of-sequence ids end a response, and ids without a token are
excluded. Log-probabilities are those of the sampling distribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from okd_lightning.engines.engine import Progress
from okd_lightning.engines.engine_probe import EngineGaps, rescored_gap
from okd_lightning.engines.weights import weights_label
from okd_lightning.errors import ConfigError, ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records.batches import PromptBatch, Rollout
from okd_lightning.records.noise import NoiseStream
from okd_lightning.records.sampling import Sampling

_HOTTEST, _COLDEST = 2.0, 0.01
"""vLLM's temperature limits: it refuses values above the first, and raises lower values to the
second."""

_RULED_OUT = -100.0
"""vLLM's lowest logit bias: it multiplies a probability by less than 1e-43."""


@dataclass(frozen=True)
class Written:
    """One response: ids, their log-probs (nats), and vLLM's reason to stop."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def check_vllm_sampling(sampling: Sampling) -> None:
    """Refuse temperatures that vLLM does not support.

    Raises:
        ConfigError: Not supported; the message names the range.
    """
    temperature = sampling.temperature
    if temperature and not _COLDEST <= temperature <= _HOTTEST:
        raise ConfigError(
            f"sampling.temperature {temperature:g}: vLLM samples at 0 (greedy) or at temperatures "
            f"from {_COLDEST:g} to {_HOTTEST:g}; choose one of these, or leave --model.engine out"
        )


def check_vllm_length(num_tokens: int, limit: int | None, where: str) -> None:
    """Refuse sequences that are too long for vLLM, which would cut their responses.

    Args:
        num_tokens: Tokens of the longest prompt with response.
        limit: vLLM's max_model_len; None if unknown.
        where: The engine, for messages.

    Raises:
        ConfigError: Too long; the message names both lengths.
    """
    if limit is not None and num_tokens > limit:
        raise ConfigError(
            f"{where} takes {limit} tokens of prompt and response together (max_model_len), and "
            f"this run has up to {num_tokens}: start it with --max-model-len {num_tokens} or more, "
            "or lower --data.max_prompt_length or --data.max_response_length"
        )


def _sampling_fields(
    sampling: Sampling, vocabulary: Vocabulary, num_rows: int, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """Return the fields that all requests of a call share.

    Args:
        sampling: Temperature, top-k and top-p.
        vocabulary: Ids that can be sampled.
        num_rows: Number of ids in the served model's logits.
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
        "ignore_eos": True,  # the model's own; stop_token_ids has ours
        "stop_token_ids": list(eos_ids),
        "skip_special_tokens": False,
    }
    if invalid:
        fields["logit_bias"] = dict.fromkeys(invalid, _RULED_OUT)
    return fields


def _check_written(
    written: Written, limit: int, vocabulary: Vocabulary, eos_ids: Sequence[int], where: str
) -> None:
    """Refuse a response that does not match its request.

    Args:
        written: The response.
        limit: Requested most tokens.
        vocabulary: Ids that can be sampled.
        eos_ids: Ids that end a response.
        where: The engine, for messages.

    Raises:
        ServerError: It does not match; the message names the problem.
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
    elif written.finish_reason == "length" and len(written.ids) < limit:
        problem = (
            f"a response that was cut at {len(written.ids)} of {limit} tokens (a --max-model-len "
            "that has no room for prompt and response)"
        )
    elif written.finish_reason == "stop" and written.ids[-1] not in eos_ids:
        problem = f"a response that ends at id {written.ids[-1]}, which ends none of this run's"
    if problem:
        raise ServerError(
            f"{where} gives {problem}; check that it serves the student's model with the student's "
            "tokenizer, and that no default stop words or plugins change what is drawn"
        )


def _rollout_of(rows: Sequence[Written], sampling: Sampling, eos_ids: Sequence[int]) -> Rollout:
    """Return checked responses as a rollout; greedy ones get log-probability 0."""
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
"""Response of a row whose limit is 0 tokens."""


class Host(Protocol):
    """A vLLM instance: on a server or in this process."""

    @property
    def name(self) -> str:
        """Location of the instance, for messages."""

    @property
    def gaps(self) -> EngineGaps:
        """Differences between its log-probabilities and the student's."""

    def holding(
        self, model: PreTrainedModel, label: str, num_rows: int
    ) -> AbstractContextManager[None]:
        """Within the context, vLLM samples from ``model``'s present weights, or an error is raised.

        Args:
            model: The student.
            label: Label of its weights.
            num_rows: Number of ids in its logits.
        """

    def write(
        self, requests: Sequence[Mapping[str, Any]], progress: Progress | None
    ) -> list[Written]:
        """Generate one response a request, in order; requests are vLLM's fields with a prompt."""


@dataclass
class HostedEngine:
    """Engine for one student on a host.

    Attributes:
        host: The vLLM instance.
        model: The student, in eval mode.
        vocabulary: Ids outside it are never sampled.
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
        """Generate one response a prompt, in the order of the prompts; see ``RolloutEngine``.

        Raises:
            ServerTimeoutError: vLLM has not answered in time.
            ServerError: vLLM cannot be reached or updated, or the answer is unexpected.
            ConfigError: A temperature that vLLM does not support.
        """
        check_vllm_sampling(sampling)
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
        gap = self._rescored(prompts, written, sampling)
        return replace(_rollout_of(written, sampling, self.eos_ids), engine_gap=gap)

    def _rescored(
        self, prompts: PromptBatch, written: Sequence[Written], sampling: Sampling
    ) -> float | None:
        """Return the mean difference (nats) of the first responses' log-probs to the student's."""
        pairs = zip(prompts.input_ids, written, strict=True)
        rows = [(prompt, row.ids, row.logprobs) for prompt, row in pairs if row.ids]
        gap = rescored_gap(self.model, self.vocabulary, sampling, rows)
        if gap is not None:
            self.host.gaps.note_rescored(gap, self.host.name)
        return gap
