"""State that a DistillationModule adds to a checkpoint, and checks of it at loading."""

from __future__ import annotations

from typing import Any

from okd_lightning.checkpoints.contents import (
    check_finite,
    check_methods,
    check_normalization,
    check_teacher_mark,
    check_weights,
    rng_state_of,
    rng_states,
    weights_to_save,
    without_left_out,
)
from okd_lightning.checkpoints.io import make_durable
from okd_lightning.checkpoints.signature import run_signature
from okd_lightning.errors import CheckpointError
from okd_lightning.teachers import OnlineModuleSettings
from okd_lightning.training.arguments import peft_config_of
from okd_lightning.training.earlier_options import present_mark
from okd_lightning.training.loaded_ends import loaded_ends
from okd_lightning.training.loop_state import mark_due_validation, settle_loops
from okd_lightning.training.optimized_module import OptimizedModule
from okd_lightning.training.step_metrics import unlogged_row


def add_state(
    module: OptimizedModule, checkpoint: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """Leave frozen weights out; add the resolved config, the methods and the RNG streams.

    All ranks call this. The checkpoint is then written atomically. ``arguments`` are those with
    which the module was constructed.

    Raises:
        NonFiniteError: A trained weight is NaN or infinite.
    """
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
    make_durable(trainer)
    mark_due_validation(trainer, checkpoint)
    hparams = checkpoint.get("hyper_parameters", {})
    for name in module.recorded:  # of the run; a subclass's own hyper-parameters stay
        hparams.pop(name, None)
    if not hparams:
        checkpoint.pop("hyper_parameters", None)
    checkpoint["state_dict"] = weights_to_save(module, checkpoint["state_dict"])
    for part in ("callbacks", "current_model_state"):
        if part in checkpoint:
            checkpoint[part] = without_left_out(checkpoint[part], module)
    checkpoint["okd_lightning"] = {
        "config": module.run_config,
        "arguments": arguments,
        "started_in": module.started_in,
        "signature": run_signature(module.run_config, module.started_in, arguments),
        "eos_ids": list(module.eos_ids),
        "end_ids": list(module.ends.end_ids),
        "online_module": None if module.online_module is None else module.online_module.to_dict(),
        "methods": [term.kind for term in module.terms],
        "teacher": module.pair.teacher.mark,
        "normalization": module.normalization.by,
        "optimizer": module.optimizer_settings.to_dict(),
        "accumulate": trainer.accumulate_grad_batches,
        "metrics": {
            **module.measured_before,
            **{n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")},
        },
        "row": unlogged_row(trainer) if trainer.training else None,
        "rng": rng_states(trainer.world_size, module.rng_to_restore),
    }


def check_state(module: OptimizedModule, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Check that a checkpoint is one of this run's methods and models; set where the run continues.

    Returns:
        The random streams of this rank where a run is resumed.

    Raises:
        CheckpointError: Another method's or another model's checkpoint.
    """
    own = checkpoint.get("okd_lightning")
    if own is None:
        raise CheckpointError("this checkpoint was not written by okd-lightning")
    module.use_ends(loaded_ends(own, module.ends, resumes=bool(module.terms)))
    rng = None
    if module.terms:
        trainer = module.trainer
        check_methods(own["methods"], [term.kind for term in module.terms])
        check_teacher_mark(present_mark(own), module.pair.teacher.mark)
        if any("student" in term.sources for term in module.terms):
            check_normalization(own.get("normalization", "token_mean"), module.normalization.by)
        module.measured_before = dict(own["metrics"])
        rng = rng_state_of(own["rng"], trainer.global_rank, trainer.world_size)
        settle_loops(checkpoint, trainer.accumulate_grad_batches)
    check_weights(checkpoint["state_dict"], weights_to_save(module, module.state_dict()))
    return rng


def load_weights(module: OptimizedModule, checkpoint: dict[str, Any], strict: bool = False) -> None:
    """Build a module's models outside a Trainer and load the weights of a checkpoint.

    Raises:
        CheckpointError: The checkpoint is of another model; with ``strict``, it holds unknown
            weights.
    """
    config = checkpoint["okd_lightning"].get("online_module")
    if config is not None and module.has_teacher:
        module.add_online_module(OnlineModuleSettings(peft_config_of(config)))
    module.configure_model()
    checkpoint["state_dict"] = {  # projectors belong to a run
        name: value
        for name, value in checkpoint["state_dict"].items()
        if module.projectors is not None or not name.startswith("projectors.")
    }
    module.on_load_checkpoint(checkpoint)
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the module: {error}") from error
