"""Warnings of options that have no effect in a run, in one line each.

One function per rule: it returns the reason why its options have no effect, or None where they have
one. Options that contradict a run are refused where they enter, not here. Only the user's choices
count: options typed or set in the user's own config (``chosen_options``), from Python arguments
that are not the defaults. A resumed run gives no warnings; ``docs/state.md`` lists the effect of
options there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import lightning
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel

from okd_lightning.data import RolloutDataModule
from okd_lightning.data.token_cache import FEWEST_ROWS
from okd_lightning.engines import Sampling
from okd_lightning.models import reads_images
from okd_lightning.records.batches import Source
from okd_lightning.rollouts import plan_for
from okd_lightning.training.distilled_run import DistilledRun, distilled_run
from okd_lightning.training.lightning_privates import uses_distributed_sampler

_LIBRARIES = ("okd_lightning", "lightning")


@dataclass(frozen=True)
class _Run:
    """A run whose methods are registered and whose data is read.

    Attributes:
        trainer: The run's Trainer.
        module: The run's module, with its terms.
        data: The run's data module.
        stage: "fit", "validate", "test" or "predict".
    """

    trainer: lightning.Trainer
    module: DistilledRun
    data: RolloutDataModule
    stage: str

    @property
    def sources(self) -> frozenset[Source]:
        """Sources of the rows that are trained on."""
        is_training = self.stage == "fit" and bool(self.module.terms)
        return plan_for(self.module.terms).sources if is_training else frozenset()

    @property
    def methods(self) -> str:
        """The run's methods, for messages."""
        return " and ".join(term.kind for term in self.module.terms)

    @property
    def is_measured(self) -> bool:
        """True where there is data to measure on."""
        part = {"fit": "val", "validate": "val"}.get(self.stage, self.stage)
        return self.data.sources[part] is not None

    @property
    def student_generates(self) -> bool:
        """True where the student's engine is used, or may be by a user's callback."""
        measures = self.is_measured and bool(self.data.val_rollouts)
        is_used = "student" in self.sources or measures or self.stage == "predict"
        return is_used or self.has_generating_callbacks

    @property
    def has_generating_callbacks(self) -> bool:
        """True where a callback generates responses, or is not known not to."""
        return any(
            getattr(callback, "generates", False)
            or type(callback).__module__.partition(".")[0] not in _LIBRARIES
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
        )


Rule: TypeAlias = Callable[[_Run], str | None]
"""Returns the reason why an option has no effect in a run; None where it has one."""


def _sampling(run: _Run) -> str | None:
    if run.stage in ("validate", "test"):
        return "on-policy measures always sample from the student itself, at temperature 1"
    if run.stage == "predict" or run.sources - {"dataset"}:
        return None
    return f"{run.methods} trains on dataset responses, and validation samples at temperature 1"


def _prompts_per_rollout(run: _Run) -> str | None:
    if run.stage != "fit":
        return "nothing is trained"
    is_idle = run.sources == {"dataset"}
    return f"{run.methods} trains on dataset responses, none are generated" if is_idle else None


def _rollout_lag(run: _Run) -> str | None:
    if run.stage != "fit":
        return "nothing is trained"
    is_idle = "student" not in run.sources
    return f"{run.methods} trains on no responses of the student" if is_idle else None


def _max_turns(run: _Run) -> str | None:
    is_used = run.student_generates or run.sources - {"dataset"}
    return None if is_used else "no responses are generated"


def _engine(run: _Run) -> str | None:
    return None if run.student_generates else "the student generates no responses"


def _validation(run: _Run) -> str | None:
    if run.stage == "predict":
        return "predict measures nothing"
    return None if run.is_measured else "there is no validation data; give --data.val"


def _subset(run: _Run) -> str | None:
    given = [source for source in run.data.sources.values() if source is not None]
    return None if any(map(_has_splits, given)) else "only data sets of the hub have configurations"


def _split(part: str, run: _Run) -> str | None:
    parts = ("test", "predict") if part == "test" else (part,)
    given = [run.data.sources[name] for name in parts if run.data.sources[name] is not None]
    if not given:
        return f"there is no --data.{part}"
    if any(map(_has_splits, given)):
        return None
    return f"--data.{part} is a file or rows in memory, which have no splits"


def _has_splits(source: Any) -> bool:
    """Return whether a dataset may have splits and subsets: a folder, hub id or DatasetDict."""
    if isinstance(source, (str, Path)):
        return not Path(source).expanduser().is_file()
    return isinstance(source, Mapping)


def _token_cache(run: _Run) -> str | None:
    sizes = [len(found) + found.num_skipped for found in run.data._examples.values()]
    is_small = bool(sizes) and max(sizes) < FEWEST_ROWS
    return f"data sets of fewer than {FEWEST_ROWS} rows are not cached" if is_small else None


def _clip_algorithm(run: _Run) -> str | None:
    own = run.module.pair.teacher.online_module
    clips = run.trainer.gradient_clip_val or (own is not None and own.clip_norm)
    return None if clips else "no gradients are clipped; give --trainer.gradient_clip_val"


