"""A judge: a language model on a server that scores responses.

Owns the request, the parsing of the reply and the memory of scores; ``endpoint`` owns transport and
retries. The server speaks OpenAI's chat completions, as vLLM and most others do.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any

import regex
import torch

from okd_lightning.data.row_templates import fields_of
from okd_lightning.endpoint import Endpoint, ServerStatusError, in_parallel
from okd_lightning.engines.server_answers import AnswerPart
from okd_lightning.errors import ConfigError, ServerError, one_line
from okd_lightning.rewards.answers import answer_pattern, final_answer
from okd_lightning.rewards.functions import RewardFunction, ScoredRow

_FIELDS = ("prompt", "response", "reference")
_EXPECTED = "expected {response}, and {prompt} or {reference} if wanted ({{ and }} for braces)"
_PATH = "/v1/chat/completions"
_MODELS = "/v1/models"
_SCORE = regex.compile(r"(?i)\bscore\b[\s:=*_`]*([-+]?\d+(?:\.\d+)?)")
_NUMBER = regex.compile(r"\A[\s*_`]*([-+]?\d+(?:\.\d+)?)[\s*_`.]*\Z")
_REMEMBERED = 50_000
"""Most scores in memory and in a checkpoint, the newest."""

_FATAL = (401, 403, 404, 405)
"""Statuses that every further request would get too."""

_PROMPT = """Judge how well a response answers a request. Consider correctness, completeness and
clarity; do not reward length.

[Request]
{prompt}

[Response]
{response}

