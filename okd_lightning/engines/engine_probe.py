"""Check that an external engine has the student's weights: a probe, and a few re-scored rows.

The probe is a sequence of ids that student and engine both score after every transfer of weights. A
difference may come from number formats, or from weights that were not transferred. The second grows
as the student trains and the first does not, so the allowed difference depends on the student's
change since the first transfer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from okd_lightning.errors import ServerError
from okd_lightning.models import LMHead, Vocabulary, head_inputs
from okd_lightning.records.noise import NoiseDomain, hashed_uniform
from okd_lightning.records.requests import Prompt, Response
from okd_lightning.records.sampling import Sampling

_LENGTH = 12
_CERTAIN = 1e-3
_FLOAT32_TOLERANCE = 0.01
_LEAST_GAP = 1e-5
"""Difference (nats) of float32 results computed in another order."""

_TIMES_FIRST = 4.0
_SHARE_OF_MOVE = 0.05
_NUM_RESCORED, _MOST_RESCORED = 4, 256
_GROWN = 10.0


@dataclass(frozen=True)
class Probe:
    """A sequence of ids and the student's log-probabilities for it.

    Attributes:
        ids: Any ids of the table, also without a token.
        logprobs: [position, table rows] nats, of the token after each position.
        dtype: The student's number format.
    """

    ids: tuple[int, ...]
    logprobs: Tensor
    dtype: torch.dtype

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, num_rows: int) -> Probe:
        """Compute the probe with ``model``, in its own number format.

        Args:
            model: The student, in eval mode.
            num_rows: Number of ids in its logits.
        """
        drawn = hashed_uniform(NoiseDomain.ENGINE_PROBE, num_rows, torch.arange(_LENGTH).numpy())
        ids = tuple(int(value) for value in drawn * num_rows)
        logits = model(torch.tensor([ids], device=model.device)).logits[0, :, :num_rows]
        return cls(ids, logits.float().log_softmax(-1).cpu(), model.dtype)

    @property
    def requests(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Two requests: one to score the probe, one to sample a token with top_k 1."""
        least_certain = int(self.logprobs[:-1].amax(-1).argmin())
        fields = {"max_tokens": 1, "temperature": 1.0, "ignore_eos": True}
        scored = {**fields, "prompt": list(self.ids), "prompt_logprobs": 1}
        drawn = {**fields, "prompt": list(self.ids[: least_certain + 1]), "top_k": 1, "logprobs": 0}
        return scored, drawn

    @property
    def own(self) -> tuple[float, ...]:
        """The student's log-probability (nats) of each id of the probe but the first."""
        pairs = enumerate(self.ids[1:])
        return tuple(float(self.logprobs[place, token]) for place, token in pairs)


@dataclass
class EngineGaps:
    """Differences between an engine's log-probabilities and the student's, over a run.

    Attributes:
        tolerance: Allowed mean difference on the probe (nats) by number formats.
    """

    tolerance: float
    _first_probe: tuple[float, ...] = ()
    _first_gap: float = 0.0
    _first_rescored: float | None = None
    _has_warned: bool = field(default=False, repr=False)

    def check_probe(
        self, probe: Probe, said: Sequence[float], drawn: float, where: str, dtype: str | None
    ) -> None:
        """Refuse another model, old or incomplete weights, and log-probs of another distribution.

        After the first transfer the difference may be ``tolerance`` (0.01 if both compute in
        float32). Later it may be four times the first one or 5 % of the student's change on the
        probe since then, whichever is more, but at most ``tolerance``.

        Args:
            probe: The probe, with the student's log-probabilities.
            said: The engine's log-probability (nats) of each id of the probe but the first.
            drawn: The engine's log-probability of the token sampled with top_k 1; should be 0.
            where: The host, for messages.
            dtype: The engine's number format, if known.

        Raises:
            ServerError: The difference is too large; the message says what to change.
        """
        own, allowed = probe.own, self.tolerance
        gap = _mean_distance(said, own)
        if dtype == "float32" and probe.dtype in (torch.float32, torch.float64):
            allowed = min(allowed, _FLOAT32_TOLERANCE)
        moved = _mean_distance(own, self._first_probe) if self._first_probe else None
        if moved is not None:
            grown = max(_TIMES_FIRST * self._first_gap, _SHARE_OF_MOVE * moved, _LEAST_GAP)
            allowed = min(allowed, grown)
        if not gap <= allowed:
            since = f", which has moved by {moved:.3g} since the first one" if moved else ""
            raise ServerError(
                f"{where} has received the student's weights but differs from the student by "
                f"{gap:.3g} nats per token on a probe (at most {allowed:.3g} allowed{since}): it "
                "runs another architecture, a quantised one, or has not loaded all of them (vLLM "
                "on CPU keeps the old head of a model with tied embeddings); check its model and "
                "dtype, or raise --model.engine.tolerance where only number formats differ"
            )
        if not abs(drawn) <= _CERTAIN:
            raise ServerError(
                f"{where} reports {drawn:.3g} as the log-probability of a token that was drawn "
                "with top_k 1, which is certain: these are from before temperature and cuts; start "
                "it with --logprobs-mode processed_logprobs"
            )
        if moved is None:
            self._first_probe, self._first_gap = own, gap

    def note_rescored(self, gap: float, where: str) -> None:
        """Warn, once, if the gap of re-scored responses is ten times that of the first rollout."""
        if self._first_rescored is None:
            self._first_rescored = gap
        if gap > _GROWN * max(self._first_rescored, _LEAST_GAP) and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{where}: log-probabilities of its responses differ from the student's by "
                f"{gap:.3g} nats per token, and by {self._first_rescored:.3g} at first "
                "(rollout/engine_gap): some weights may not be transferred; compare with the "
                "built-in engine (leave --model.engine out), or restart the server"
            )


def _mean_distance(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


@torch.no_grad()
def rescored_gap(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    sampling: Sampling,
    pairs: Sequence[tuple[Prompt, Response]],
) -> float | None:
    """Return the mean difference (nats) of some tokens' log-probs between student and engine.

    Args:
        model: The student, in eval mode.
        vocabulary: Ids that can be sampled.
        sampling: Sampling of the responses; greedy ones have no log-probabilities to compare.
        pairs: Prompts with the engine's responses. The first four are used, up to 256 tokens of
            each response.

    Returns:
        None if there is nothing to compare.
    """
    distances: list[float] = []
    head = LMHead.of(model, vocabulary)
    for prompt, response in pairs[:_NUM_RESCORED] if sampling.temperature else ():
        ids = list(response.ids[:_MOST_RESCORED])
        if not ids:
            continue
        read = torch.tensor([[*prompt.ids, *ids]], device=model.device)
        hidden = head_inputs(model, read, torch.ones_like(read, dtype=torch.bool))
        own = sampling.logprobs(head(hidden[0, len(prompt.ids) - 1 : -1]))
        drawn = own.gather(-1, read[0, len(prompt.ids) :, None])[:, 0].tolist()
        both = zip(drawn, response.logprobs, strict=False)
        # near the top-p threshold the engine may keep an id that is cut here: log 0
        distances += [abs(a - b) for a, b in both if math.isfinite(a)]
    return sum(distances) / len(distances) if distances else None
