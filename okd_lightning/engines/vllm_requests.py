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
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from okd_lightning.engines.engine import Progress
from okd_lightning.engines.engine_probe import EngineGaps, rescored_gap
from okd_lightning.engines.noise import NoiseStream
from okd_lightning.engines.sampling import Sampling
from okd_lightning.engines.weights import weights_label
from okd_lightning.errors import ConfigError, ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records.batches import PromptBatch, Rollout

_HOTTEST, _COLDEST = 2.0, 0.01
"""vLLM refuses temperatures above the first and raises those below the second to it."""

_RULED_OUT = -100.0
"""vLLM's lowest bias: what it leaves of a probability is below 1e-43 of its logit's."""


@dataclass(frozen=True)
class Written:
    """One response: ids, their log-probs (nats), and vLLM's reason to stop."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


def check_vllm_sampling(sampling: Sampling) -> None:
    """Refuse temperatures that vLLM does not sample at.

    Raises:
        ConfigError: Naming the range.
    """
    temperature = sampling.temperature
    if temperature and not _COLDEST <= temperature <= _HOTTEST:
        raise ConfigError(
            f"sampling.temperature {temperature:g}: vLLM samples at 0 (greedy) or at temperatures "
            f"from {_COLDEST:g} to {_HOTTEST:g}; choose one of these, or leave --model.engine out"
        )


def check_vllm_length(num_tokens: int, limit: int | None, where: str) -> None:
    """Refuse sequences for which vLLM has no room: it would cut their responses.

    Args:
        num_tokens: The longest prompt with response.
        limit: vLLM's max_model_len; None where it is not known.
        where: The engine, for messages.

    Raises:
        ConfigError: Naming both lengths.
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

    @property
    def gaps(self) -> EngineGaps:
        """How far its log-probabilities are from the student's."""

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
            ConfigError: A temperature that vLLM does not sample at.
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
        """Mean difference (nats) of the first responses' log-probs to the student's own."""
        pairs = zip(prompts.input_ids, written, strict=True)
        rows = [(prompt, row.ids, row.logprobs) for prompt, row in pairs if row.ids]
        gap = rescored_gap(self.model, self.vocabulary, sampling, rows)
        if gap is not None:
            self.host.gaps.note_rescored(gap, self.host.name)
        return gap
