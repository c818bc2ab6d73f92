"""The FrozenPartsModule: which weights of a module callbacks may copy, average and change.

A teacher stays registered, so that it moves and is restored with the module. Callbacks that average
weights deep-copy the module, and those that prune it change every weight that it lists; neither may
copy or change frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any, Self

import lightning
from lightning.pytorch.trainer.states import TrainerStatus
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


class FrozenPartsModule(lightning.LightningModule):
    """LightningModule that hides frozen tensors from callbacks, and shares them with its copies.

    From callbacks' ``setup`` until the module's own, ``modules()``, ``parameters()`` and
    ``buffers()`` list only trained parts, so a callback never gets the teacher or an adapter's
    base. If the module is deep-copied in this time (weight averaging), this stays so until
    ``teardown``, for the module and its copy alike, because averaging pairs their parameters by
    position.

    Attributes:
        shared_by_copies: Names of attributes that a deep copy shares, besides frozen tensors.
    """

    shared_by_copies: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self._lists_trained_parts = False
        self._was_copied = False
        self._left_alone: frozenset[int] = frozenset()

    def list_trained_parts(self) -> None:
        """List only trained parts, until ``list_all_parts``."""
        self._lists_trained_parts, self._was_copied = True, False

    def list_all_parts(self, is_run_over: bool = False) -> None:
        """List all parts, unless a copy is being averaged in this run."""
        if is_run_over or not self._was_copied:
            self._lists_trained_parts = self._was_copied = False

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Yield all modules; see the class for when those without trained parts are omitted."""
        hidden = self._frozen_modules() if self._lists_trained_parts else frozenset()
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if id(module) not in hidden:
                yield name, module

    def _frozen_modules(self) -> frozenset[int]:
        """Return the ids of fully frozen modules with parameters, and of PEFT's wrapping layers.

        A wrapping layer lists its base's weight as its own; its trained parts are modules in it.
        """
        hidden: set[int] = set()

        def has_trained(module: nn.Module) -> bool:
            found = [p.requires_grad for p in module._parameters.values() if p is not None]
            found += [has_trained(child) for child in module.children()]
            is_frozen = not any(found) and next(module.parameters(), None) is not None
            if is_frozen:
                hidden.update(id(part) for part in module.modules())
            if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
                hidden.add(id(module))
            return any(found)

        for child in self.children():
            has_trained(child)
        return frozenset(hidden)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy trained parts; share frozen tensors and ``shared_by_copies``.

        A copy within a run shares the parameter objects and never moves them. Any other copy has
        its own parameters in the same memory, so that it can be moved.
        """
        is_running, shared = self._is_running, self._frozen_tensors()
        for tensor in shared:
            is_parameter = isinstance(tensor, nn.Parameter)
            own = nn.Parameter(tensor.detach(), False) if is_parameter else tensor
            memo[id(tensor)] = tensor if is_running else own
        for name in self.shared_by_copies:
            value = getattr(self, name)
            memo[id(value)] = value
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        if is_running:
            self._lists_trained_parts = self._was_copied = True
        # the default deep copy, with ``memo`` filled in advance
        copy.__setstate__(deepcopy(self.__getstate__(), memo))
        copy._left_alone = frozenset(map(id, shared)) if is_running else frozenset()
        return copy

    @property
    def _is_running(self) -> bool:
        try:
            return self._trainer is not None and (
                self._trainer.state.status == TrainerStatus.RUNNING
            )
        except ReferenceError:  # the module holds a weak reference to its last Trainer
            return False

    def _frozen_tensors(self) -> list[Tensor]:
        hidden = self._frozen_modules()
        modules = [m for child in self.children() for m in child.modules() if id(m) in hidden]
        named = [[*m._parameters.values(), *m._buffers.values()] for m in modules]
        return [tensor for tensors in named for tensor in tensors if tensor is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert; a copy within a run does not change the original's tensors."""
        left_alone = self._left_alone
        if not left_alone:
            return super()._apply(fn, recurse)
        return super()._apply(lambda t: t if id(t) in left_alone else fn(t), recurse)


def own_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Move trained parameters out of memory that processes share.

    ddp_spawn passes a model to every process in shared memory, where each process's optimizer would
    step the weights of all.
    """
    for parameter in parameters:
        if parameter.device.type == "cpu" and parameter.is_shared():
            parameter.data = parameter.data.clone()
