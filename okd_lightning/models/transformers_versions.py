"""Differences between the supported releases of transformers (5.19 to 5.23).

Owns names that only some releases have. No other file depends on the release.
"""

from __future__ import annotations

from transformers import cache_utils

STATELESS_LAYERS: tuple[type, ...] = (
    (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
)
"""Cache layers without content: of blocks without attention, or that share another block's keys and
values. 5.23 has a class for them; before, the former are ``LinearAttentionLayer``, and the latter
have no cache layer."""
