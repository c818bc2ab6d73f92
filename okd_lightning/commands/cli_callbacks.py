"""Merging of ``trainer.callbacks``: the last given callback of each kind is used.

``--trainer.callbacks+=X`` adds to a config's callbacks. Where the config (a checkpoint's, at a
resume) has X already, the typed one replaces it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info

from okd_lightning.commands.given_options import options_of, parsed
from okd_lightning.errors import ConfigError

_ADD = "trainer.callbacks+"


def replace_retyped(
    configs: Sequence[tuple[str, dict[str, Any]]], arguments: Sequence[str]
) -> None:
    """Remove callbacks from configs that are typed again.

    Two callbacks of one class with different names (``name``) are different callbacks.

    Args:
        configs: Each with its name for messages; changed in place.
        arguments: The typed words.
    """
    typed = _typed(arguments)
    for origin, config in configs:
        section = config.get("trainer")
        trainer: dict[str, Any] = section if isinstance(section, dict) else {}
        for key in ("callbacks", _ADD.rpartition(".")[2]):
            given = trainer.get(key)
            if not given:
                continue
            entries = given if isinstance(given, list) else [given]
            kept = [entry for entry in entries if _identity(entry) not in typed]
            if len(kept) < len(entries):
                names = ", ".join(_identity(e)[0] for e in entries if e not in kept)
                rank_zero_info(f"{names} of {origin}: replaced by what was typed")
                trainer[key] = kept


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse two callbacks whose states in a checkpoint would have one name.

    Raises:
        ConfigError: Two callbacks have one state key; the message names their class.
    """
    stateful = [c for c in callbacks if type(c).state_dict is not Callback.state_dict]
    for key, count in Counter(callback.state_key for callback in stateful).items():
        if count > 1:
            name = next(type(c).__name__ for c in stateful if c.state_key == key)
            raise ConfigError(
                f"trainer.callbacks holds {count} {name} that a checkpoint could not distinguish: "
                "leave one out, or give them different names or settings"
            )


def _typed(arguments: Sequence[str]) -> set[tuple[str, Any]]:
    """Return class and name of every callback that is added on the command line."""
    found: list[tuple[str, Any]] = []
    for option, text in options_of(arguments):
        if option == _ADD:
            found.append(_identity(parsed(text)))
        elif found and option in ("trainer.callbacks.name", "trainer.callbacks.init_args.name"):
            found[-1] = (found[-1][0], text)
    return set(found)


def _identity(entry: Any) -> tuple[str, Any]:
    """Return the class of an entry, without its module, and the entry's ``name``."""
    if not isinstance(entry, Mapping):
        return str(entry).rpartition(".")[2], None
    path = str(entry.get("class_path", "")).rpartition(".")[2]
    return path, (entry.get("init_args") or {}).get("name")
