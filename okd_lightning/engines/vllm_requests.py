"""Requests to vLLM and checks of its responses, common to a server and vLLM in this process.

Owns the common engine. A ``Host`` owns the place where vLLM runs and the transfer of weights.

Sampling is the same as in the built-in engine: the model's defaults (``generation_config.json``)
are overridden one by one, only our end-of-sequence ids end a response, and ids without a token are
excluded. Log-probabilities are those of the sampling distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedModel

from okd_lightning.engines.engine_probe import EngineGaps, rescored_gap
from okd_lightning.engines.vllm_client import Completion
from okd_lightning.engines.weights import weights_label
from okd_lightning.errors import ConfigError, ServerError
from okd_lightning.models import Vocabulary
from okd_lightning.records.requests import Progress, Request, Response, Rollout
from okd_lightning.records.sampling import Sampling

_HOTTEST, _COLDEST = 2.0, 0.01
"""vLLM's temperature limits: it refuses values above the first, and raises lower values to the
second."""

_RULED_OUT = -100.0
"""vLLM's lowest logit bias: it multiplies a probability by less than 1e-43."""


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


def _check_completion(
    found: Completion, limit: int, vocabulary: Vocabulary, eos_ids: Sequence[int], where: str
) -> None:
    """Refuse a response that does not match its request.

    Args:
        found: The response.
        limit: Requested most tokens.
        vocabulary: Ids that can be sampled.
        eos_ids: Ids that end a response.
        where: The engine, for messages.

    Raises:
        ServerError: It does not match; the message names the problem.
    """
    invalid = set(vocabulary.invalid_ids)
    strange = [i for i in found.ids if not 0 <= i < vocabulary.size or i in invalid]
    problem = ""
    if len(found.ids) != len(found.logprobs):
        problem = f"{len(found.ids)} ids with {len(found.logprobs)} log-probabilities"
    elif not found.ids or len(found.ids) > limit:
        problem = f"{len(found.ids)} tokens where 1 to {limit} were requested"
    elif strange:
        problem = f"id {strange[0]}, which the student's tokenizer does not have"
    elif found.finish_reason not in ("stop", "length"):
        problem = f"finish_reason {found.finish_reason!r}"
    elif found.finish_reason == "length" and len(found.ids) < limit:
        problem = (
            f"a response that was cut at {len(found.ids)} of {limit} tokens (a --max-model-len "
            "that has no room for prompt and response)"
        )
    elif found.finish_reason == "stop" and found.ids[-1] not in eos_ids:
        problem = (
            f"a response that ends at id {found.ids[-1]}, which does not end a response in this run"
        )
    if problem:
        raise ServerError(
            f"{where} gives {problem}; check that it serves the student's model with the student's "
            "tokenizer, and that no default stop words or plugins change the sampled tokens"
        )


def _response_of(found: Completion, sampling: Sampling, eos_ids: Sequence[int]) -> Response:
    """Return a checked completion as a response; greedy ones get log-probability 0."""
    return Response(
        ids=found.ids,
        logprobs=(0.0,) * len(found.ids) if sampling.temperature == 0 else found.logprobs,
        stop_reason="eos" if found.ids[-1] in eos_ids else "length",
    )


_EMPTY = Response((), (), "length")
"""Response of a row whose limit is 0 tokens."""


class Host(Protocol):
    """A vLLM instance: on a server or in this process."""

    @property
    def is_server(self) -> bool:
        """True if it can generate while this process trains."""

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

    def complete(
        self, requests: Sequence[Mapping[str, Any]], progress: Progress | None
    ) -> list[Completion]:
        """Generate one response per request, in order; requests are vLLM's fields with a prompt."""


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

    def respond(self, request: Request) -> Rollout:
        """Generate one response per prompt, in the order of the prompts; see ``RolloutEngine``.

        Raises:
            ServerTimeoutError: vLLM has not answered in time.
            ServerError: vLLM cannot be reached or updated, or the answer is unexpected.
            ConfigError: A temperature that vLLM does not support.
        """
        responses = self.begin(request)()
        return replace(responses, engine_gap=self._rescored(request, responses))

    def begin(self, request: Request) -> Callable[[], Rollout]:
        """Give vLLM the student's present weights, and return the function that generates.

        The student may change before that function is called, and is not used by it: the gap to
        the student is not measured.

        Raises:
            OKDLightningError: As ``respond``; that function raises ``ServerError`` too.
        """
        check_vllm_sampling(request.sampling)
        limits = request.limits
        rows = [row for row, limit in enumerate(limits) if limit > 0]
        held = ExitStack()
        fields: list[dict[str, Any]] = []
        if rows:
            num_rows = self.model.config.get_text_config().vocab_size
            fields = self._fields(request, num_rows)
            held.enter_context(self.host.holding(self.model, weights_label(self.model), num_rows))

        def generate() -> Rollout:
            responses = [_EMPTY] * len(request.prompts)
            with held:
                asked = [fields[row] for row in rows]
                found = self.host.complete(asked, request.progress) if asked else []
            for row, completion in zip(rows, found, strict=True):
                _check_completion(
                    completion, limits[row], self.vocabulary, self.eos_ids, self.host.name
                )
                responses[row] = _response_of(completion, request.sampling, self.eos_ids)
            return Rollout(tuple(responses))

        return generate

    def _fields(self, request: Request, num_rows: int) -> list[dict[str, Any]]:
        """Return vLLM's fields of the request for each prompt."""
        common = _sampling_fields(request.sampling, self.vocabulary, num_rows, self.eos_ids)
        prompts = request.prompts
        seeds = request.noise.seeds([p.index for p in prompts], [p.sample for p in prompts])
        return [
            {**common, "prompt": list(prompt.ids), "max_tokens": limit, "seed": seed}
            for prompt, limit, seed in zip(prompts, request.limits, seeds, strict=True)
        ]

    def _rescored(self, request: Request, responses: Sequence[Response]) -> float | None:
        """Return the mean difference (nats) of the first responses' log-probs to the student's."""
        pairs = [
            (prompt, response)
            for prompt, response in zip(request.prompts, responses, strict=True)
            if response.ids
        ]
        gap = rescored_gap(self.model, self.vocabulary, request.sampling, pairs)
        if gap is not None:
            self.host.gaps.note_rescored(gap, self.host.name)
        return gap
