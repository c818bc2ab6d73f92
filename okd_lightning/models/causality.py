"""Check that a model is causal: its output at a position depends on no later token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.causal_lm import head_inputs

_NUM_TOKENS = 4


@contextmanager
def attention_of_any_device(model: PreTrainedModel) -> Iterator[None]:
    """Within the context, a model on the CPU with a GPU-only attention uses eager attention.

    Flash attention does not run on a CPU, and flex attention has no gradient there.
    """
    attention = model.config._attn_implementation
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    if not is_on_cpu or attention in (None, "eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)


def own_precision(model: PreTrainedModel) -> AbstractContextManager[object]:
    """Within the context, ``model`` computes in the type of its weights, without autocast."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def embedding_gradient(model: PreTrainedModel, hidden_states: Callable[[], Tensor]) -> Tensor:
    """Return the gradient of some tokens' hidden states with respect to all tokens' embeddings.

    A masked token gets a gradient of exactly 0, in every number format.

    Args:
        model: Its weights, gradients and mode are not changed.
        hidden_states: Runs the model once and returns [..., hidden] of the chosen tokens.

    Returns:
        [batch, seq, hidden] the gradient with respect to the embeddings.
    """
    embedded: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(take)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), attention_of_any_device(model):
            hidden = hidden_states().float()
            direction = torch.arange(hidden.shape[-1], device=hidden.device).cos()
            scalar = (hidden * direction).sum()  # a plain sum is constant after some norms
            (gradient,) = torch.autograd.grad(scalar, embedded[:1])
    finally:
        handle.remove()
        model.train(was_training)
    return gradient


def check_causal(model: PreTrainedModel, option: str) -> None:
    """Refuse a model that attends to later tokens; BERT and similar models load without an error.

    For a causal model, the gradient of all positions but the last in the last token's embedding is
    exactly 0, in every number format. The check is one forward and backward pass over four tokens,
    on the device of the weights; it is skipped on the meta device.

    Args:
        model: A language model; its weights, gradients and mode are not changed.
        option: How the user named it, for messages.

    Raises:
        ModelError: The model is bidirectional, or cannot be run for the check.
    """
    embedding = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    if device.type == "meta":
        return
    ids = torch.arange(_NUM_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    try:
        gradient = embedding_gradient(model, lambda: head_inputs(model, ids, mask)[:, :-1])
    except AssertionError as error:  # Reformer has no gradient in eval mode, where dropout is off
        reason = str(error).strip().partition("\n")[0]
        raise ModelError(f"{option}: {type(model).__name__} cannot be used: {reason}") from error
    looked_ahead = gradient[:, -1]
    if (looked_ahead.isfinite() & (looked_ahead != 0)).any():
        raise ModelError(
            f"{option}: {type(model).__name__} is bidirectional: its prediction of a token depends "
            "on that token; expected a causal language model (an encoder such as BERT "
            "is one only with is_decoder: true in its config)"
        )