End your reply with one line: "Score: N", where N is a number from {lowest} (worst) to
{highest} (best)."""


class Judge(RewardFunction):
    """A score from a language model on an OpenAI-compatible server, mapped to [0, 1].

    Every response is one chat completion at temperature 0. The reply's last "Score: N" counts (or a
    reply that is only a number); N outside of the scale counts as no score. A row has no score if
    its reply cannot be read or its request fails after all retries; it is counted, and a run stops
    if more than 5 % of its latest 100 responses have none. Scores are remembered by the request's
    content and are part of a checkpoint, so that a resumed run does not request them again.

    The key is read from an environment variable and is in no file. Responses are text that the
    student chose: it can persuade a judge of a high score, so read samples as well as the reward.

    Args:
        url: Address of the server, such as http://localhost:8000.
        prompt: The judge's prompt: a text with {response}, and {prompt} and {reference} if
            wanted. The default asks for a score from the scale's ends.
        scale: Lowest and highest score; a score s becomes (s - lowest) / (highest - lowest).
        model: Name of the served model; by default the server's only one.
        pattern: A regular expression whose first group is the score (the last match counts); by
            default "Score: N".
        key_variable: Environment variable with the key; without it no key is sent.
        request: Further fields of a request, such as max_completion_tokens; null leaves one out
            (temperature and max_tokens are set).
        max_tokens: Longest reply, in tokens.
        concurrency: Number of requests at the same time.
        timeout_seconds: Longest wait for one reply.
        num_retries: Repetitions of a request where the connection failed or the server was busy.
        max_failures: Share of the latest 100 responses without a score above which a run stops.

    Raises:
        ConfigError: A number out of its range, or an invalid prompt, pattern or address.
    """

    def __init__(
        self,
        url: str,
        prompt: str | None = None,
        scale: tuple[float, float] = (1.0, 10.0),
        model: str | None = None,
        pattern: str | None = None,
        key_variable: str = "OKD_JUDGE_KEY",
        request: dict[str, Any] | None = None,
        max_tokens: int = 512,
        concurrency: int = 16,
        timeout_seconds: float = 120.0,
        num_retries: int = 8,
        max_failures: float = 0.05,
    ) -> None:
        self.lowest, self.highest = _checked_scale(scale)
        ends = {"lowest": f"{self.lowest:g}", "highest": f"{self.highest:g}"}
        self.prompt = _PROMPT.replace("{lowest}", ends["lowest"])
        self.prompt = self.prompt.replace("{highest}", ends["highest"])
        if prompt is not None:
            self.prompt = _checked_prompt(prompt)
        for name, value in (("max_tokens", max_tokens), ("concurrency", concurrency)):
            if value < 1:
                raise ConfigError(f"Judge: {name} must be at least 1, got {value}")
        if not 0 <= max_failures <= 1:
            raise ConfigError(f"Judge: max_failures must be between 0 and 1, got {max_failures}")
        self.pattern, self.model = answer_pattern(pattern), model
        self.settings = {"temperature": 0, "max_tokens": max_tokens, **(request or {})}
        self.concurrency, self.max_failures = concurrency, max_failures
        self._endpoint = Endpoint(url, "Judge url", timeout_seconds, num_retries, key_variable)
        self._known: dict[str, float] = {}
        self._new: dict[str, float] = {}
        self._is_open = self._has_warned = False

    # ---------------------------------------------------------------- memory

    def new_scores(self) -> Mapping[str, float]:
        """Return this rank's scores since the last call."""
        new, self._new = self._new, {}
        return new

    def remember(self, scores: Mapping[str, float]) -> None:
        """Take scores of all ranks, or of a checkpoint; the newest are kept."""
        for key, score in scores.items():
            self._known.pop(key, None)
            self._known[key] = score
        while len(self._known) > _REMEMBERED:
            del self._known[next(iter(self._known))]

    @property
    def remembered(self) -> Mapping[str, float]:
        """The remembered scores by the digest of their requests."""
        return self._known

    # ---------------------------------------------------------------- scoring

    def open(self, device: torch.device) -> None:
        """Request the server's list of models, before a run trains.

        Raises:
            ServerError: It cannot be reached or refuses, or does not serve the model.
        """
        del device
        if self._is_open:
            return
        try:
            listed = AnswerPart(self._endpoint.get(_MODELS), self._endpoint.at(_MODELS))
        except ServerStatusError as error:
            if error.status not in (404, 405) or self.model is None:
                raise
            self._is_open = True  # a server without a list
            return
        names = [card.member("id").text() for card in listed.member("data").items()]
        if self.model is None and len(names) == 1:
            self.model = names[0]
        elif self.model not in names:
            shown = ", ".join(one_line(name, 80) for name in names[:8]) or "no model"
            asked = "" if self.model is None else f", not {self.model!r}"
            raise ServerError(
                f"{self._endpoint.at(_MODELS)} lists {shown}{asked}; set the Judge's model to one "
                "of them"
            )
        self._is_open = True

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Score responses to plain prompts; see ``score``."""
        columns = zip(prompts, responses, references, strict=True)
        return self.score([ScoredRow(*row) for row in columns])

    def score(self, rows: Sequence[ScoredRow]) -> Sequence[float]:
        """Request the score of each row that is not remembered; NaN for a row without a score.

        Raises:
            ServerError: The server refuses every request (its key or address).
        """
        self.open(torch.device("cpu"))
        bodies = [self._body(row) for row in rows]
        keys = [_digest(body) for body in bodies]
        asked = {
            key: body for key, body in zip(keys, bodies, strict=True) if key not in self._known
        }
        calls = [partial(self._ask, body) for body in asked.values()]
        answers = dict(zip(asked, in_parallel(calls, self.concurrency), strict=True))
        self._warn([reason for _, reason in answers.values() if reason])
        found = {key: score for key, (score, _) in answers.items() if not math.isnan(score)}
        scores = {key: self._known.get(key, math.nan) for key in keys} | found
        self._new.update(found)
        self.remember(found)
        return [scores[key] for key in keys]

    def _body(self, row: ScoredRow) -> dict[str, Any]:
        texts = {"prompt": _request(row), "response": row.response, "reference": row.reference}
        content = self.prompt.format(**texts)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            **self.settings,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _ask(self, body: dict[str, Any]) -> tuple[float, str]:
        """Return the score of one request; NaN and the reason if there is none."""
        try:
            reply = AnswerPart(self._endpoint.post(_PATH, body), self._endpoint.at(_PATH))
            choice = reply.member("choices").items()[:1]
            if not choice:
                raise reply.wrong("no choices", "one choice")
            content = choice[0].member("message").optional("content", str) or ""
            reason = choice[0].optional("finish_reason", str)
        except ServerStatusError as error:
            if error.status in _FATAL:
                raise
            return math.nan, str(error)
        except ServerError as error:
            return math.nan, str(error)
        return self._parsed(content, reason)

    def _parsed(self, reply: str, finish_reason: str | None) -> tuple[float, str]:
        text = final_answer(reply, self.pattern or _SCORE)
        if text is None and self.pattern is None:
            text = final_answer(reply, _NUMBER)
        shown = one_line(reply[-200:])
        if text is None:
            cut = "; it was cut at max_tokens, raise it" if finish_reason == "length" else ""
            form = f"a match of {self.pattern.pattern!r}" if self.pattern else '"Score: N"'
            return math.nan, f"the reply has no score: expected {form}, got {shown!r}{cut}"
        try:
            score = float(text)
        except ValueError:
            return math.nan, f"the reply's score {text[:40]!r} is not a number, in {shown!r}"
        if not self.lowest <= score <= self.highest:
            scale = f"{self.lowest:g} to {self.highest:g}"
            return math.nan, f"the reply's score {score:g} is outside of {scale}, in {shown!r}"
        return (score - self.lowest) / (self.highest - self.lowest), ""

    def _warn(self, reasons: Sequence[str]) -> None:
        if reasons and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Judge {self._endpoint.url}: {len(reasons)} responses have no score, the first "
                f"because {reasons[0]}; later ones are only counted",
                stacklevel=2,
            )


def _request(row: ScoredRow) -> str:
    """Return the prompt as plain text: a chat's messages with their roles."""
    if row.chat is None:
        return row.prompt
    turns = (f"{message['role']}: {message.get('content') or ''}" for message in row.chat.messages)
    return "\n".join(turns)


def _digest(body: Mapping[str, Any]) -> str:
    content = json.dumps(body, sort_keys=True, default=str).encode()
    return blake2b(content, digest_size=16).hexdigest()


def _checked_scale(scale: Sequence[float]) -> tuple[float, float]:
    ends = tuple(scale) if isinstance(scale, list | tuple) else ()
    is_scale = len(ends) == 2 and all(math.isfinite(end) for end in ends) and ends[0] < ends[1]
    if not is_scale:
        raise ConfigError(
            f"Judge: scale is {scale!r}; expected the lowest and the highest score, such as [1, 10]"
        )
    return float(ends[0]), float(ends[1])


def _checked_prompt(prompt: str) -> str:
    fields = fields_of(prompt, "Judge prompt", _EXPECTED)
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise ConfigError(f"Judge prompt: unknown field {{{unknown[0]}}}; {_EXPECTED}")
    if "response" not in fields:
        raise ConfigError(f"Judge prompt: it has no {{response}} to judge; {_EXPECTED}")
    return prompt
