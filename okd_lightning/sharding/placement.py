"""Placement of models: whole, as on one device, or in shards that ranks gather together.

The strategy sets the Placement of a ``Pair``. In shards every forward pass is a collective
operation, so two cases need care: a phase in which each rank runs a model on its own (rollouts),
and weights that stay gathered after a pass without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal, Protocol, TypeAlias, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.models.causal_lm import forward_arguments
from okd_lightning.sharding.plan import settle_root, units_of

RolloutMode: TypeAlias = Literal["gathered", "layerwise"]
"""Whole models for the phase, or one block after the other, all ranks in step."""


class Placement(Protocol):
    """Operations that ``Pair`` needs on its models' placement."""

    def alone(self, *models: nn.Module | None) -> ExitStack:
        """Let each rank run ``models`` any number of times within the block, without gradient.

        All ranks enter and leave it together, also those that have nothing to run.
        """

    def release(self, *models: nn.Module | None) -> None:
        """Free weights that a pass without a backward pass has left gathered."""

    def tied_to_loss(self, parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
        """Return which of the idle parameters the loss has to be tied to, with a zero."""


class ShardedModels:
    """Both models in shards.

    Args:
        rollouts: Way in which each rank runs a model on its own.
        reshard_after_forward: Setting of the blocks; a gathered phase suspends it.
        device: Device on which flags are exchanged.
    """

    def __init__(
        self, rollouts: RolloutMode, reshard_after_forward: bool, device: torch.device
    ) -> None:
        self.rollouts = rollouts
        self._reshard_after_forward = reshard_after_forward
        self._device = device
        self._running: set[int] = set()

    def alone(self, *models: nn.Module | None) -> ExitStack:
        """Gather the models for the phase, or keep all ranks in step until the last is done.

        Models that are in such a phase already are skipped, so phases may be nested.
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
        """Gather every unit once for the whole phase; costs memory of the models' full size."""
        for model in models:
            settle_root(model)
            for unit in units_of(model):
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
                _reshard(model)

    @contextmanager
    def _in_step(self, models: list[nn.Module]) -> Iterator[None]:
        """Agree before every forward pass on the model that runs; all other ranks run it too."""
        _check_stepwise(models)
        turns = _Turns(models, self._device)
        handles = [
            model.register_forward_pre_hook(turns.wait_for(number), prepend=True)
            for number, model in enumerate(models, 1)
        ]
        try:
            yield
        finally:  # other ranks need this one until they are done, even after an error
            turns.see_others_through()
            for handle in handles:
                handle.remove()
        for model in models:
            _reshard(model)

    def release(self, *models: nn.Module | None) -> None:
        """Free the gathered weights: they would be stale after the next optimizer step."""
        for model in models:
            if isinstance(model, FSDPModule) and id(model) not in self._running:
                _reshard(model)

    def tied_to_loss(self, parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
        """Return none: the strategy gives them zero gradients, shard by shard."""
        del parameters
        return ()


class _Turns:
    """Coordination of ranks that run different models different numbers of times.

    Every gather needs all ranks. So before a forward pass each rank announces its model's number.
    The highest number goes first, and every other rank, or one that is done, takes part with the
    shortest possible pass of that model.
    """

    def __init__(self, models: list[nn.Module], device: torch.device) -> None:
        self._models = models
        self._device = device
        self._is_running_along = False

    def wait_for(self, number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a hook that waits for the turn of model ``number``, counted from 1."""

        def wait(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            del module, args
            if not self._is_running_along:
                self._run_along_until(number)

        return wait

    def see_others_through(self) -> None:
        """Take part in other ranks' passes until all ranks are done."""
        self._run_along_until(0)

    def _run_along_until(self, number: int) -> None:
        while (turn := self._announce(number)) != number:
            self._is_running_along = True
            try:
                with torch.no_grad():
                    ids = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
                    model = cast(PreTrainedModel, self._models[turn - 1])
                    model(**forward_arguments(model, {"input_ids": ids}, {"use_cache": False}))
            finally:
                self._is_running_along = False

    def _announce(self, number: int) -> int:
        turn = torch.tensor(number, device=self._device)
        torch.distributed.all_reduce(turn, torch.distributed.ReduceOp.MAX)
        return int(turn)


def _reshard(model: nn.Module) -> None:
    for unit in units_of(model):
        unit.reshard()


def _check_stepwise(models: list[nn.Module]) -> None:
    if any(isinstance(model, PeftModel) for model in models):
        raise ConfigError(
            "fsdp2: rollouts layerwise cannot run a teacher with a prompt-learning module by "
            "itself, because its base is run without PEFT's wrapper; use rollouts: gathered, or a "
            "LoraConfig as the online module"
        )
