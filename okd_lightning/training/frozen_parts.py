"""FrozenParts: hides a module's frozen weights from callbacks that copy, average or change weights.

A teacher stays registered, so that it moves and is restored with the module. Callbacks that average
weights deep-copy the module, and those that prune it change every weight that it lists; neither may
copy or change frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, TypeVar

import lightning
from lightning.pytorch.trainer.states import TrainerStatus
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from okd_lightning.training.lightning_privates import trainer_of

_Module = TypeVar("_Module", bound=lightning.LightningModule)


class FrozenParts:
    """The frozen tensors of a module: hidden from callbacks, and shared with its copies.

    From callbacks' ``setup`` until the module's own, ``modules()``, ``parameters()`` and
    ``buffers()`` list only trained parts, so a callback never gets the teacher or an adapter's
    base. If the module is deep-copied in this time (weight averaging), this stays so until
    ``teardown``, for the module and its copy alike, because averaging pairs their parameters by
    position.

    Args:
        shared_by_copies: Names of the module's attributes that a deep copy shares, besides frozen
            tensors.

    Attributes:
        are_hidden: Whether only trained parts are listed.
    """

    def __init__(self, shared_by_copies: tuple[str, ...]) -> None:
        self._shared_by_copies = shared_by_copies
        self.are_hidden = False
        self._was_copied = False
        self._left_alone: frozenset[int] = frozenset()

    def hide(self) -> None:
        """List only trained parts, until ``show``."""
        self.are_hidden, self._was_copied = True, False

    def show(self, is_run_over: bool = False) -> None:
        """List all parts, unless a copy is being averaged in this run."""
        if is_run_over or not self._was_copied:
            self.are_hidden = self._was_copied = False

    def listed(
        self, module: nn.Module, named: Iterator[tuple[str, nn.Module]]
    ) -> Iterator[tuple[str, nn.Module]]:
        """Return a module's ``named`` modules without the frozen ones."""
        hidden = _frozen_modules(module)
        return ((name, part) for name, part in named if id(part) not in hidden)

    def copy_of(self, module: _Module, memo: dict[int, Any]) -> _Module:
        """Copy trained parts; share frozen tensors and ``shared_by_copies``.

        A copy within a run shares the parameter objects and never moves them. Any other copy has
        its own parameters in the same memory, so that it can be moved.
        """
        is_running, shared = _is_running(module), _frozen_tensors(module)
        for tensor in shared:
            is_parameter = isinstance(tensor, nn.Parameter)
            own = nn.Parameter(tensor.detach(), False) if is_parameter else tensor
            memo[id(tensor)] = tensor if is_running else own
        for name in self._shared_by_copies:
            value = getattr(module, name)
            memo[id(value)] = value
        if is_running:
            self.are_hidden = self._was_copied = True
        of_copy = FrozenParts(self._shared_by_copies)
        of_copy.are_hidden, of_copy._was_copied = self.are_hidden, self._was_copied
        of_copy._left_alone = frozenset(map(id, shared)) if is_running else frozenset()
        memo[id(self)] = of_copy
        copy = type(module).__new__(type(module))
        memo[id(module)] = copy
        # the default deep copy, with ``memo`` filled in advance
        copy.__setstate__(deepcopy(module.__getstate__(), memo))
        return copy

    def moving(self, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return ``change`` limited to the own tensors of a copy within a run."""
        left_alone = self._left_alone
        if not left_alone:
            return change
        return lambda tensor: tensor if id(tensor) in left_alone else change(tensor)


def _frozen_modules(module: nn.Module) -> frozenset[int]:
    """Return the ids of fully frozen modules with parameters, and of PEFT's wrapping layers.

    A wrapping layer lists its base's weight as its own; its trained parts are modules in it.
    """
    hidden: set[int] = set()

    def has_trained(part: nn.Module) -> bool:
        found = [p.requires_grad for p in part._parameters.values() if p is not None]
        found += [has_trained(child) for child in part.children()]
        is_frozen = not any(found) and next(part.parameters(), None) is not None
        if is_frozen:
            hidden.update(id(own) for own in part.modules())
        if isinstance(part, BaseTunerLayer | ModulesToSaveWrapper):
            hidden.add(id(part))
        return any(found)

    for child in module.children():
        has_trained(child)
    return frozenset(hidden)


def _frozen_tensors(module: nn.Module) -> list[Tensor]:
    hidden = _frozen_modules(module)
    parts = [m for child in module.children() for m in child.modules() if id(m) in hidden]
    named = [[*m._parameters.values(), *m._buffers.values()] for m in parts]
    return [tensor for tensors in named for tensor in tensors if tensor is not None]


def _is_running(module: lightning.LightningModule) -> bool:
    try:
        trainer = trainer_of(module)
        return trainer is not None and trainer.state.status == TrainerStatus.RUNNING
    except ReferenceError:  # the module holds a weak reference to its last Trainer
        return False


def own_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Move trained parameters out of memory that processes share.

    ddp_spawn passes a model to every process in shared memory, where each process's optimizer would
    step the weights of all.
    """
    for parameter in parameters:
        if parameter.device.type == "cpu" and parameter.is_shared():
            parameter.data = parameter.data.clone()
