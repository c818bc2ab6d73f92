"""A reward model: a frozen sequence classifier with one output, and its own tokenizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from okd_lightning.data.templates import ChatRenderer
from okd_lightning.errors import ConfigError, RewardError
from okd_lightning.models.classifiers import (
    StoredFormat,
    classifier_config,
    load_classifier,
    outputs_of,
)
from okd_lightning.models.loading import load_tokenizer
from okd_lightning.rewards.functions import RewardFunction, ScoredRow

Residence = Literal["device", "host"]

_OPTION = "RewardModel path"


class RewardModel(RewardFunction):
    """The output of a sequence classifier that reads prompt and response.

    It has its own tokenizer. With a chat template, it reads the row's messages and the response as
    the assistant's; a plain prompt is one user message. Without one, it reads the prompt's text
    followed by the response; rows that are chats are then refused. A response with several turns
    (tool calls) is one text. A row that is longer than the model's context has no score.

    Args:
        path: Folder or hub id of a model with one output (``num_labels`` 1).
        batch_size: Rows of one forward pass.
        dtype: Number format of the weights; by default that of the files.
        residence: "device" keeps the weights on the run's device; "host" keeps them in the host's
            memory and moves them to the device while a rollout batch is scored.

    Raises:
        ConfigError: A batch size below 1 or an unknown residence.
        ModelError: At the start of a run: a model that cannot be loaded or has other outputs.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 8,
        dtype: StoredFormat = "auto",
        residence: Residence = "device",
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"RewardModel: batch_size must be at least 1, got {batch_size}")
        if residence not in get_args(Residence):
            raise ConfigError(
                f"RewardModel: residence is {residence!r}; expected "
                f"{' or '.join(get_args(Residence))}"
            )
        if dtype not in (known := ("auto", "float32", "bfloat16", "float16", "float64")):
            raise ConfigError(f"RewardModel: dtype is {dtype!r}; expected {', '.join(known)}")
        self.path, self.batch_size, self.dtype, self.residence = path, batch_size, dtype, residence
        self._device = torch.device("cpu")
        self._model: PreTrainedModel | None = None

    def open(self, device: torch.device) -> None:
        """Load the model and its tokenizer, once.

        Raises:
            ModelError: They cannot be loaded.
        """
        self._device = device
        if self._model is None:
            config = classifier_config(self.path, _OPTION)
            self._tokenizer = load_tokenizer(self.path, _OPTION)
            self._model = load_classifier(self.path, config, _OPTION, self.dtype)
            self._longest = getattr(config.get_text_config(), "max_position_embeddings", None)
            self._renderer = (
                ChatRenderer(self._tokenizer, where=f"{_OPTION} {self.path!r}")
                if self._tokenizer.chat_template
                else None
            )
            num = sum(parameter.numel() for parameter in self._model.parameters())
            rank_zero_info(f"reward model {self.path}: {num:,} parameters, frozen")
        if self.residence == "device":
            self._model.to(device)  # type: ignore[arg-type]

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]
    ) -> Sequence[float]:
        """Score responses to plain prompts; see ``score``."""
        columns = zip(prompts, responses, references, strict=True)
        return self.score([ScoredRow(*row) for row in columns])

    def score(self, rows: Sequence[ScoredRow]) -> Sequence[float]:
        """Return the model's output for each row; NaN for a row that is too long.

        Raises:
            RewardError: Rows are chats, and the model has no chat template.
            DataError: The template refuses a chat.
        """
        if self._model is None:
            self.open(self._device)
        assert self._model is not None
        ids = self._ids(rows)
        longest = self._longest or math.inf
        fitting = sorted((i for i in range(len(ids)) if 0 < len(ids[i]) <= longest), key=_by(ids))
        found = [math.nan] * len(rows)
        self._model.to(self._device)  # type: ignore[arg-type]
        for start in range(0, len(fitting), self.batch_size):
            chosen = fitting[start : start + self.batch_size]
            for i, output in zip(
                chosen, outputs_of(self._model, [ids[i] for i in chosen]), strict=True
            ):
                found[i] = output
        if self.residence == "host":
            self._model.to("cpu")  # type: ignore[arg-type]
        return found

    def _ids(self, rows: Sequence[ScoredRow]) -> list[list[int]]:
        """Return the ids that the model reads for each row."""
        if self._renderer is not None:
            template = f"the template of RewardModel {self.path!r}"
            texts = self._renderer.texts([_chat(row) for row in rows], template)
        elif any(row.chat is not None for row in rows):
            raise RewardError(
                f"RewardModel {self.path!r}: the rows are chats, and its tokenizer has no "
                "chat_template; give a reward model with one, or plain prompts"
            )
        else:
            texts = [row.prompt + row.response for row in rows]
        encoded: Any = self._tokenizer(
            texts, add_special_tokens=self._renderer is None, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _chat(row: ScoredRow) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Return a row's messages with the response, and its tools."""
    answer = {"role": "assistant", "content": row.response}
    if row.chat is None:
        return [{"role": "user", "content": row.prompt}, answer], None
    tools = None if row.chat.tools is None else list(row.chat.tools)
    return [*(dict(message) for message in row.chat.messages), answer], tools


def _by(ids: Sequence[Sequence[int]]) -> Any:
    return lambda i: len(ids[i])
