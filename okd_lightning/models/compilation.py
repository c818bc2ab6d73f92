"""torch.compile on a model's repeated blocks, one graph for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError

_BACKEND: str | Callable[..., Any] = "inductor"


def compile_blocks(*models: PreTrainedModel | None) -> None:
    """Compile every block of some models in place, for rows of any length.

    Blocks are the modules that transformers never splits over devices (``_no_split_modules``).
    Embedding, head (run by the loss layer) and parameter names are not changed.

    Args:
        *models: Causal LMs; None is skipped.

    Raises:
        ConfigError: An architecture names no blocks.
    """
    for model in models:
        if model is None:
            continue
        names = set(model._no_split_modules or ())
        blocks = [module for module in model.modules() if type(module).__name__ in names]
        if not blocks:
            raise ConfigError(
                f"--model.compile_blocks: {type(model).__name__} does not name its blocks "
                "(_no_split_modules is empty); leave the option out for this pair"
            )
        for block in blocks:
            block.compile(dynamic=True, backend=_BACKEND)
