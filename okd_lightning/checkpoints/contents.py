"""Contents of a checkpoint beyond Lightning's own state, and the weights that it omits."""

from __future__ import annotations

import random
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import _IncompatibleKeys

from okd_lightning.errors import CheckpointError, NonFiniteError
from okd_lightning.models.text_ids import RULES_VERSION


def weights_to_save(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that cannot be loaded again: trained ones, and random initial ones.

    Frozen weights of a model that came from a folder or hub id are left out. The teacher decides
    about its own.

    Args:
        module: A DistillationModule with both models built.
        state_dict: Its full state.
    """
    sides = {"student": module.student, "teacher": module.teacher}
    parameters = {
        f"{side}.{name}": parameter
        for side, model in sides.items()
        if isinstance(model, nn.Module)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    frozen = parameters.keys() - trained
    pair: Any = module.pair
    is_random = isinstance(pair.student_source, Mapping)

    def is_kept(name: str) -> bool:
        if name.startswith("teacher."):
            return bool(pair.teacher.keeps(name, trained, frozen))
        return name in trained or is_random or name not in frozen

    return {name: value for name, value in state_dict.items() if is_kept(name)}


def without_left_out(value: Any, module: nn.Module) -> Any:
    """Return a part of a checkpoint without the tensors that ``weights_to_save`` leaves out.

    Averaged copies of a module share its frozen tensors; their states need not hold them either.

    Args:
        value: Nested mappings, such as the callbacks' states.
        module: A DistillationModule with both models built.
    """
    state = module.state_dict()
    kept = weights_to_save(module, state)
    # shared memory identifies copies; 0 is the pointer of empty tensors
    frozen = {value.data_ptr() for name, value in state.items() if name not in kept} - {0}

    def is_frozen(own: Any) -> bool:
        return isinstance(own, Tensor) and own.data_ptr() in frozen

    def without(part: Any) -> Any:
        if not isinstance(part, Mapping):
            return part
        return {name: without(own) for name, own in part.items() if not is_frozen(own)}

    return without(value)


def check_finite(weights: Mapping[str, Tensor], what: str) -> None:
    """Refuse to write weights that hold NaN or infinite values; all ranks of a run call this.

    One pass over the tensors; of sharded ones each rank checks its own shard.

    Args:
        weights: Weights to be written, by name.
        what: Description of the output that is not written then, for the message.

    Raises:
        NonFiniteError: On all ranks; names a weight.
    """
    own = {name: _local(value.detach()) for name, value in weights.items()}
    own = {n: v for n, v in own.items() if v.numel() and v.is_floating_point() and not v.is_meta}
    largest = torch.nn.utils.get_total_norm(list(own.values()), torch.inf)
    broken = [n for n, v in own.items() if not v.isfinite().all()] if not largest.isfinite() else []
    found: list[list[str]] = [broken]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = [[]] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, broken)
    names = sorted({name for part in found for name in part})
    if names:
        raise NonFiniteError(
            f"{len(names)} weights hold NaN or infinite values (such as {names[0]}): {what} is not "
            "written, and what was written before stays. Lower the learning rate, and resume from "
            "the last checkpoint (fit --ckpt_path)"
        )


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def allow_left_out(module: nn.Module, keys: _IncompatibleKeys) -> None:
    """Remove weights that checkpoints omit from the missing keys; a hook after ``load_state_dict``.

    Args:
        module: A DistillationModule, which may be a part of a larger one (an averaged model).
        keys: Keys of the whole load; names that ``weights_to_save`` leaves out are removed.
    """
    state = module.state_dict()
    left_out = state.keys() - weights_to_save(module, state).keys()
    keys.missing_keys[:] = [name for name in keys.missing_keys if not left_out & _tails(name)]


def _tails(name: str) -> set[str]:
    """Return a dotted name's suffixes: a.b.c gives a.b.c, b.c and c."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def check_methods(saved: Sequence[str], configured: Sequence[str]) -> None:
    """Refuse to resume a run with another method.

    Raises:
        CheckpointError: The methods differ; the message names both.
    """
    if list(saved) != list(configured):
        raise CheckpointError(
            f"the checkpoint is of {' + '.join(saved) or 'no method'}, this run is configured for "
            f"{' + '.join(configured)}; resume with the same method, or start a new run from the "
            "exported student: --model.student FOLDER"
        )


def check_teacher_mark(saved: str | None, configured: str | None) -> None:
    """Refuse to resume with another kind of teacher where the weights depend on it.

    Args:
        saved: ``Teacher.mark`` of the run that wrote the checkpoint.
        configured: This run's.

    Raises:
        CheckpointError: They differ; the message names both.
    """
    if saved != configured:
        raise CheckpointError(
            f"the checkpoint's teacher is {saved or 'another model'}, this run's is "
            f"{configured or 'another model'}; resume with the same, or start a new run from the "
            "exported student: --model.student FOLDER"
        )


def check_normalization(saved: str | float, own: str | float) -> None:
    """Refuse to resume with another divisor of on-policy samples.

    Args:
        saved: The checkpoint's ``model.normalization``; token_mean for checkpoints from before the
            option existed.
        own: This run's.

    Raises:
        CheckpointError: They differ, so the objective would change its scale.
    """
    if saved != own:
        raise CheckpointError(
            f"the checkpoint divides sampled responses by {saved}, this run by {own}, which is "
            f"another scale of the loss: resume with --model.normalization {saved}, or begin a new "
            "run from the exported student"
        )


def check_text_rules(saved: int, sources: Collection[str]) -> None:
    """Refuse to resume on dataset responses whose token ids may have changed.

    Args:
        saved: ``text_ids.RULES_VERSION`` of the run that wrote the checkpoint.
        sources: Sources of the run's rows; generated rows are not tokenized from text.

    Raises:
        CheckpointError: Other rules than this version's.
    """
    if saved != RULES_VERSION and "dataset" in sources:
        raise CheckpointError(
            f"the checkpoint's dataset responses became ids by rules {saved}, this version has "
            f"rules {RULES_VERSION}: the run would continue with other tokens at the start or end "
            "of "
            "responses; finish it with the version that began it, or start a new run from the "
            "exported student: --model.student FOLDER"
        )


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model.

    Args:
        weights: The checkpoint's weights.
        expected: The weights that this run would save.

    Raises:
        CheckpointError: Weights are missing, unknown, or of another shape.
    """
    missing = [
        name for name in expected if name not in weights and not name.startswith("evaluation.")
    ]
    if missing and all(name.startswith("projectors.") for name in missing):
        raise CheckpointError(
            f"the checkpoint has no projectors for these layers of HiddenStates ({missing[0]}); "
            "resume with the checkpoint's own layers, or start a new run from the exported "
            "student: --model.student FOLDER"
        )
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} of the student's weights (such as "
            f"{missing[0]}); it belongs to another model"
        )
    unknown = [name for name in weights if name.startswith("student.") and name not in expected]
    if unknown:
        raise CheckpointError(
            f"the checkpoint holds {len(unknown)} weights that this run does not train "
            f"(such as {unknown[0]}); it belongs to another model"
        )
    for name, value in expected.items():
        if name in weights and weights[name].shape != value.shape:
            raise CheckpointError(
                f"{name} is {list(weights[name].shape)} in the checkpoint and "
                f"{list(value.shape)} in this run; it belongs to another model"
            )


def rng_state() -> dict[str, Any]:
    """Return this process's random streams (CUDA's of its device), as tensors and primitives."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": list(_flat(random.getstate())),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def rng_state_of(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> dict[str, Any]:
    """Return a rank's streams out of ``rng_states``.

    In a run of another number of ranks every rank gets its own torch seed, made of a saved stream
    and its number, so that no two ranks draw the same dropout.
    """
    state = dict(states[rank % len(states)])
    if len(states) != world_size:
        state["seed"] = zlib.crc32(state["torch"].numpy().tobytes(), rank)
    return state


def rng_states(world_size: int, pending: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return the streams of every rank, on all of them: only rank 0's part of a file is written.

    Args:
        world_size: Number of ranks.
        pending: Streams that this rank has loaded and not restored yet: a resumed run can write a
            checkpoint before its first step (after a validation that was due, or when it is
            stopped in its first rollout).
    """
    own = rng_state() if pending is None else pending
    if world_size == 1:
        return [own]
    states: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(states, own)
    return states


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the streams of ``rng_state``."""
    torch.set_rng_state(state["torch"].cpu())
    numpy_state = state["numpy"]
    np.random.set_state(
        (
            "MT19937",
            numpy_state["keys"].numpy().astype(np.uint32),
            numpy_state["position"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        )
    )
    version, *keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "seed" in state:
        torch.manual_seed(state["seed"])


def _flat(state: tuple[Any, ...]) -> tuple[Any, ...]:
    version, keys, gauss = state
    return (version, *keys, gauss)
