"""Names of weights that were saved from a wrapper around the model: DDP, torch.compile, PEFT.

Owns the cause and the remedy in one line. Renames nothing: other programs that read the folder
(vLLM, transformers) would not rename either.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_WITHIN = re.compile(
    r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer"
    r"|original_module)\."
)
"""Parts that wrappers of single layers insert anywhere in a name."""

_MAKERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "torch's activation checkpointing",
}
_PEFT = ("base_layer", "original_module", "base_model")


def wrapper_advice(stored: Iterable[str], missing: Collection[str]) -> str | None:
    """Return why missing weights are stored under longer names, and what to do.

    Args:
        stored: Names in the files.
        missing: Names that the model expects; alternatives of one weight may be among them.

    Returns:
        None unless at least half of the stored names are expected ones with added parts.
    """
    names, wanted = sorted(stored), frozenset(missing)
    found = {name: parts for name in names if (parts := _added_parts(name, wanted))}
    if not found or 2 * len(found) < min(len(names), len(wanted)):
        return None
    example = min(found)
    parts = list(dict.fromkeys(part for name in found for part in found[name]))
    start = f"the files have names such as {example}, in which "
    if any(part in _PEFT for part in parts):
        return (
            f"{start}{_listed(parts)} of a PEFT model around this one: save it by "
            "peft_model.merge_and_unload().save_pretrained(FOLDER)"
        )
    if any(part not in _MAKERS for part in parts):
        return (
            f"{start}{_listed(parts)} of a module around the model: save the model inside it by "
            "its own save_pretrained(FOLDER)"
        )
    makers = " and ".join(_MAKERS[part] for part in parts)
    return (
        f"{start}{_listed(parts)} of {makers}: remove {'it' if len(parts) == 1 else 'them'} from "
        "the names in the files, or save the model without this wrapper"
    )


def _added_parts(name: str, wanted: Collection[str]) -> list[str]:
    """Return the parts without which ``name`` is one of ``wanted``; empty if there are none."""
    within = _WITHIN.findall(name)
    rest = _WITHIN.sub("", name).split(".")
    for start in range(len(rest)):
        if ".".join(rest[start:]) in wanted:
            return [*rest[:start], *within]
    return []


def _listed(parts: list[str]) -> str:
    shown = " and ".join(f"{part + '.'!r}" for part in parts)
    return f"{shown} {'is' if len(parts) == 1 else 'are'}"
