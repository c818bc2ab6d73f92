"""Whether a model is causal: what it says at a position may depend on earlier tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from okd_lightning.errors import ModelError
from okd_lightning.models.causal_lm import head_inputs

_NUM_TOKENS = 4


def check_causal(model: PreTrainedModel, option: str) -> None:
    """Refuse a model that looks at later tokens, as BERT and its kin load without a word.

    The gradient of all but the last position in the last token's embedding is exactly 0 for a
    causal model, in every number format. One pass over four tokens forward and back, on the device
    where the weights are; left out where they are on the meta device, and for flash attention,
    which does not run on the CPU.

    Args:
        model: A language model; its weights, gradients and mode stay as they are.
        option: How the user named it, for messages.

    Raises:
        ModelError: It is bidirectional.
    """
    embedding = model.get_input_embeddings()
    device = next(embedding.parameters()).device
    attention = getattr(model.config, "_attn_implementation", None) or ""
    if device.type == "meta" or "flash" in attention:
        return
    embedded: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.requires_grad_())
        return embedded[0]

    ids = torch.arange(_NUM_TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
    handle, was_training = embedding.register_forward_hook(take), model.training
    model.eval()
    try:
        with torch.enable_grad():
            hidden = head_inputs(model, ids, torch.ones_like(ids))
            earlier = hidden[:, :-1].float()
            direction = torch.arange(earlier.shape[-1], device=device).cos()  # no norm's null space
            (gradient,) = torch.autograd.grad((earlier * direction).sum(), embedded[:1])
    finally:
        handle.remove()
        model.train(was_training)
    looked_ahead = gradient[:, -1]
    if (looked_ahead.isfinite() & (looked_ahead != 0)).any():
        raise ModelError(
            f"{option}: {type(model).__name__} is bidirectional: what it says about a token "
            "depends on that token; expected a causal language model (an encoder such as BERT "
            "is one only with is_decoder: true in its config)"
        )
