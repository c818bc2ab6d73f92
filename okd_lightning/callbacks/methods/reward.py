"""A reward next to distillation: verifiable, of a reward model, or of a judge."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, get_args

import lightning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from okd_lightning.callbacks.methods.policy_gradient import PolicyGradientCallback
from okd_lightning.divergences.named_classes import as_object
from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.losses import Measured
from okd_lightning.records.requests import Chat
from okd_lightning.rewards import (
    GroupBaseline,
    PlainFunction,
    RewardFunction,
    baselined,
    checked_rewards,
)
from okd_lightning.training.module import DistillationModule

_LATEST = 100
"""Number of latest responses over which the share without a score is computed."""


class Reward(PolicyGradientCallback):
    """Maximise E[r(response)] over on-policy responses (GKD, arXiv 2306.13649, Eq. 5).

    Every token of a response gets the response's reward minus its baseline as its advantage. GKD
    with weight 1-α and this term with weight α are the paper's combination; with OPDPlus it is
    added to that method's advantage. Rewards are not divided by their standard deviation. Logged:
    ``rollout/<name>``, the mean raw reward of the responses, and ``rollout/<name>_failures``, the
    number without one.

    Args:
        function: Scores responses; in Python also a plain function of prompt, response and
            reference.
        baseline: none, group_mean or leave_one_out over the samples of a prompt; the latter two
            need data.samples_per_prompt above 1.
        on_failure: Action for a response whose reward is not a finite number: "skip" gives it
            advantage 0, counts it and warns once; "error" stops the run. A function that raises
            always stops the run.
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ConfigError: An unknown baseline or on_failure.
    """

    def __init__(
        self,
        function: RewardFunction,
        baseline: GroupBaseline = "none",
        on_failure: str = "skip",
        max_ratio: float | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(max_ratio, clip, weight, name)
        if baseline not in get_args(GroupBaseline):
            raise ConfigError(
                f"baseline is {baseline!r}; expected one of {', '.join(get_args(GroupBaseline))}"
            )
        if on_failure not in ("skip", "error"):
            raise ConfigError(f"on_failure is {on_failure!r}; expected skip or error")
        self.function = as_function(function)
        self.baseline = baseline
        self.on_failure = on_failure
        self.scorer = self
        self._has_warned = False
        self._latest: deque[bool] = deque(maxlen=_LATEST)  # whether the latest responses have none

    @property
    def reads_last_turn(self) -> bool:
        """True if the function gets only the last turn of responses that call tools."""
        return self.function.reads_last_turn

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        references: Sequence[str],
        chats: Sequence[Chat | None] = (),
    ) -> list[float]:
        """Return one reward per response, NaN for those that have none.

        Raises:
            RewardError: The function raised or did not return numbers; or a reward is not finite,
                with ``on_failure="error"``.
        """
        rewards = checked_rewards(self.function, prompts, responses, references, chats)
        if self.on_failure == "error" and any(map(math.isnan, rewards)):
            response = responses[[math.isnan(reward) for reward in rewards].index(True)]
            raise RewardError(
                f"reward {type(self.function).__name__} is not a finite number for the response "
                f"{response[:60]!r}; fix it, or leave such responses out with on_failure skip"
            )
        return rewards

    def credit_rows(self, scores: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
        """Return one advantage per response: its reward minus its group's baseline.

        Args:
            scores: Rewards of all ranks' responses; NaN for none, which gives advantage 0.
            groups: Group of each response; the baseline is computed over a group.
        """
        num_failures = sum(map(math.isnan, scores))
        self._check_failures(scores)
        if num_failures and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{self.name}: {num_failures} of {len(scores)} responses have no finite reward; "
                f"such responses get advantage 0 and are counted in rollout/{self.name}_failures; "
                "on_failure error stops the run at the first one and shows it"
            )
        return baselined(scores, groups, self.baseline)

    def _check_failures(self, scores: Sequence[float]) -> None:
        """Stop where more of the latest responses have no score than the function allows.

        Raises:
            RewardError: On all ranks, which have the same scores.
        """
        limit, latest = self.function.max_failures, self._latest
        latest.extend(map(math.isnan, scores))
        failed, name = sum(latest), type(self.function).__name__
        if limit < 1 and (failed > limit * _LATEST or (scores and all(map(math.isnan, scores)))):
            raise RewardError(
                f"reward {name}: {failed} of the latest {len(latest)} responses have no "
                f"score, more than the {limit:.0%} of {_LATEST} that max_failures allows; the "
                "first warning of this run says why"
            )

    def new_scores(self) -> Mapping[str, float]:
        """Return the function's new scores that all ranks remember."""
        return self.function.new_scores()

    def remember(self, scores: Mapping[str, float]) -> None:
        """Pass the scores of all ranks to the function."""
        self.function.remember(scores)

    def state_dict(self) -> dict[str, Any]:
        """Return the function's remembered scores, the same on all ranks; empty without any."""
        remembered = dict(self.function.remembered)
        return {"scores": remembered} if remembered else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the scores of a checkpoint."""
        self.function.remember(state_dict.get("scores", {}))

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the advantage of each token's row.

        Raises:
            ConfigError: The batch has no rewards.
        """
        if self.name not in measured.credits:
            raise ConfigError(
                f"{self.name}: the batch holds no advantages; train on batches of a "
                f"RolloutDataModule, or set DistillBatch.credits[{self.name!r}] to one number per "
                "row"
            )
        return measured.credits[self.name], {}

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Refuse a group baseline with one sample per prompt; load what the function needs.

        Raises:
            ConfigError: A baseline over samples, and one sample per prompt.
            OKDLightningError: A reward model or a judge that cannot be used.
        """
        super().prepare(trainer, module, stage)
        samples = getattr(getattr(trainer, "datamodule", None), "samples_per_prompt", None)
        if stage == "fit" and self.baseline != "none" and samples == 1:
            raise ConfigError(
                f"{self.name}: baseline {self.baseline} compares the samples of a prompt, of which "
                "there is one: every advantage would be 0; give --data.samples_per_prompt 2 or "
                "more, "
                "or baseline none"
            )
        if stage == "fit":
            self.function.open(trainer.strategy.root_device)


def as_function(function: RewardFunction | Callable[[str, str, str], float]) -> RewardFunction:
    """Return a RewardFunction from a plain function, an object, a class or a class name.

    Plain functions can only be passed in Python; configs name classes.

    Raises:
        ConfigError: It cannot be called, is a class that needs arguments, or is not a
            RewardFunction.
    """
    if isinstance(function, Metric):
        raise ConfigError(
            f"function is the metric {type(function).__name__}, which measures a set of "
            "answers: use TaskScore for it; a reward scores each response"
        )
    is_plain = callable(function) and not isinstance(function, type | RewardFunction)
    if is_plain:
        return PlainFunction(function)
    found: RewardFunction = as_object(function, RewardFunction, "function", "AnswerMatch()")
    return found
