"""Whether a model is causal: what it says at a position may depend on earlier tokens alone."""

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
    """A model on the CPU takes its eager attention within, where its own is made for a GPU.

    Flash attention and its kin do not run on a CPU, and flex attention has no gradient there.
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
    """Within it ``model`` computes in the number format of its weights, whatever autocast is on."""
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def embedding_gradient(model: PreTrainedModel, hidden_states: Callable[[], Tensor]) -> Tensor:
    """How what the model makes of some tokens depends on the embedding of every token.

    A token that is masked away gets a gradient of exactly 0, in every number format.

    Args:
        model: Its weights, gradients and mode stay as they are.
        hidden_states: Runs it once and returns [..., hidden] of the tokens that are asked about.

    Returns:
        [batch, seq, hidden] the gradient in the embeddings of that run.
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
            scalar = (hidden * direction).sum()  # not a plain sum: that may be a norm's null space
            (gradient,) = torch.autograd.grad(scalar, embedded[:1])
    finally:
        handle.remove()
        model.train(was_training)
    return gradient


def check_causal(model: PreTrainedModel, option: str) -> None:
    """Refuse a model that looks at later tokens, as BERT and its kin load without a word.

    The gradient of all but the last position in the last token's embedding is exactly 0 for a
    causal model, in every number format. One pass over four tokens forward and back, on the device
    where the weights are; left out where they are on the meta device.

    Args:
        model: A language model; its weights, gradients and mode stay as they are.
        option: How the user named it, for messages.

    Raises:
        ModelError: It is bidirectional, or refuses to be run so.
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
            f"{option}: {type(model).__name__} is bidirectional: what it says about a token "
            "depends on that token; expected a causal language model (an encoder such as BERT "
            "is one only with is_decoder: true in its config)"
        )
