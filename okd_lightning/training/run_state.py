"""The RunState: a DistillationModule's own part of a checkpoint, and checks of it at loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from copy import copy
from typing import Any, Self, cast

import lightning

from okd_lightning.checkpoints.contents import (
    check_finite,
    check_methods,
    check_normalization,
    check_teacher_mark,
    check_weights,
    rng_state_of,
    rng_states,
    set_rng_state,
    weights_to_save,
    without_left_out,
)
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.checkpoints.signature import is_own_run, run_signature
from okd_lightning.errors import CheckpointError
from okd_lightning.teachers import OnlineModuleSettings
from okd_lightning.training.arguments import (
    check_arguments,
    peft_config_of,
    restored_arguments,
    stored_arguments,
)
from okd_lightning.training.distilled_run import DistilledRun
from okd_lightning.training.earlier_options import present_mark
from okd_lightning.training.kept_checkpoints import settle_kept
from okd_lightning.training.lightning_privates import hold_open, trainer_of, unlogged_row
from okd_lightning.training.loaded_ends import loaded_ends
from okd_lightning.training.loop_state import (
    mark_due_validation,
    record_hparams,
    settle_loops,
    validation_is_due,
)

REFUSED_ARGUMENTS = (
    "load_from_checkpoint reads a checkpoint's own arguments and weights alone: leave "
    "hparams_file and weights_only=False out, and name what to change as arguments"
)


class RunState:
    """The state of a run besides its weights and its optimizer.

    Args:
        constructed_with: The arguments of the module's constructor.

    Attributes:
        config: The resolved config as YAML, where the command line made the run.
        started_in: Folder to which the config's relative paths refer.
        resume_flag: Option that a printed command needs to resume this run.
        settings: Method, optimizer, rates, precision and device, for loggers and messages.
        rng: Random streams to restore at the first step after a resume; None where it is done.
        weights_read: Digest of the weights, in a run of several processes.
    """

    def __init__(self, constructed_with: dict[str, Any]) -> None:
        self.config: str | None = None
        self.started_in: str | None = None
        self.resume_flag = ""
        self.settings: dict[str, Any] = {}
        self.weights_read = ""
        self._constructed_with = constructed_with
        self._arguments: dict[str, Any] | None = None
        self._recorded: list[str] = []  # names of ``settings`` that were added to ``hparams``
        self._measured_before: dict[str, float] = {}  # by the last validation before a resume
        self.rng: dict[str, Any] | None = None
        self._loaded_step = 0

    def begin(self, module: lightning.LightningModule, settings: dict[str, Any]) -> None:
        """Make a run's settings the module's hyper-parameters."""
        self._forget(module.hparams)
        self.settings = settings
        self._recorded = record_hparams(module, settings)

    def _forget(self, hparams: MutableMapping[str, Any]) -> None:
        """Remove the settings of a run; hyper-parameters of a subclass's own stay."""
        for name in self._recorded:
            hparams.pop(name, None)

    def restore_streams(self) -> None:
        """Restore a resumed run's random streams (dropout), once."""
        assert self.rng is not None
        set_rng_state(self.rng)
        self.rng = None

    def measured_step(self, trainer: lightning.Trainer) -> int:
        """Return the last step of the weights that are measured, resumed or loaded."""
        return max(0, (trainer.global_step or self._loaded_step) - 1)

    def save(
        self, module: DistilledRun, checkpoint: dict[str, Any], optimizer: dict[str, Any]
    ) -> None:
        """Leave frozen weights out; add the resolved config, the methods and the RNG streams.

        All ranks call this.

        Args:
            module: The module within a run.
            checkpoint: Lightning's checkpoint, which is changed.
            optimizer: Settings of the optimizer, as primitives.

        Raises:
            CheckpointError: The run was in processes that have ended.
            NonFiniteError: A trained weight is NaN or infinite.
        """
        whole = cast(lightning.LightningModule, module)
        if trainer_of(whole) is None:
            raise CheckpointError(
                "the run was in processes of its own (ddp_fork, ddp_spawn or ddp_notebook), and "
                "its optimizer and loops ended with them: have the run write its checkpoints, by "
                "LastCheckpoint or ModelCheckpoint among the Trainer's callbacks"
            )
        trainer = module.trainer
        trained = {
            f"{side}.{name}": parameter
            for side, model in (
                ("student", module.student),
                ("teacher", module.teacher),
                ("projectors", module.projectors),
            )
            if model is not None
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        check_finite(trained, f"the checkpoint of step {trainer.global_step}")
        mark_due_validation(trainer, checkpoint)
        self._forget(checkpoint.get("hyper_parameters", {}))
        if not checkpoint.get("hyper_parameters"):
            checkpoint.pop("hyper_parameters", None)
        checkpoint["state_dict"] = weights_to_save(whole, checkpoint["state_dict"])
        for part in ("callbacks", "current_model_state"):
            if part in checkpoint:
                checkpoint[part] = without_left_out(checkpoint[part], whole)
        checkpoint["okd_lightning"] = {**self._record(module), "optimizer": optimizer}

    def _record(self, module: DistilledRun) -> dict[str, Any]:
        """Return the checkpoint's description of the run, without its optimizer, as primitives."""
        trainer, pair = module.trainer, module.pair
        if self._arguments is None:
            self._arguments = stored_arguments(self._constructed_with)
        online = pair.teacher.online_module
        return {
            "config": self.config,
            "arguments": self._arguments,
            "started_in": self.started_in,
            "signature": run_signature(self.config, self.started_in, self._arguments),
            "eos_ids": list(pair.eos_ids),
            "end_ids": list(pair.ends.end_ids),
            "online_module": None if online is None else online.to_dict(),
            "methods": [term.kind for term in module.terms],
            "teacher": pair.teacher.mark,
            "normalization": module.normalization.by,
            "accumulate": trainer.accumulate_grad_batches,
            "metrics": {
                **self._measured_before,
                **{n: float(v) for n, v in trainer.callback_metrics.items() if n[:4] == "val/"},
            },
            "row": unlogged_row(trainer) if trainer.training else None,
            "rng": rng_states(trainer.world_size, self.rng),
        }

    def load(self, module: DistilledRun, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint has this run's methods and models; restore its state.

        Raises:
            CheckpointError: Another method's or model's checkpoint.
        """
        own = checkpoint.get("okd_lightning")
        if own is None:
            raise CheckpointError("this checkpoint was not written by okd-lightning")
        whole = cast(lightning.LightningModule, module)
        pair, terms = module.pair, module.terms
        pair.use_ends(loaded_ends(own, pair.ends, resumes=bool(terms)))
        self.rng = None
        if terms:
            run = module.trainer
            check_methods(own["methods"], [term.kind for term in terms])
            check_teacher_mark(present_mark(own), pair.teacher.mark)
            if any("student" in term.sources for term in terms):
                saved = own.get("normalization", "token_mean")
                check_normalization(saved, module.normalization.by)
            self._measured_before = dict(own["metrics"])
            self.rng = rng_state_of(own["rng"], run.global_rank, run.world_size)
            settle_loops(checkpoint, run.accumulate_grad_batches)
            if validation_is_due(checkpoint):
                hold_open(run)
        check_weights(checkpoint["state_dict"], weights_to_save(whole, whole.state_dict()))
        if (trainer := trainer_of(whole)) is not None:
            settle_kept(trainer, checkpoint)
        self._loaded_step = checkpoint["global_step"]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Share everything: models among the constructor's arguments are not copied."""
        return copy(self)


def module_of_checkpoint(
    kind: Callable[..., Any], path: str, given: Mapping[str, Any], is_strict: bool
) -> Any:
    """Build the module of a checkpoint outside a Trainer, with its models and weights.

    Args:
        kind: Class of the module.
        path: A file, or a sharded checkpoint's folder; always read weights-only.
        given: Arguments of the constructor that replace the checkpoint's.
        is_strict: Refuse unknown weights.

    Raises:
        CheckpointError: It cannot be read or rebuilt, is of another model, or names a server and is
            not signed by this user.
    """
    checkpoint = read_checkpoint(path, with_weights=True)
    own = checkpoint["okd_lightning"]
    if not is_own_run(own):
        check_arguments(own.get("arguments"), given, path)
    module = kind(**restored_arguments(own.get("arguments"), given))
    config = own.get("online_module")
    if config is not None and module.has_teacher:
        module.add_online_module(OnlineModuleSettings(peft_config_of(config)))
    module.configure_model()
    weights = checkpoint["state_dict"]
    checkpoint["state_dict"] = {  # projectors belong to a run
        name: value for name, value in weights.items() if not name.startswith("projectors.")
    }
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=is_strict)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the module: {error}") from error
    return module
