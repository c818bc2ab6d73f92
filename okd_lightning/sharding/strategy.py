"""``--trainer.strategy fsdp2``: student and teacher in shards over all devices.

Lightning's ModelParallelStrategy provides processes, mesh and checkpoint hooks. This module shards
both models, handles gradients while accumulating, and writes and reads checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import lightning
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.optim import Optimizer

from okd_lightning.checkpoints.contents import check_weights, weights_to_save
from okd_lightning.checkpoints.files import read_checkpoint
from okd_lightning.checkpoints.folders import (
    REST,
    SHARED,
    beside,
    is_checkpoint_folder,
    make_room,
    put_in_place,
    read_rest,
    settled,
    weights_in,
)
from okd_lightning.durable_files import replacing
from okd_lightning.errors import ConfigError
from okd_lightning.models import DTypeName, row_groups
from okd_lightning.models.deferred import deferred_weights
from okd_lightning.sharding import state
from okd_lightning.sharding.loading import fill_from_files
from okd_lightning.sharding.placement import RolloutMode, ShardedModels
from okd_lightning.sharding.plan import ShardSettings, shard, shard_whole

Loading: TypeAlias = Literal["every_rank", "by_shard"]
CheckpointForm: TypeAlias = Literal["sharded", "single_file"]


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism (FSDP2) of a DistillationModule, over all devices and nodes.

    Student, teacher, gradients and optimizer states are in equal parts on all devices; a block is
    gathered when it runs and freed after it.

    Args:
        param_dtype: Number format in which gathered weights compute, such as bfloat16; by default
            that of the weights. The shards, and with them the optimizer's steps, keep their format.
        reduce_dtype: Number format in which gradients are summed over ranks; float32 is float64 for
            float64 weights.
        reshard_after_forward: Free a block after its forward pass and gather it again for the
            backward pass; false keeps the whole models on every device in between.
        cpu_offload: Keep shards and optimizer states in the host's memory.
        checkpoint_form: "sharded": a folder in which every rank writes its part; "single_file":
            gathered on rank 0, as a run without shards writes it.
        rollouts: "gathered": a generating model is gathered once per phase, whole on every device.
            "layerwise": block by block at every token, all ranks in step: slower, for models that
            do not fit.
        loading: "every_rank": each process loads the whole models into the host's memory and keeps
            its shards; "by_shard": it builds them without weights and reads its own rows from the
            safetensors files. PEFT folders, random models and models in memory are always loaded
            whole.
        reduce_every_micro_batch: Sum gradients over ranks in every micro-batch; by default once per
            optimizer step, for which every device keeps the student's whole gradient while
            gradients accumulate.

    Raises:
        ConfigError: A setting that is none of those.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        param_dtype: DTypeName | None = None,
        reduce_dtype: DTypeName | None = "float32",
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        checkpoint_form: CheckpointForm = "sharded",
        rollouts: RolloutMode = "gathered",
        loading: Loading = "every_rank",
        reduce_every_micro_batch: bool = False,
    ) -> None:
        for name, value, known in (
            ("checkpoint_form", checkpoint_form, ("sharded", "single_file")),
            ("rollouts", rollouts, ("gathered", "layerwise")),
            ("loading", loading, ("every_rank", "by_shard")),
            ("param_dtype", param_dtype, (None, *get_args(DTypeName))),
            ("reduce_dtype", reduce_dtype, (None, *get_args(DTypeName))),
        ):
            if value not in known:
                shown = ", ".join(map(str, known))
                raise ConfigError(f"fsdp2: {name} is {value!r}; expected one of {shown}")
        if cpu_offload and rollouts == "layerwise":
            raise ConfigError(
                "fsdp2: rollouts layerwise read the device from weights that cpu_offload keeps in "
                "the host's memory; use rollouts: gathered, or leave cpu_offload out"
            )
        super().__init__(
            save_distributed_checkpoint=checkpoint_form == "sharded",
            process_group_backend="cpu:gloo,cuda:nccl" if cpu_offload else None,
        )
        precision = MixedPrecisionPolicy(
            param_dtype=getattr(torch, param_dtype) if param_dtype else None,
            reduce_dtype=getattr(torch, reduce_dtype) if reduce_dtype else None,
        )
        self._settings = ShardSettings(precision, reshard_after_forward, cpu_offload)
        self._rollouts = rollouts
        self._loading = loading
        self._reduce_every_micro_batch = reduce_every_micro_batch

    @classmethod
    def register_strategies(cls, strategy_registry: _StrategyRegistry) -> None:
        """Register the strategy under its name for the Trainer."""
        strategy_registry.register(cls.strategy_name, cls, description=cls.__name__)

    # ---------------------------------------------------------------- setting up

    def setup_environment(self) -> None:
        """Set up a mesh of (world, 1): all devices of all nodes share the data and the models."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Wrap ``configure_model``: weights stay on disk where they are to be read by shard."""
        with deferred_weights() if self._loading == "by_shard" else nullcontext():
            yield

    @property
    def _shard_device(self) -> torch.device:
        return torch.device("cpu") if self._settings.offload else self.root_device

    def setup(self, trainer: lightning.Trainer) -> None:
        """Shard both models, then run Lightning's own setup.

        Raises:
            ConfigError: ``cpu_offload`` on a CPU, or a precision that scales losses.
        """
        module = self._distilled
        if self._settings.offload and self.root_device.type == "cpu":
            raise ConfigError(
                "fsdp2: cpu_offload on --trainer.accelerator cpu, where the shards are in the "
                "host's memory anyway; leave it out"
            )
        if str(trainer.precision) == "16-mixed":
            raise ConfigError(
                "fsdp2: trainer.precision 16-mixed scales losses, which shards are not unscaled "
                "from; use the strategy's param_dtype: bfloat16, or --trainer.precision bf16-mixed"
            )
        module.pair.teacher.check_sharding()
        mesh = self.device_mesh["data_parallel"]
        for model in module.pair.models:
            option = "--model.student" if model is module.student else "--model.teacher"
            shard(model, mesh, self._settings, option)
            fill_from_files(model, self._shard_device)
        if module.projectors is not None:
            shard_whole(module.projectors, mesh, self._settings)
        module.pair.placement = ShardedModels(
            self._rollouts, self._settings.reshard_after_forward, self.root_device
        )
        super().setup(trainer)
        for model in module.pair.models:
            row_groups(model)  # all ranks together: weights on disk could not be tried before
        module.pair.placement.release(*module.pair.models)

    @property
    def _distilled(self) -> Any:
        """The DistillationModule, of which only the attributes used here are known."""
        module = self.lightning_module
        if not hasattr(module, "pair") or getattr(module, "student", None) is None:
            raise ConfigError(
                f"fsdp2 shards the models of a DistillationModule; got {type(module).__name__}"
            )
        return module

    def model_to_device(self) -> None:
        """Move all but the shards (buffers, metrics) to the device."""
        if not self._settings.offload:
            super().model_to_device()
            return
        distilled = self._distilled
        sides = (distilled.student, distilled.teacher, distilled.projectors)
        for child in distilled.children():
            if not any(child is side for side in sides):
                child.to(self.root_device)
        for module in (m for side in sides if side is not None for m in side.modules()):
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)
        distilled._device = self.root_device  # private: what LightningModule.to would set

    # ---------------------------------------------------------------- gradients

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Add up gradients on each rank within the block, without communication."""
        if self._reduce_every_micro_batch:
            yield
            return
        roots = self._roots()
        for root in roots:
            root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            for root in roots:
                root.set_requires_gradient_sync(True)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Free gathered weights; give zero gradients to an online module that no term trained.

        Zeros instead of None, so that hooks after the backward pass see the same as on one device.
        """
        super().post_backward(closure_loss)
        module = self._distilled
        module.pair.placement.release(*module.pair.models, module.projectors)
        for side in (module.teacher, module.projectors):
            for parameter in module.trained_parameters(side):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def _roots(self) -> list[FSDPModule]:
        module = self._distilled
        models = (*module.pair.models, module.projectors)
        return [model for model in models if isinstance(model, FSDPModule)]

    # ---------------------------------------------------------------- state

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights of a checkpoint: in shards, or whole on rank 0 and empty elsewhere."""
        kept = self._kept_weights()
        if self._save_distributed_checkpoint:
            return dict(kept)
        first = self._first_names(kept)
        gathered = {name: state.to_host(kept[name]) for name in kept if first[name] == name}
        return {name: gathered[first[name]] for name in kept} if self.is_global_zero else {}

    def _kept_weights(self) -> dict[str, Tensor]:
        """Return the weights in this rank's shards; writing into them changes the models."""
        module = self._distilled
        return weights_to_save(module, module.state_dict())

    def _first_names(self, kept: Mapping[str, Tensor]) -> dict[str, str]:
        """Return each weight's name → the first name of the same weight (tied heads have two)."""
        of_parameter: dict[int, str] = {}
        parameters = dict(self._distilled.named_parameters(remove_duplicate=False))
        return {
            name: of_parameter.setdefault(id(parameters.get(name, name)), name) for name in kept
        }

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state as torch's own ``state_dict``: in shards, or whole on rank 0."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        own = optimizer.state_dict()
        if self._save_distributed_checkpoint:
            return own
        return state.map_state(own, state.to_host)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a file, or a folder: next to an existing one, then in its place.

        Raises:
            TypeError: ``storage_options``, which this strategy does not support.
        """
        if storage_options is not None:
            raise TypeError("fsdp2 takes no storage_options")
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            ParallelStrategy.save_checkpoint(self, checkpoint, path)
            return
        if self.is_global_zero:
            make_room(path)
        new = beside(path, "new")
        self.barrier()
        parts = [state.optimizer_parts(own) for own in checkpoint.pop("optimizer_states", [])]
        kept = checkpoint.pop("state_dict")
        first = self._first_names(kept)
        own_names = {name: value for name, value in kept.items() if first[name] == name}
        state.write_folder(new, own_names, [tensors for _, tensors in parts])
        if self.is_global_zero:
            rest = {
                "optimizer_states": [group for group, _ in parts],
                SHARED: {name: other for name, other in first.items() if name != other},
            }
            with replacing(new / REST) as file:
                torch.save({**checkpoint, **rest}, file)
            put_in_place(new, path)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Fill the shards from a file or folder of any strategy, always weights-only.

        Raises:
            CheckpointError: It does not exist, is broken, or is of another model.
        """
        del weights_only
        path = settled(Path(self.broadcast(checkpoint_path)))
        kept = self._kept_weights()
        if is_checkpoint_folder(path):
            checkpoint = read_rest(path)
            check_weights(weights_in(path), kept)
            groups = checkpoint.get("optimizer_states", [])
            shared = checkpoint.pop(SHARED, {})
            own_names = {name: value for name, value in kept.items() if name not in shared}
            state.read_folder(path, own_names, self.optimizers, groups)
        else:
            checkpoint = read_checkpoint(str(path))
            check_weights(checkpoint["state_dict"], kept)
            for name, target in kept.items():
                state.fill(target, checkpoint["state_dict"][name])
            for optimizer, own in zip(
                self.optimizers, checkpoint.get("optimizer_states", ()), strict=False
            ):
                state.load_whole_optimizer(optimizer, own)
        checkpoint["state_dict"] = kept
        return checkpoint
