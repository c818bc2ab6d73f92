"""Options that name a class, and settings of that class: ``--method KD --method.temperature 2``.

The parser reads from left to right and assigns a setting to the class named before it. Here a
class that is named later is moved before its settings, and a setting without any class is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from okd_lightning.errors import UsageError

_EXAMPLES = {
    "--method": "--method KD",
    "--model.student_adapter": "--model.student_adapter LoraConfig",
    "--model.engine": "--model.engine VLLMServer",
    "--model.optimizer": "--model.optimizer torch.optim.SGD",
    "--model.lr_scheduler": "--model.lr_scheduler torch.optim.lr_scheduler.StepLR",
    "--model.teacher": "--model.teacher FrozenSelf",
    "--trainer.logger": "--trainer.logger WandbLogger",
    "--trainer.callbacks": "--trainer.callbacks+=LastCheckpoint",
    "--trainer.profiler": "--trainer.profiler SimpleProfiler",
    "--trainer.strategy": "--trainer.strategy fsdp2",
}
"""Options that name a class, each with an example."""

_MAPPINGS = ("--model.teacher",)
"""Options that also take a mapping, whose keys are typed like settings."""


def classes_first(words: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the typed words with every class before its settings.

    An option that is typed several times, as for a list of classes, stays where it is.

    Args:
        words: The words after the command, without configs.
        configs: The user's configs, and a checkpoint's.

    Raises:
        UsageError: A setting of a class that neither the words nor a config name.
    """
    ordered = list(words)
    for option in (*_EXAMPLES, *_nested(words)):
        named = [i for i, word in enumerate(ordered) if _names(word, option)]
        first = next((i for i, w in enumerate(ordered) if _is_setting(w, option)), None)
        if first is None:
            continue
        if len(named) == 1 and first < named[0]:
            (place,) = named
            end = place + (1 if "=" in ordered[place] else 2)
            ordered[first:end] = [*ordered[place:end], *ordered[first:place]]
        elif option in _EXAMPLES and not named and not _may_lack_class(option, configs):
            setting = ordered[first].partition("=")[0]
            raise UsageError(
                f"{setting} is a setting of a class, and none is named: give the class before it, "
                f"such as {_EXAMPLES[option]}"
            )
    return ordered


def _nested(words: Sequence[str]) -> list[str]:
    """Return the typed settings of classes that have settings themselves, the outer ones first."""
    typed = dict.fromkeys(word.partition("=")[0].removesuffix("+") for word in words)
    inner = (o for o in typed if any(o.startswith(f"{outer}.") for outer in _EXAMPLES))
    return sorted((o for o in inner if any(_is_setting(w, o) for w in words)), key=len)


def _may_lack_class(option: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    return option in _MAPPINGS or any(_has(config, option) for config in configs)


def _names(word: str, option: str) -> bool:
    return word.partition("=")[0] in (option, f"{option}+", f"{option}.class_path")


def _is_setting(word: str, option: str) -> bool:
    name = word.partition("=")[0]
    own = (f"{option}.class_path", f"{option}.help")
    return name.startswith(f"{option}.") and name not in own


def _has(config: Mapping[str, Any], option: str) -> bool:
    """Return whether a config has a value for an option."""
    value: Any = config
    for key in option[2:].split("."):
        found = value if isinstance(value, Mapping) else {}
        value = found.get(key) or found.get(f"{key}+")
    return bool(value)
