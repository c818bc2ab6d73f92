"""A teacher on a server: its most likely ids for every loss token, requested for each batch.

The server is an OpenAI-compatible vLLM, which scores prompts (``prompt_logprobs``). Prompt and
response of a row are one prompt of a request. The log-probabilities of the loss tokens become the
packed rows of ``losses.outcomes``, like those of the cache. Unlike a cache, it scores on-policy
responses too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, final

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.endpoint import Endpoint, ServerStatusError, in_parallel
from okd_lightning.engines.vllm_client import VLLMClient
from okd_lightning.errors import ConfigError, ServerError, VocabularyError, one_line
from okd_lightning.losses import (
    CachedDrawnOutcome,
    PackedHead,
    Quantity,
    Side,
    Term,
    pack_outcomes,
)
from okd_lightning.models import Vocabulary, probe_texts
from okd_lightning.records.batches import DistillBatch
from okd_lightning.records.sequences import Sequences
from okd_lightning.teachers.packed import PackedTeacher
from okd_lightning.teachers.run import Opening, TeacherOptions, TeacherRun
from okd_lightning.teachers.terms import check_known, check_served_text_term

_SPARE = 8
"""Ids that are requested beyond k, to replace ids without a token."""

_NEGLIGIBLE = 1e-3
"""Largest probability of ids without a token."""

_SHARE_OF_UNIFORM = 0.5
"""Allowed share of the k ids' least possible probability: the server's table may have padding."""

_TOKEN = "OKD_TEACHER_TOKEN"

_LEAST_REST = 1e-7
"""Resolution of 1 minus a sum of k float32 probabilities."""


@final
class ServedTeacher(PackedTeacher):
    """A teacher on an OpenAI-compatible vLLM server, which scores every row of a batch.

    Args:
        url: Address of the server, such as http://localhost:8000.
        model: Name of the served teacher; by default the server's only model.
        k: Ids that keep their own log-probability; the server needs --max-logprobs k + 8.
        timeout_seconds: Longest wait for one row, which includes the server's queue.
        concurrency: Requests in flight at once.
        num_retries: Retries of a request whose connection failed; 12 last 64 seconds, in which a
            server can restart.

    Raises:
        ConfigError: A number out of its range.
    """

    option = "--model.teacher ServedTeacher"
    reads_new_rows = True
    text_losses = ("chunk",)

    def __init__(
        self,
        url: str,
        model: str | None = None,
        k: int = 12,
        timeout_seconds: float = 600.0,
        concurrency: int = 16,
        num_retries: int = 12,
    ) -> None:
        for name, value in (("k", k), ("concurrency", concurrency)):
            if value < 1:
                raise ConfigError(f"model.teacher.{name} must be at least 1, got {value}")
        self._arguments = {
            "url": url,
            "model": model,
            "k": k,
            "timeout_seconds": timeout_seconds,
            "concurrency": concurrency,
            "num_retries": num_retries,
        }
        self.k = self._wanted = k
        self.concurrency = concurrency
        endpoint = Endpoint(url, "--model.teacher.url", timeout_seconds, num_retries, _TOKEN)
        self._client = VLLMClient(endpoint, model)
        self._is_connected = False

    @property
    def computes_elsewhere(self) -> bool:
        """Always: on the server."""
        return True

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Address and request settings."""
        return self._arguments

    def check_options(self, options: TeacherOptions) -> None:
        """Refuse a number format of the teacher: it is the server's."""
        if options.teacher_dtype is not None:
            raise ConfigError(
                "model.teacher ServedTeacher runs on a server, which chooses its number format: "
                "leave model.teacher_dtype out (--model.teacher_dtype null)"
            )
        super().check_options(options)

    def join(self, run: TeacherRun) -> Self:
        """Return a copy for ``run``, with the size of its vocabulary."""
        own = super().join(run)
        own.k = min(self._wanted, own._num_outcomes)
        if run.reads_texts:
            endpoint = replace(self._client.endpoint, option="--model.teacher.model.url")
            own._client = replace(self._client, endpoint=endpoint)
        return own

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take the vocabulary with the run's present end ids."""
        super().use_vocabulary(vocabulary)
        self.k = min(self._wanted, self._num_outcomes)

    @property
    def _num_outcomes(self) -> int:
        """Outcomes of the vocabulary: all ends of a response are one."""
        vocabulary = self.run.vocabulary
        num_merged = max(0, len(vocabulary.end_ids) - 1)
        return vocabulary.size - len(vocabulary.invalid_ids) - num_merged

    def open(self, opening: Opening) -> None:
        """Connect to the server."""
        del opening
        self.connect()

    def connect(self) -> None:
        """Find the model and compare the tokenizers, once.

        Raises:
            ServerError: The server cannot be reached, or does not serve the model.
            VocabularyError: Its tokenizer gives other ids than the run's.
        """
        if self._is_connected:
            return
        served = self._client.served()
        self._check_tokenizer()
        self._is_connected = True
        where = f"teacher: {one_line(served.name)} at {self._client.endpoint.url}"
        if self.run.reads_texts:
            rank_zero_info(f"{where}, which gives the probabilities of its own tokens")
            return
        rank_zero_info(
            f"{where}, {self.k} ids per token; methods read their divergences as TopK(., "
            f"{self.k}), "
            "at most the exact ones; validation takes these as val/top_k_* and "
            "val/on_policy_top_k_*"
        )

    def check_length(self, num_tokens: int) -> None:
        """Refuse rows that are longer than the server's limit, which is requested from it.

        Args:
            num_tokens: Tokens of the longest row that the teacher reads.

        Raises:
            ConfigError: Too long; the message names both lengths.
        """
        limit = self.context_length()
        if limit is not None and num_tokens > limit:
            raise ConfigError(
                f"{self._name} reads {limit} tokens of prompt and response together, and this "
                f"run has up to {num_tokens}: start it with --max-model-len {num_tokens + 1} or "
                "more, or lower --data.max_prompt_length or --data.max_response_length"
            )

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the teacher's side: packed rows at the loss positions; a constant.

        Args:
            batch: Any rows, on-policy ones too.
            quantities: Quantities that will be measured.

        Raises:
            ConfigError: A quantity that needs the teacher to be run in this process.
            ServerError: The server fails, or its answer is unexpected.
        """
        check_known(quantities, self.k, self.run.vocabulary.size, self.option)
        asks_ends = any(isinstance(quantity, CachedDrawnOutcome) for quantity in quantities)
        return self._packed(batch.teacher_reads, asks_ends)

    def text_side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return packed rows at the teacher's tokens, of which the target's outcome is used."""
        del quantities
        return self._packed(batch.teacher_reads, asks_ends=True)

    def check_text_term(self, term: Term) -> None:
        """Refuse a method that needs more than the probability of the teacher's tokens."""
        check_served_text_term(term, self.option)

    def context_length(self) -> int | None:
        """Return the server's limit, less the token that it generates."""
        limit = self._client.served().max_model_len
        return None if limit is None else limit - 1

    def _packed(self, reads: Sequences, asks_ends: bool) -> Side:
        self.connect()
        ids, mask = reads.input_ids.tolist(), reads.mask.cpu().numpy()
        rows = [
            (ids[row][:length], np.flatnonzero(mask[row, :length][1:]) + 1)
            for row, length in enumerate(reads.lengths.tolist())
        ]
        calls = [
            partial(self._score, row, places, asks_ends) for row, places in rows if len(places)
        ]
        found = in_parallel(calls, self.concurrency)
        said = [np.concatenate(parts) for parts in zip(*found, strict=True)] or [
            np.empty((0, self.k), np.int64),
            np.empty((0, self.k + 1)),
            np.empty(0),
        ]
        known, logprobs, drawn = (torch.from_numpy(part) for part in said)
        dtype = self.run.logprob_dtype
        packed = pack_outcomes(known, logprobs.to(dtype), drawn.to(dtype))
        return Side(packed.to(reads.input_ids.device), PackedHead())

    @property
    def _name(self) -> str:
        return f"{self._client.endpoint.option}: {self._client.endpoint.url}"

    def _score(self, ids: list[int], places: np.ndarray, asks_ends: bool) -> tuple[np.ndarray, ...]:
        """Return a row's [places, k] ids, [places, k + 1] log-probs, [places] target log-probs.

        Args:
            ids: The row.
            places: Its loss tokens.
            asks_ends: Whether all of several end ids are needed where the row has one of them: each
                that is not among the most likely costs a request.
        """
        body = {
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": self.k + _SPARE,
        }
        try:
            found = self._client.complete(body).prompt_logprobs
        except ServerStatusError as error:
            if error.status != 400:
                raise
            raise ServerError(
                f"{error}; it has to take prompts of {len(ids)} tokens (--max-model-len "
                f"{len(ids) + 1} at least) and to give {self.k + _SPARE} log-probabilities "
                f"(--max-logprobs {self.k + _SPARE}); or lower --model.teacher.k"
            ) from error
        said = [dict(found[place - 1]) for place in places]
        if asks_ends:
            for of_place, place in zip(said, places, strict=True):
                of_place.update(self._other_ends(ids[: place + 1], of_place))
        read = [self._read(one, ids[place]) for one, place in zip(said, places, strict=True)]
        return tuple(np.stack(parts) for parts in zip(*read, strict=True))

    def _read(
        self, said: Mapping[int, float], token: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return [k] ids, most likely first, [k + 1] log-probs (nats), [] the target token's.

        vLLM returns a prompt's own tokens besides the most likely ids, however unlikely they are.
        Several end ids are one outcome if all of them are known; else they are part of the rest.
        """
        said, drawn_logprob, of_ends = self._merged(said, token)
        entries = sorted((-logprob, known) for known, logprob in said.items())
        ids = np.asarray([known for _, known in entries])
        logprobs = -np.asarray([negative for negative, _ in entries], dtype=np.float64)
        is_token = (ids < self.run.vocabulary.size) & ~np.isin(ids, self.run.vocabulary.invalid_ids)
        strange = float(np.exp(logprobs[~is_token]).sum())
        if strange > _NEGLIGIBLE or is_token.sum() < self.k:
            raise VocabularyError(
                f"{self._name}: its {len(ids)} most likely ids have {int((~is_token).sum())} that "
                f"the run's tokenizer has no token for, with probability {strange:.3g}, such as "
                f"{[int(i) for i in ids[~is_token]][:3]}; serve a teacher of the student's "
                "tokenizer, without padding rows that it gives probability to"
            )
        ids, logprobs = ids[is_token][: self.k], logprobs[is_token][: self.k] - np.log1p(-strange)
        self._check_mass(float(np.exp(logprobs).sum()) + of_ends)
        is_all = self.k == self._num_outcomes
        rest = -math.inf if is_all else math.log(max(1 - np.exp(logprobs).sum(), _LEAST_REST))
        outcomes = np.append(logprobs, rest)
        drawn = np.asarray(drawn_logprob - np.log1p(-strange))
        return ids, outcomes - np.logaddexp.reduce(outcomes), drawn

    def _merged(
        self, said: Mapping[int, float], token: int
    ) -> tuple[Mapping[int, float], float, float]:
        """Return log-probs (nats) by outcome, the target's, and the mass of ends that are left out.

        With an end id missing, the known ones are left out, so that the outcome is in the rest.
        """
        ends = self.run.vocabulary.end_ids
        if len(ends) < 2:
            return said, said[token], 0.0
        known = [said[i] for i in ends if i in said]
        others = {i: logprob for i, logprob in said.items() if i not in ends}
        if len(known) < len(ends):
            return others, said[token], float(np.exp(known).sum())
        merged = float(np.logaddexp.reduce(known))
        return {**others, ends[0]: merged}, merged if token in ends else said[token], 0.0

    def _other_ends(self, ids: list[int], said: Mapping[int, float]) -> dict[int, float]:
        """Request the log-probs (nats) of the end ids that are missing where a row has an end.

        Args:
            ids: The row up to the token in question.
            said: What is known there.
        """
        ends = self.run.vocabulary.end_ids
        if len(ends) < 2 or ids[-1] not in ends:
            return {}
        body = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
        found = {}
        for end in ends:
            if end not in said:
                completion = self._client.complete({**body, "prompt": [*ids[:-1], end]})
                found[end] = completion.prompt_logprobs[-1][end]
        return found

    def _check_mass(self, mass: float) -> None:
        """Refuse k ids that cannot be the most likely: those have at least k / vocabulary."""
        least = self.k / self.run.vocabulary.size
        if mass < _SHARE_OF_UNIFORM * least:
            raise ServerError(
                f"{self._name} gives its {self.k} most likely ids a probability of {mass:.3g} in "
                f"all, and the most likely have {least:.3g} at least: these are not "
                "log-probabilities of the model; start it with --logprobs-mode raw_logprobs"
            )

    def _check_tokenizer(self) -> None:
        for text, ids in probe_texts(self.run.tokenizer):
            found = list(self._client.tokenize(text))
            if found != ids:
                place = next(
                    (
                        i
                        for i, pair in enumerate(zip(found, ids, strict=False))
                        if len(set(pair)) > 1
                    ),
                    min(len(found), len(ids)),
                )
                raise VocabularyError(
                    f"{self._name} cuts text into other ids than {self._tokenizers_name}: {text!r} "
                    f"becomes {found[place : place + 3]} from token {place} on there, and "
                    f"{ids[place : place + 3]} here; {self._tokenizers_advice}"
                )

    @property
    def _tokenizers_name(self) -> str:
        return "model.teacher.tokenizer" if self.run.reads_texts else "the run's tokenizer"

    @property
    def _tokenizers_advice(self) -> str:
        if self.run.reads_texts:
            return "give --model.teacher.tokenizer the folder or hub id of the served model"
        return (
            "serve a teacher of the student's tokenizer, or have the texts of both compared: "
            "--model.teacher ForeignTeacher --model.teacher.model ServedTeacher "
            f"--model.teacher.model.url {self._client.endpoint.url} "
            "--model.teacher.tokenizer FOLDER_OR_HUB_ID_OF_THE_SERVED_MODEL"
        )