def _distributed_sampler(run: _Run) -> str | None:
    return "the data module gives every rank its rows, and Lightning adds no sampler"


def _teacher_dtype(run: _Run) -> str | None:
    return None if run.module.pair.teacher.exists else "there is no teacher"


def _attention(run: _Run) -> str | None:
    pair = run.module.pair
    models = (pair.student_source, *pair.teacher.own_sources)
    is_loaded = all(isinstance(model, PreTrainedModel) for model in models)
    return "models in memory keep their attention" if is_loaded else None


def _freeze_vision(run: _Run) -> str | None:
    student = run.module.student
    has_tower = student is None or reads_images(student.config)
    return None if has_tower else "the student has no vision tower"


def _images_column(run: _Run) -> str | None:
    if not run.module.pair.images.is_text or run.data.columns.images is None:
        return None
    return "no model of this run reads images"


RULES: Mapping[str, Rule] = {
    "data.sampling": _sampling,
    "data.prompts_per_rollout": _prompts_per_rollout,
    "data.rollout_lag": _rollout_lag,
    "data.max_turns": _max_turns,
    "data.val_rollouts": _validation,
    "data.subset": _subset,
    "data.train_split": partial(_split, "train"),
    "data.val_split": partial(_split, "val"),
    "data.test_split": partial(_split, "test"),
    "data.token_cache": _token_cache,
    "data.images_column": _images_column,
    "model.engine": _engine,
    "model.teacher_dtype": _teacher_dtype,
    "model.attn_implementation": _attention,
    "model.freeze_vision": _freeze_vision,
    "trainer.gradient_clip_algorithm": _clip_algorithm,
    "trainer.use_distributed_sampler": _distributed_sampler,
    "trainer.val_check_interval": _validation,
    "trainer.check_val_every_n_epoch": _validation,
    "trainer.limit_val_batches": _validation,
}
"""Option, with all settings below it → the rule that decides whether it has an effect."""


def warn_of_idle_options(
    trainer: lightning.Trainer, module: lightning.LightningModule, stage: str
) -> None:
    """Warn of each option that the user chose and that has no effect in this run.

    Args:
        trainer: The Trainer, with its data module.
        module: The module, with the run's terms.
        stage: "fit", "validate", "test" or "predict".
    """
    data, own = trainer.datamodule, distilled_run(module)  # type: ignore[attr-defined]
    if not isinstance(data, RolloutDataModule) or own is None:
        return
    if stage == "fit" and trainer.ckpt_path is not None:
        return
    run = _Run(trainer, own, data, stage)
    chosen = _chosen(run)
    for name, rule in RULES.items():
        given = {o: v for o, v in chosen.items() if f"{o}.".startswith(f"{name}.") and _is_on(v)}
        reason = rule(run) if given else None
        if reason is not None:
            option, value = next(iter(given.items()))
            shown = f"--{option} {_shown(value)}" if len(given) == 1 else f"--{name}"
            rank_zero_warn(f"{shown} has no effect in this run: {reason}")


def _is_on(value: Any) -> bool:
    """Return whether a value requests something: not null, and not the number 0."""
    return value is not None and (value is False or value != 0)


def _chosen(run: _Run) -> Mapping[str, Any]:
    """Return the options chosen on the command line; from Python, a fit's non-default arguments."""
    chosen = run.module.chosen_options
    if chosen is not None:
        return chosen.get(run.stage, {})
    if run.stage != "fit":
        return {}
    data, trainer = run.data, run.trainer
    given = {
        "model.engine": run.module.pair.engine,
        "model.attn_implementation": run.module.pair.settings.attn_implementation,
        "model.freeze_vision": run.module.pair.settings.freeze_vision,
        "data.sampling": None if data.sampling == Sampling() else data.sampling,
        "data.train_split": data.splits["train"],
        "data.val_split": data.splits["val"],
        "trainer.gradient_clip_algorithm": trainer.gradient_clip_algorithm,
        "trainer.use_distributed_sampler": uses_distributed_sampler(trainer),
    }
    for name in ("prompts_per_rollout", "rollout_lag", "val_rollouts", "subset", "token_cache"):
        given[f"data.{name}"] = getattr(data, name)
    defaults = option_defaults(type(run.module), type(data), type(trainer))
    return {option: value for option, value in given.items() if value != defaults.get(option)}


def option_defaults(model: Any, data: Any, trainer: Any) -> dict[str, Any]:
    """Return the defaults of the options of a module's, a data module's and a Trainer's class.

    Args:
        model: Class of the module, or a function that returns one.
        data: Class of the data module, or a function that returns one.
        trainer: Class of the Trainer, or a function that returns one.
    """
    owners = {"model": model, "data": data, "trainer": trainer}
    return {
        f"{section}.{name}": parameter.default
        for section, owner in owners.items()
        for name, parameter in inspect.signature(owner).parameters.items()
    }


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__
