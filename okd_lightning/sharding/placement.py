"""How a model is run: whole, as on one device, or in shards that ranks gather together.

``PairModule`` has a Placement and asks it; which one is the strategy's business. In shards every
forward pass is a collective operation, so two things need care: a phase in which ranks run a model
by themselves (rollouts), and what is left gathered behind a pass without gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from okd_lightning.sharding.plan import units_of

RolloutMode: TypeAlias = Literal["gathered", "layerwise"]
"""Whole models for the phase, or one block after the other, all ranks in step."""


class Placement(Protocol):
    """What ``PairModule`` needs to know of where its models are."""

    def alone(self, *models: nn.Module | None) -> ExitStack:
        """Within it each rank may run ``models`` as often as it likes, without gradient.

        All ranks enter and leave it together, also those that have nothing to run.
        """

    def release(self, *models: nn.Module | None) -> None:
        """Free what a pass that needs no backward pass has left gathered."""

    def tied_to_loss(self, parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
        """Which of the idle parameters the loss has to be tied to, with a zero."""


class WholeModels:
    """Every rank has the whole models: nothing to do."""

    def alone(self, *models: nn.Module | None) -> ExitStack:
        """Nothing."""
        del models
        return ExitStack()

    def release(self, *models: nn.Module | None) -> None:
        """Nothing."""

    def tied_to_loss(self, parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
        """All of them, as DDP expects."""
        return parameters


class ShardedModels:
    """Both models are in shards.

    Args:
        rollouts: How ranks run a model by themselves.
        reshard_after_forward: What the blocks were given; a gathered phase suspends it.
        device: Where flags are exchanged.
    """

    def __init__(
        self, rollouts: RolloutMode, reshard_after_forward: bool, device: torch.device
    ) -> None:
        self.rollouts = rollouts
        self._reshard_after_forward = reshard_after_forward
        self._device = device
        self._running: set[int] = set()

    def alone(self, *models: nn.Module | None) -> ExitStack:
        """Gather the models for the phase, or keep all ranks in step until the last is through.

        Models that are in such a phase already are left alone, so phases may be nested.
        """
        entered = ExitStack()
        new = [m for m in models if m is not None and id(m) not in self._running]
        if new:
            entered.enter_context(self._phase(new))
        return entered

    @contextmanager
    def _phase(self, models: list[nn.Module]) -> Iterator[None]:
        self._running |= {id(m) for m in models}
        mode = self._gathered(models) if self.rollouts == "gathered" else self._in_step(models)
        try:
            with mode:
                yield
        finally:
            self._running -= {id(m) for m in models}

    @contextmanager
    def _gathered(self, models: list[nn.Module]) -> Iterator[None]:
        """One all-gather a unit for the whole phase; the price is the models' full size."""
        units = [unit for model in models for unit in units_of(model)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for model in models:
                for unit in units_of(model):
                    is_block = unit is not model
                    unit.set_reshard_after_forward(
                        is_block and self._reshard_after_forward, recurse=False
                    )
                    unit.reshard()

    @contextmanager
    def _in_step(self, models: list[nn.Module]) -> Iterator[None]:
        """Before every forward pass ranks agree on whose turn it is; idle ones run along."""

        def announce(number: int) -> int:
            turn = torch.tensor(number, device=self._device)
            torch.distributed.all_reduce(turn, torch.distributed.ReduceOp.MAX)
            return int(turn)

        def hook(number: int):  # type: ignore[no-untyped-def]
            def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                del module, args
                announce(number)

            return before

        handles = [
            model.register_forward_pre_hook(hook(number), prepend=True)
            for number, model in enumerate(models, 1)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        while turn := announce(0):
            self._run_along(models[turn - 1])
        self.release(*models)

    def _run_along(self, model: nn.Module) -> None:
        """The shortest forward pass: this rank's part of the others' gathers."""
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=self._device))

    def release(self, *models: nn.Module | None) -> None:
        """Free the gathered weights: kept, they would be stale behind the next optimizer step."""
        for model in models:
            if isinstance(model, FSDPModule) and id(model) not in self._running:
                for unit in units_of(model):
                    unit.reshard()

    def tied_to_loss(self, parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
        """None: the strategy gives them their zero gradients, shard by shard."""
        del parameters
        return ()
