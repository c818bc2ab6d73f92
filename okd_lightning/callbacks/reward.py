"""A verifiable reward beside distillation: GKD with a reward, OPD+ with a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import get_args

import lightning
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from okd_lightning.advantages import (
    GroupBaseline,
    PlainFunction,
    RewardFunction,
    baselined,
    checked_rewards,
)
from okd_lightning.callbacks.policy_gradient import PolicyGradientCallback
from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.losses import Measured
from okd_lightning.module import DistillationModule
from okd_lightning.named_classes import as_object


class Reward(PolicyGradientCallback):
    """Maximise E[r(response)] over the student's own responses (GKD, arXiv 2306.13649, Eq. 5).

    Every token of a response gets the response's reward, minus its baseline. Beside GKD with
    weight 1-α and this term with weight α it is the paper's combination; beside OPDPlus it adds to
    its credit. Rewards are not divided by their standard deviation. Logged: ``rollout/<name>``, the
    mean raw reward of what was written, and ``rollout/<name>_failures``, how many had none.

    Args:
        function: Scores responses; in Python also a plain function of prompt, response and
            reference.
        baseline: none, group_mean or leave_one_out over the samples of a prompt; the latter two
            need data.samples_per_prompt above 1.
        on_failure: What happens to a response whose reward is not a finite number: "skip" gives
            it no credit, counts it and warns once, "error" stops the run. A function that raises
            always does.
        max_ratio: Truncation of ρ; inf for off.
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
        max_ratio: float = math.inf,
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

    @property
    def reads_last_turn(self) -> bool:
        """What the function is given of responses that call tools."""
        return self.function.reads_last_turn

    def score(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> list[float]:
        """One reward a response, NaN for those that have none.

        Raises:
            RewardError: The function raised or returned something else; or a reward that is not
                finite, with ``on_failure="error"``.
        """
        rewards = checked_rewards(self.function, prompts, responses, references)
        if self.on_failure == "error" and any(map(math.isnan, rewards)):
            response = responses[[math.isnan(reward) for reward in rewards].index(True)]
            raise RewardError(
                f"reward {type(self.function).__name__} is not a finite number for the response "
                f"{response[:60]!r}; repair it, or leave such responses out with on_failure skip"
            )
        return rewards

    def credit_rows(self, scores: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
        """One credit a response: its reward minus its group's baseline.

        Args:
            scores: Of all ranks' responses; NaN of those without a reward, which get no credit.
            groups: Which samples are compared.
        """
        num_failures = sum(map(math.isnan, scores))
        if num_failures and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"{self.name}: {num_failures} of {len(scores)} responses have no finite reward; "
                f"such responses get no credit and are counted in rollout/{self.name}_failures; "
                "on_failure error stops the run at the first one and shows it"
            )
        return baselined(scores, groups, self.baseline)

    def credit(self, measured: Measured) -> tuple[Tensor, dict[str, Tensor]]:
        """The credit of each token's row.

        Raises:
            ConfigError: The batch comes from a loader that asked no rewards.
        """
        if self.name not in measured.credits:
            raise ConfigError(
                f"{self.name}: the batch holds no credits; train on a RolloutDataModule's batches, "
                f"or set DistillBatch.credits[{self.name!r}] to one number a row"
            )
        return measured.credits[self.name], {}

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Refuse a baseline that every response would have to give itself.

        Raises:
            ConfigError: A baseline over samples, and one sample a prompt.
        """
        samples = getattr(getattr(trainer, "datamodule", None), "samples_per_prompt", None)
        if stage == "fit" and self.baseline != "none" and samples == 1:
            raise ConfigError(
                f"{self.name}: baseline {self.baseline} compares the samples of a prompt, of which "
                "there is one: every credit would be 0; give --data.samples_per_prompt 2 or more, "
                "or baseline none"
            )


def as_function(function: RewardFunction | Callable[[str, str, str], float]) -> RewardFunction:
    """A plain function wrapped, or a RewardFunction, its class or name as an object.

    Only Python can hand over a function; configs name classes.

    Raises:
        ConfigError: It cannot be called, or is a class that needs arguments or is none of rewards.
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
