"""The used part of vLLM's HTTP protocol: each answer is checked and becomes a record.

Owns the expected form of answers: anything else is a ServerError that names the expectation. The
engine and the served teacher use the records.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from okd_lightning.endpoint import Endpoint, ServerStatusError
from okd_lightning.engines.server_answers import ABOVE_ZERO, AnswerPart, is_id, shown
from okd_lightning.errors import ServerError, one_line

_SHOWN = 200
_BYTES_PER_NUMBER = 400
"""Most JSON bytes of a token with log-probability, rank and decoded text; 100 are usual."""

_SPARE_BYTES = 1 << 20


@dataclass(frozen=True)
class ServedModel:
    """A model of a server.

    Attributes:
        name: Its name in requests.
        root: Its folder or hub id on the server; None if unknown.
        max_model_len: Longest prompt with response, in tokens; None if unknown.
    """

    name: str
    root: str | None = None
    max_model_len: int | None = None


@dataclass(frozen=True)
class ServerInfo:
    """Settings that a server in dev mode reports; None for unknown ones.

    Attributes:
        dtype: Number format, such as "float32".
        logprobs_mode: Such as "processed_logprobs".
        quantization: Such as "fp8".
        max_logprobs: Most log-probabilities per token.
        device: Its device, such as "cuda" or "cpu".
    """

    dtype: str | None = None
    logprobs_mode: str | None = None
    quantization: str | None = None
    max_logprobs: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        ids: Ids of the response.
        logprobs: [response] nats, each of the sampled token; empty unless requested.
        finish_reason: Why it ended.
        prompt_logprobs: [prompt - 1] by id, nats, for each token of the prompt but the first; empty
            unless requested.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    prompt_logprobs: tuple[Mapping[int, float], ...] = ()


@dataclass
class VLLMClient:
    """Requests to one server.

    Args:
        endpoint: Its address.
        model: Name of the served model; None for the server's only model.
    """

    endpoint: Endpoint
    model: str | None = None
    _served: ServedModel | None = None

    def served(self) -> ServedModel:
        """Return the served model of the requests; read from the server once.

        Raises:
            ServerError: The server has no such model, or several and none is named.
        """
        if self._served is None:
            self._served = self.read_served()
        return self._served

    def read_served(self) -> ServedModel:
        """Read the served model of the requests from the server again; see ``served``."""
        path = "/v1/models"
        answer = AnswerPart(self.endpoint.get(path), self.endpoint.at(path))
        found = [_served_model(entry) for entry in answer.member("data").items()]
        if self.model is None and len(found) == 1:
            return found[0]
        for one in found:
            if one.name == self.model:
                return one
        names = ", ".join(one_line(one.name, _SHOWN) for one in found) or "nothing"
        raise ServerError(
            f"{self.endpoint.option}: {self.endpoint.url} serves {names}"
            + (f", not {self.model!r}" if self.model else "")
            + f"; name one with --{self.endpoint.option.lstrip('-').removesuffix('.url')}.model"
        )

    def info(self) -> ServerInfo:
        """Read the server's settings; empty if it is not in dev mode.

        Raises:
            ServerError: An unexpected answer.
        """
        path = "/server_info?config_format=json"
        try:
            given = self.endpoint.get(path)
        except ServerStatusError as error:
            if error.status in (404, 405, 422):
                return ServerInfo()
            raise
        answer = AnswerPart(given, self.endpoint.at(path))
        config = answer.member("vllm_config")
        if isinstance(config.value, str):  # as text, from versions without the parameter
            return ServerInfo()
        model = config.member("model_config")
        dtype = model.optional("dtype", str)
        device = config.optional("device_config", dict) or {}
        return ServerInfo(
            dtype=None if dtype is None else dtype.removeprefix("torch."),
            logprobs_mode=model.optional("logprobs_mode", str),
            quantization=model.optional("quantization", str),
            max_logprobs=model.optional("max_logprobs", int),
            device=AnswerPart(device, answer.at).optional("device", str),
        )

    def complete(self, request: Mapping[str, Any]) -> Completion:
        """Return the response to a /v1/completions request whose prompt is a list of ids.

        Raises:
            ServerError: The request fails, or the answer is unexpected.
        """
        path, prompt = "/v1/completions", request["prompt"]
        of_prompt, of_response = request.get("prompt_logprobs"), request.get("logprobs")
        num_numbers = len(prompt) * (2 + (of_prompt or 0)) + request["max_tokens"] * 4
        given = self.endpoint.post(
            path,
            {"model": self.served().name, "return_token_ids": True, **request},
            max_bytes=_SPARE_BYTES + _BYTES_PER_NUMBER * num_numbers,
        )
        answer = AnswerPart(given, self.endpoint.at(path))
        choices = answer.member("choices").items()
        if len(choices) != 1:
            raise answer.wrong(f"{len(choices)} choices", "one")
        choice = choices[0]
        read, ids = (
            choice.member(name).ids("return_token_ids needs vLLM 0.27 or newer")
            for name in ("prompt_token_ids", "token_ids")
        )
        if list(read) != list(prompt):
            raise choice.wrong(f"{len(read)} other prompt_token_ids", "those that were sent")
        logprobs: tuple[float, ...] = ()
        if of_response is not None:
            logprobs = choice.member("logprobs").member("token_logprobs").logprobs()
            if len(logprobs) != len(ids):
                raise choice.wrong(f"{len(logprobs)} log-probabilities", f"{len(ids)}, one per id")
        scored: tuple[Mapping[int, float], ...] = ()
        if of_prompt is not None:
            scored = _scored(choice.member("prompt_logprobs"), prompt)
        return Completion(ids, logprobs, choice.member("finish_reason").text(), scored)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text, without special tokens.

        Raises:
            ServerError: The request fails, or the answer is unexpected.
        """
        body = {"model": self.served().name, "prompt": text, "add_special_tokens": False}
        path = "/tokenize"
        answer = AnswerPart(self.endpoint.post(path, body), self.endpoint.at(path))
        return answer.member("tokens").ids()

    # --------------------------------------------------------------- dev mode

    def version(self) -> str:
        """Return the label of the server's weights.

        Raises:
            ServerError: The server reports none.
        """
        path = "/weight_info"
        try:
            given = self.endpoint.get(path)
        except ServerStatusError as error:
            if error.status not in (404, 405):
                raise
            raise ServerError(
                f"{self.endpoint.option}: {self.endpoint.url} has no /weight_info, so that the "
                "weights from which it samples are unknown; start it with VLLM_SERVER_DEV_MODE=1, "
                "from vLLM 0.27 or newer"
            ) from error
        return AnswerPart(given, self.endpoint.at(path)).member("weight_version").text()

    def name_version(self, label: str) -> None:
        """Set the label of the server's weights."""
        self.endpoint.post("/update_weight_version", {"new_version": label})

    def reload(self, folder: str, seconds: float) -> None:
        """Make the server load the weights in ``folder``, which must be at this path for it too."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        self.endpoint.post("/collective_rpc", body, seconds)

    def drop_cache(self) -> bool:
        """Make the server drop its prefix cache; return False if running requests hold it."""
        path = "/reset_prefix_cache"
        answer = AnswerPart(self.endpoint.post(path, {}), self.endpoint.at(path))
        if answer.value is None:  # an empty answer
            return True
        return answer.optional("success", bool) is not False


def _served_model(entry: AnswerPart) -> ServedModel:
    length = entry.optional("max_model_len", int)
    if length is not None and length < 1:
        raise entry.wrong(f"max_model_len {length}", "a length in tokens")
    return ServedModel(entry.member("id").text(), entry.optional("root", str), length)


def _scored(rows: AnswerPart, prompt: Sequence[int]) -> tuple[Mapping[int, float], ...]:
    """Return log-probabilities by id of every token of the prompt but the first."""
    found = rows.items()
    if len(found) != len(prompt):
        raise rows.wrong(f"{len(found)} rows", f"{len(prompt)}, one per token of the prompt,")
    return tuple(_by_id(row, token) for row, token in zip(found[1:], prompt[1:], strict=True))


def _by_id(row: AnswerPart, token: int) -> Mapping[int, float]:
    if not isinstance(row.value, dict):
        raise row.wrong(shown(row.value), "an object of log-probabilities by id")
    found: dict[int, float] = {}
    for key, entry in row.value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11 and str(int(key)) == key):
            raise row.wrong(shown(key), "a token id")
        if not isinstance(entry, dict) or not is_id(int(key)):
            raise row.wrong(f"{key}: {shown(entry)}", "an object with a 'logprob'")
        found[int(key)] = row.logprob(entry.get("logprob"))
    if token not in found:
        raise ServerError(
            f"{row.at} has no log-probabilities of the prompt's own tokens (id {token} is "
            "missing); it needs vLLM 0.10.2 or newer"
        )
    total = math.fsum(map(math.exp, found.values()))
    if total > 1 + ABOVE_ZERO:
        raise row.wrong(
            f"probabilities that sum to {total:.6g}", "at most 1 (--logprobs-mode raw_logprobs)"
        )
    return found
