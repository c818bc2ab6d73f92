"""The LoadedTeacher: a frozen model that is read from a folder, a hub id, a config or memory."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, Self, TypeAlias, final, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.models import ModelArgument, ModelSource, compile_blocks, load_checked
from okd_lightning.models.adapters import model_source
from okd_lightning.models.packing import tried
from okd_lightning.teachers.base import Teacher
from okd_lightning.teachers.host_weights import HostWeights
from okd_lightning.teachers.no_teacher import NoTeacher
from okd_lightning.teachers.run import GeneratingModels, Opening

Residence: TypeAlias = Literal["device", "host"]
_HOST = "model.teacher.residence host"


@final
class LoadedTeacher(Teacher):
    """Frozen model in memory; ``--model.teacher PATH`` is its short form.

    Args:
        model: Folder, hub id (org/name or org/name@revision), PEFT folder (merged into its base),
            .gguf file, or a config with random weights: a mapping with model_type and that
            architecture's fields. From Python also a model.
        residence: Place of its weights between its passes. host: in host memory; each pass copies
            them to the device and frees them there, all but the head. For several large teachers,
            of which one at a time is then on the device.

    Raises:
        ConfigError: An unknown residence, or random weights in host memory.
    """

    has_layers = True
    text_losses = ("text", "chunk", "next_byte", "shared_tokens")

    def __init__(self, model: ModelArgument, residence: Residence = "device") -> None:
        if residence not in get_args(Residence):
            raise ConfigError(f"model.teacher.residence is {residence!r}; expected device or host")
        if isinstance(model, Mapping) and "class_path" in model:
            raise ConfigError(f"--model.teacher: {_why_no_teacher(model)}")
        self._given = model_source(model, "teacher")
        self.residence = residence
        if residence == "host" and isinstance(self._given, Mapping):
            raise ConfigError(
                f"{_HOST}: random weights of a config are kept in checkpoints, which hold what is "
                "on the device alone: save the model and name its folder, or leave residence out"
            )

    @property
    def own_source(self) -> ModelSource:
        """The user's model."""
        return self._given

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The user's model, and its residence where that is not the device."""
        residence = {} if self.residence == "device" else {"residence": self.residence}
        return {"model": self._given, **residence}

    @property
    def module(self) -> nn.Module | None:
        """The model; None in host memory, which Lightning does not move and no strategy wraps."""
        return None if self.residence == "host" else self.model

    def check_adaptable(self) -> None:
        """Refuse an online module on a model in host memory: its weights would be trained there."""
        if self.residence == "host":
            raise ConfigError(
                f"{_HOST} keeps a model that does not change outside of the run's weights, and an "
                "online module (OKD) is trained on it: leave residence out, or use another method"
            )

    def check_sharding(self) -> None:
        """Refuse shards of a model in host memory: every rank has it whole."""
        if self.residence == "host":
            raise ConfigError(
                f"{_HOST} keeps a whole model for each rank, and fsdp2 keeps shards of it: leave "
                "residence out, or use --trainer.strategy ddp"
            )

    def build(self) -> None:
        """Load it once."""
        if self.model is None:
            self.model = self.load()
        if self.residence == "host" and self.host_weights is None:
            self.host_weights = HostWeights(self.model, _HOST)

    def unload(self) -> None:
        """Remove the model from memory."""
        super().unload()
        self.host_weights = None

    def load(self) -> PreTrainedModel:
        """Load the model, frozen and in eval mode; it is not kept.

        Raises:
            ModelError: It cannot be loaded, or is not causal.
        """
        run = self.run
        teacher = load_checked(
            self._given,
            "--model.teacher",
            run.vocabulary.size,
            dtype=run.dtype,
            attn_implementation=run.attn_implementation,
        )
        self.packs = tried(teacher, run.packing)
        if run.compile_blocks:
            compile_blocks(teacher)
        return teacher.requires_grad_(False).eval()

    def open(self, opening: Opening) -> None:
        """Log the bytes that are copied for each pass, or that nothing is copied."""
        weights = self.host_weights
        if weights is None:
            return
        if opening.device.type == "cpu":
            rank_zero_info(f"{_HOST}: this run is on the CPU, where nothing is moved")
            return
        rank_zero_info(
            f"{_HOST}: each pass of the teacher copies {weights.num_bytes / 1e9:.2f} GB to the "
            "device and frees them; its head stays there"
        )

    def generator(self) -> GeneratingModels:
        """Return the model, with its weights on the student's device while it generates."""
        if self.host_weights is None:
            return super().generator()
        assert self.model is not None
        return GeneratingModels((self.model,), self._beside_student(self.host_weights))

    @contextmanager
    def _beside_student(self, weights: HostWeights) -> Iterator[None]:
        device = torch.device("cpu") if self.student is None else self.student.device
        with weights.on(device):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy a model in memory that is not in use yet: a module may be put on it."""
        own = super().__deepcopy__(memo)
        own.host_weights = None
        if self.model is None:
            own._given = deepcopy(self._given, memo)
        elif own.model is not None and self.host_weights is not None:
            own.host_weights = HostWeights(own.model, _HOST)
        return own


def _why_no_teacher(given: Mapping[str, Any]) -> str:
    """Return the reason why a config's class path and settings do not make a teacher."""
    name, settings = str(given["class_path"]), dict(given.get("init_args") or {})
    found = [kind for sub in Teacher.__subclasses__() for kind in _kinds(sub)]
    kinds = {kind.__name__: kind for kind in found}
    kind = kinds.get(name.rpartition(".")[2])
    if kind is None:
        near = difflib.get_close_matches(name.rpartition(".")[2], kinds, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(kinds))}"
        return f"class_path {name} is not a class of teacher; {hint}"
    known = list(inspect.signature(kind).parameters)
    if unknown := sorted(settings.keys() - set(known)):
        return f"{name} has no setting {unknown[0]}; it has {', '.join(known)}"
    try:
        kind(**settings)
    except (ConfigError, TypeError) as error:
        return f"{name}: {error}"
    return f"{name} cannot be one of its teachers: a setting is of another type than it takes"


def _kinds(kind: type[Teacher]) -> list[type[Teacher]]:
    """Return the classes of teachers that can be made."""
    own = [] if inspect.isabstract(kind) else [kind]
    return own + [one for sub in kind.__subclasses__() for one in _kinds(sub)]


def teacher_of(given: ModelArgument | Teacher | None) -> Teacher:
    """Return a user's teacher: none, a model in any of its forms, or a Teacher."""
    if isinstance(given, Teacher):
        return given
    return NoTeacher() if given is None else LoadedTeacher(given)
