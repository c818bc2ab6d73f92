"""Key-value cache whose rows can join and leave while it grows, and model passes that use it.

Uses transformers' classes, except for the storage of attention layers: the dynamic layer copies all
its content for each token, and the static layer attends to all of its columns. Here spare columns
are allocated ahead and written in place; the model sees only the filled ones. The attention mask,
which transformers builds from the config, implements sliding windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from okd_lightning.models.causal_lm import last_logits, named_arguments

_SPARE_COLUMNS = 64

_STATELESS_LAYERS: tuple[type, ...] = (
    (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
)
"""Cache layers without content: of blocks without attention, or that share another block's keys and
values. transformers 5.23 has a class for them; before, the former are ``LinearAttentionLayer``, and
the latter have no cache layer."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer: views of buffers with spare columns after the filled ones."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[Tensor, Tensor] = ()  # type: ignore[assignment]  # none before the first

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append [rows, heads, tokens, dim] and return all keys and values, like transformers."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._settle(key_states, value_states, spare=0)
            return self.keys, self.values
        filled = self.keys.shape[-2]
        width = filled + key_states.shape[-2]
        if width > self._rooms[0].shape[-2]:
            self._settle(self.keys, self.values, spare=width - filled + _SPARE_COLUMNS)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, filled:width] = states
        self._show(width)
        return self.keys, self.values

    def rearrange(
        self, keep: Tensor, num_leading: int, joining: Sequence[tuple[RoomyLayer, Tensor]]
    ) -> None:
        """Drop rows and leading columns, and add rows of other layers, aligned on the right.

        Args:
            keep: [any] rows that stay.
            num_leading: Leading columns that none of these rows attends to; dropped.
            joining: Other layers, each with its rows [any] that join.
        """
        staying = [] if not self.is_initialized else [(self, keep, num_leading)]
        parts = [*staying, *((layer, rows, 0) for layer, rows in joining)]
        if not self.is_initialized:
            self.lazy_initialization(parts[0][0].keys, parts[0][0].values)
        self._rooms = (
            _assembled([(layer.keys, rows, lead) for layer, rows, lead in parts]),
            _assembled([(layer.values, rows, lead) for layer, rows, lead in parts]),
        )
        width = max(layer.keys.shape[-2] - lead for layer, _, lead in parts)
        self._show(width)

    def _show(self, width: int) -> None:
        self.keys, self.values = (room[:, :, :width] for room in self._rooms)

    def _settle(self, keys: Tensor, values: Tensor, spare: int) -> None:
        width = keys.shape[-2]
        self._rooms = _with_spare(keys, spare), _with_spare(values, spare)
        self._show(width)


def _with_spare(states: Tensor, spare: int) -> Tensor:
    if not spare:
        return states
    rows, heads, width, dim = states.shape
    room = states.new_empty(rows, heads, width + spare, dim)
    room[:, :, :width] = states
    return room


def _assembled(parts: Sequence[tuple[Tensor, Tensor, int]]) -> Tensor:
    """Join rows to [rows, heads, columns, dim], zeros on the left, spare columns on the right."""
    width = max(states.shape[-2] - lead for states, _, lead in parts)
    _, heads, _, dim = parts[0][0].shape
    num_rows = sum(len(rows) for _, rows, _ in parts)
    room = parts[0][0].new_empty(num_rows, heads, width + _SPARE_COLUMNS, dim)
    first = 0
    for states, rows, lead in parts:
        target = room[first : first + len(rows)]
        left = width - (states.shape[-2] - lead)
        target[:, :, :left] = 0  # never attended to, but must be finite
        target[:, :, left:width] = states[:, :, lead:].index_select(0, rows)
        first += len(rows)
    return room


def is_rearrangeable(model: PreTrainedModel) -> bool:
    """Return whether a model's cache consists of keys and values by position only.

    The states of state-space and other recurrent models allow no rows to join or leave, and no
    padding on the left.
    """
    if getattr(model, "_is_stateful", False):
        return False
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None) is not None:
        return False
    plain = (DynamicLayer, DynamicSlidingWindowLayer, *_STATELESS_LAYERS)
    return all(type(layer) in plain for layer in DynamicCache(config=model.config).layers)


def empty_cache(model: PreTrainedModel, is_roomy: bool) -> DynamicCache:
    """Return an empty cache for a batch of any size.

    Args:
        model: The model that fills it.
        is_roomy: Whether its rows can be rearranged; see ``is_rearrangeable``.
    """
    cache = DynamicCache(config=model.config)
    if is_roomy:
        cache.layers = [
            layer if isinstance(layer, _STATELESS_LAYERS) else RoomyLayer()
            for layer in cache.layers
        ]
    return cache


def rearrange(
    cache: DynamicCache,
    keep: Tensor,
    num_leading: int,
    joining: Sequence[tuple[DynamicCache, Tensor]],
) -> None:
    """Drop rows and leading columns of a roomy cache, and add rows of other caches.

    Args:
        cache: The cache that is changed.
        keep: [any] rows that stay.
        num_leading: Leading columns that none of these rows attends to; dropped.
        joining: Other caches, each with its rows [any] that join.
    """
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, RoomyLayer):
            layer.rearrange(
                keep, num_leading, [(cast(RoomyLayer, c.layers[i]), rows) for c, rows in joining]
            )


class CachedModel:
    """A causal LM that continues from a cache.

    The names of its arguments are read once: a step is one call of the model.

    Args:
        model: A causal LM, not wrapped.

    Attributes:
        has_cache: Whether its forward pass has an argument for a cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._names = named_arguments(model)
        found = [name for name in ("past_key_values", "cache_params") if name in self._names]
        self.has_cache = bool(found)
        self._cache_name = (*found, "past_key_values")[0]

    def logits(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        cache: DynamicCache,
        images: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return [rows, table] logits for the token after ``ids``, which are appended to ``cache``.

        Args:
            ids: [rows, tokens].
            positions: [rows, tokens] from each row's first token; models without this argument
                count positions themselves, which ``memory_of`` has checked.
            mask: [rows, columns] True on each row's own columns of the cache, these tokens
                included; None if all rows fill all columns.
            cache: A cache of this model; see ``empty_cache``.
            images: Arguments for the images of ``ids``; see ``multimodal.image_arguments``.

        Raises:
            ModelError: The model has no argument for the cache, or for the given mask.
        """
        needed: dict[str, Any] = {"input_ids": ids, self._cache_name: cache, **(images or {})}
        if mask is not None:
            needed["attention_mask"] = mask
        wanted = {"position_ids": positions, "use_cache": True}
        if ids.shape[1] > 1 or not self._names.issuperset(needed):
            return last_logits(self._model, needed, wanted)
        # the output of one token per row is that of its last one: no hook has to select it
        known = {name: value for name, value in wanted.items() if name in self._names}
        logits: Tensor = self._model(**needed, **known).logits
        return logits[:, -1]
