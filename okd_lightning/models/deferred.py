"""Models whose weights stay on disk until somebody asks for a part of them.

Within ``deferred_weights`` a model from a folder or hub id is built without its weights: they are
on torch's ``meta`` device. Whoever has cut the model into shards reads its own rows of each from
the safetensors files, so that the whole model is nowhere.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from okd_lightning.errors import ConfigError, ModelError

_INDEX = "model.safetensors.index.json"
_IS_DEFERRED: ContextVar[bool] = ContextVar("is_deferred", default=False)


@contextmanager
def deferred_weights() -> Iterator[None]:
    """Within it ``load_causal_lm`` leaves the weights of folders and hub ids on disk."""
    token = _IS_DEFERRED.set(True)
    try:
        yield
    finally:
        _IS_DEFERRED.reset(token)


def is_deferred() -> bool:
    """Whether weights are to stay on disk."""
    return _IS_DEFERRED.get()


def causal_lm_without_weights(
    source: str, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """The architecture with its parameters on ``meta``; buffers are real.

    ``weight_files(model)`` finds what belongs in them.
    """
    with _parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.deferred_from = source
    return model.eval()


def weight_files(model: nn.Module) -> WeightFiles | None:
    """Where the weights of such a model are; None where it has them."""
    source = getattr(model, "deferred_from", None)
    return None if source is None else WeightFiles(source)


class WeightFiles:
    """The safetensors files of one model, read by rows.

    Args:
        source: A folder, or a hub id, which is downloaded.

    Raises:
        ModelError: It has no safetensors files.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        folder = Path(source) if Path(source).is_dir() else _downloaded(source)
        index = folder / _INDEX
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: folder / file for name, file in names.items()}
            return
        self._files = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        if not self._files:
            raise ModelError(f"{source!r} holds no safetensors files")

    def rows(self, names: Sequence[str], start: int, end: int) -> Tensor:
        """[end - start, ...] rows of the weight that is stored under one of ``names``.

        Raises:
            ModelError: It is stored under none of them.
        """
        found = next((name for name in names if name in self._files), None)
        if found is None:
            raise ModelError(
                f"{self.source!r} stores no {names[0]}: weights that transformers renames or joins "
                "while it loads cannot be read by rows; use loading: every_rank"
            )
        with safe_open(self._files[found], framework="pt") as opened:
            part: Tensor = opened.get_slice(found)[start:end]
        return part


def _downloaded(source: str) -> Path:
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", _INDEX]))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(f"{source!r}: its weights cannot be reached: {error}") from error


@contextmanager
def stand_ins(model: nn.Module, option: str) -> Iterator[None]:
    """Within it a base without weights has NaN for all of them, so that adapters can be put on it.

    PEFT puts its own weights on the base's device, which must not be ``meta``: they are drawn here
    and now. The stand-ins take no memory: one number a weight, read as often as it has elements.

    Raises:
        ConfigError: An adapter that is made out of the base's weights, such as DoRA or PiSSA.
    """
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta
    ]
    nothing = {
        id(p): nn.Parameter(
            p.new_full((), torch.nan, device="cpu").expand(p.shape), p.requires_grad
        )
        for _, _, p in places
    }
    for module, name, parameter in places:
        module._parameters[name] = nothing[id(parameter)]
    refusal = (
        "is made out of the base's weights, which loading: by_shard leaves on disk; use loading: "
        "every_rank, or plain LoRA"
    )
    try:
        yield
    except torch.linalg.LinAlgError as error:  # a decomposition of the stand-ins
        raise ConfigError(f"{option}: this adapter {refusal}") from error
    finally:
        for module, name, parameter in places:
            parameter.requires_grad_(nothing[id(parameter)].requires_grad)
            module._parameters[name] = parameter
    made_of_base = [
        name
        for name, parameter in model.named_parameters()
        if places and parameter.requires_grad and not parameter.is_meta and parameter.isnan().any()
    ]
    if made_of_base:
        raise ConfigError(f"{option}: {made_of_base[0]} {refusal}")


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module gets goes to ``meta``; not buffers, which are computed."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
