"""Check of numbers of rows, prompts and tokens that are too small."""

from __future__ import annotations

from okd_lightning.errors import ConfigError


def check_counts(least: int, **counts: int | None) -> None:
    """Refuse settings of the data section below ``least``; None is ignored.

    Raises:
        ConfigError: A setting is too small; the message names the first one.
    """
    for name, value in counts.items():
        if value is not None and value < least:
            raise ConfigError(f"data.{name} must be at least {least}, got {value}")
