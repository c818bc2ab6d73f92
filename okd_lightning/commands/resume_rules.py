"""Effect of options at a resume: applied, refused, or only possible in a new run.

``docs/state.md`` shows the same table. An option counts as given where it differs from the
checkpoint's config, whether it was typed or is in a config file. Options that change the data (the
prompts and their order) are compared by the data itself, in the loader, and from Python as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from okd_lightning.commands.given_options import flattened
from okd_lightning.errors import CheckpointError

Verdict: TypeAlias = Literal["acts", "refused", "new run"]

_WEIGHTS = "the student's weights come from the checkpoint"
_STATE = "its state is restored from the checkpoint"
_STREAMS = "the random streams come from the checkpoint"
_TRAINED = "the checkpoint's weights belong to the parts trained so far"

REFUSED: Mapping[str, tuple[Verdict, str]] = {
    "seed_everything": ("refused", _STREAMS),
    "model.student": ("refused", _WEIGHTS),
    "model.student_adapter": ("new run", _TRAINED),
    "model.freeze_vision": ("new run", _TRAINED),
    "model.optimizer": ("refused", _STATE),
    "model.lr_scheduler": ("refused", _STATE),
    "method": ("new run", _TRAINED),
    "method.online_module": ("new run", _TRAINED),
}
"""Option → verdict and reason; of model.optimizer and method the class, not its settings."""

_ABSENT = {"model.freeze_vision": True}
"""Option that checkpoints of earlier versions lack → its value there."""

_CLASS_ONLY = ("model.optimizer", "method")

_BY_MODULE = ("method",)
"""Refused by the module, which knows them in a run from Python too."""

BY_CONTENT = (
    "data.train",
    "data.batch_size",
    "data.global_batch_size",
    "data.prompts_per_epoch",
    "data.prompts_per_rollout",
    "data.samples_per_prompt",
    "data.seed",
    "trainer.accumulate_grad_batches",
    "model.normalization",
    "model.end_tokens",
)
"""Options that are refused where they change which prompts an optimizer step has (by the loader),
or the objective: the divisor of rows that the student samples, the end ids (by the module)."""


def verdict(option: str) -> Verdict:
    """Return the effect of an option that is given at a resume."""
    rule = _rule(option)
    return "refused" if option in BY_CONTENT else rule[0] if rule else "acts"


def check_resume(saved: Mapping[str, Any], own: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse options that could have no effect at a resume.

    Args:
        saved: The checkpoint's config.
        own: This run's config.
        checkpoint: For messages.

    Raises:
        CheckpointError: There is such an option; the message names the first, both values, and what
            to do.
    """
    before, now = flattened(saved), flattened(own)
    for option in sorted(before.keys() | now.keys()):
        old, new = before.get(option, _ABSENT.get(option)), now.get(option)
        rule = _rule(option)
        if rule is None or option in _BY_MODULE or _is_same(old, new) or _is_moved(option, old):
            continue
        advice = f"leave it as it was, {_shown(old)}"
        if rule[0] == "new run" or option.startswith("model."):
            advice += (
                f"; or start a new run from its student: okd-lightning export --ckpt_path "
                f"{checkpoint} --out FOLDER, and --model.student FOLDER"
            )
        raise CheckpointError(
            f"--{option} {_shown(new)} would have no effect at a resume: {rule[1]}; {advice}"
        )


def _rule(option: str) -> tuple[Verdict, str] | None:
    parts = option.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in REFUSED:
            is_setting = length < len(parts) and name in _CLASS_ONLY
            return None if is_setting else REFUSED[name]
    return None


def _is_same(old: Any, new: Any) -> bool:
    """Compare values: equal, classes by short or full name, or one folder under two paths."""
    if isinstance(old, str) and isinstance(new, str):
        is_class = "." in old + new and "/" not in old + new
        names = (old.rpartition(".")[2], new.rpartition(".")[2]) if is_class else (old, new)
        is_path = Path(old).exists() and Path(new).exists()
        return names[0] == names[1] or (is_path and Path(old).samefile(new))
    return bool(old == new)


def _is_moved(option: str, old: Any) -> bool:
    """Return whether a model's folder has moved; it is then searched elsewhere."""
    return option == "model.student" and isinstance(old, str) and not Path(old).exists()


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
