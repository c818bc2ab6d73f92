"""A causal LM as (hidden states, head): the one way in which this library runs a model.

The loss layer projects only the positions that carry loss, so a forward pass stops at the head's
input. The hidden states are taken there by a hook on the head of the *whole* model, which is right
for every wrapper (adapters, prompt learning, sharding), where calling a backbone is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.models.vocabulary import Vocabulary


@dataclass(frozen=True)
class LMHead:
    """From hidden states to logits over the valid ids: module, scale, soft-cap, vocabulary.

    Attributes:
        module: The model's own output layer (an adapter on it, or a bias, takes part).
        vocabulary: What the logits are cut to.
        scale: Factor on the logits (Cohere's ``logit_scale``, Falcon-H1's
            ``lm_head_multiplier``, one over Granite's ``logits_scaling``).
        softcap: Gemma's ``final_logit_softcapping`` c: logits become c·tanh(logits/c).
    """

    module: nn.Module
    vocabulary: Vocabulary
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, vocabulary: Vocabulary) -> LMHead:
        """The head of a model, with the transforms that its config names."""
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(
            module=model.get_output_embeddings(),
            vocabulary=vocabulary,
            scale=_logit_scale(config),
            softcap=softcap or getattr(config, "logits_soft_cap", None),
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., hidden] → [..., vocab] logits, float32 or the input's wider type."""
        return self.finish(self.module(hidden))

    def finish(self, raw: Tensor) -> Tensor:
        """Logits over the valid ids from what ``module`` gives."""
        logits = self.vocabulary.cut(self.transform(raw))
        return logits if logits.dtype == torch.float64 else logits.float()

    def transform(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap raw logits as the model itself does."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def _logit_scale(config: PretrainedConfig) -> float:
    factor = getattr(config, "logit_scale", None) or 1.0
    factor *= getattr(config, "lm_head_multiplier", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    if config.model_type == "hyperclovax":  # Granite's option as a factor
        return factor * scaling
    if config.model_type == "minicpm3":  # applied before the head
        return factor
    return factor / scaling


def head_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run ``model`` over right-padded rows and return what its head would have read.

    Args:
        model: A causal LM, wrapped or not.
        input_ids: [batch, seq].
        attention_mask: [batch, seq] True on real tokens.

    Returns:
        [batch, seq, hidden]; gradient flows to the model's parameters.
    """
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        taken.append(args[0])
        return (args[0][:, :1],)

    handle = model.get_output_embeddings().register_forward_pre_hook(take)
    try:
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        handle.remove()
    (hidden,) = taken
    return hidden[:, -input_ids.shape[1] :]  # prompt learning puts virtual tokens in front


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model was made for, where its config says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_positions(
    student: PretrainedConfig | None,
    teacher: PretrainedConfig | None,
    num_tokens: int,
    teacher_tokens: int | None = None,
) -> None:
    """Refuse sequences that are longer than a model was made for.

    Args:
        student: The student's config, if there is one by now.
        teacher: The teacher's, likewise.
        num_tokens: The longest that the student reads.
        teacher_tokens: The longest that the teacher reads; None for the same.

    Raises:
        ConfigError: Naming the model and both lengths.
    """
    own = teacher_tokens or num_tokens
    for role, config, tokens in (("student", student, num_tokens), ("teacher", teacher, own)):
        limit = max_positions(config) if config is not None else None
        if limit is not None and tokens > limit:
            kind = "teacher prompt" if role == "teacher" and own != num_tokens else "prompt"
            raise ConfigError(
                f"{kind} and response together take up to {tokens} tokens, but the {role} was "
                f"made for {limit}; lower --data.max_response_length or "
                f"--data.max_{kind.replace(' ', '_')}_length"
            )
