"""Differences between the supported releases of transformers (5.19 to 5.23), in one place.

Owns names that only some releases have. Nothing else asks which release is installed.
"""

from __future__ import annotations

from transformers import cache_utils

STATELESS_LAYERS: tuple[type, ...] = (
    (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
)
"""Cache layers that keep nothing: of blocks without attention, or that share another's keys and
values. 5.23 has a class for them; before, the former are ``LinearAttentionLayer``, and the latter
have no cache layer."""
