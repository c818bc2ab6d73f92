"""Table of all kinds of teachers for the test battery, one entry per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tiny
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig

from okd_lightning.callbacks import GKD, KD, OKD, OPDPlus
from okd_lightning.teachers import (
    AdaptiveTeacher,
    AveragedSelf,
    CachedTeacher,
    ForeignTeacher,
    FrozenSelf,
    LiveSelf,
    LoadedTeacher,
    RoutedTeachers,
    ServedTeacher,
    Teacher,
    TeacherEnsemble,
)

ALL = tiny.NUM_IDS


@dataclass(frozen=True)
class Place:
    """Locations from which a kind makes its teacher.

    Attributes:
        teacher: Folder of a model without padding rows.
        cache: Folder for a cache.
        url: Address of a server with the same model, in float64.
        copy: Folder of another copy of the teacher.
        foreign_url: Address of a server with the same model and another tokenizer, in float64.
    """

    teacher: str
    cache: str
    url: str
    copy: str = ""
    foreign_url: str = "http://x"

    @property
    def both(self) -> list[tuple[str, str]]:
        return [("a", self.teacher), ("b", self.copy)]

    @property
    def foreign(self) -> str:
        return f"{self.teacher} tokenizer"


@dataclass(frozen=True)
class Kind:
    """A kind of teacher.

    Attributes:
        make: Makes it, as a user does.
        model: Further arguments of the module.
        method: A method that it serves on dataset responses.
        refuses: A method that it cannot serve, and the message's words.
        logged: The metric of the divergence to it.
        generates: Whether it can generate responses.
        is_student: Whether its first weights are the student's.
        moves: Whether its own weights change in training.
        has_cells: Whether a token is compared as {token, any other}.
        trained: What the names of its trained parameters hold; empty where nothing is trained.
        data: Further arguments of the data module; rows have the column "of".
    """

    make: Callable[[Place], Teacher]
    model: Mapping[str, Any] = field(default_factory=dict)
    method: Callable[[], Callback] = KD
    refuses: tuple[Callable[[], Callback], str] | None = None
    logged: str = "train/kd"
    generates: bool = True
    is_student: bool = False
    moves: bool = False
    has_cells: bool = False
    trained: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


def okd() -> OKD:
    return OKD(0.3, online_module=LoraConfig(r=2, target_modules=["q_proj"]))


def another_module() -> OKD:
    return OKD(online_module=LoraConfig(r=3))


ROUTED = {"teacher_column": "of"}
LORA = {"student_adapter": LoraConfig(r=2, target_modules=["v_proj"])}
FOLLOWS = (another_module, "follows the student")
KINDS: dict[str, Kind] = {
    "loaded": Kind(lambda at: LoadedTeacher(at.teacher)),
    "in host memory": Kind(
        lambda at: LoadedTeacher(at.teacher, residence="host"),
        refuses=(another_module, "residence host keeps a model that does not change"),
    ),
    "frozen self": Kind(lambda at: FrozenSelf(), is_student=True),
    "frozen self, LoRA": Kind(lambda at: FrozenSelf(), LORA, is_student=True),
    "averaged self": Kind(
        lambda at: AveragedSelf(),
        {"ema_decay": 0.5},
        refuses=FOLLOWS,
        is_student=True,
        moves=True,
    ),
    "live self": Kind(lambda at: LiveSelf(), refuses=FOLLOWS, is_student=True),
    "adaptive": Kind(
        lambda at: AdaptiveTeacher(LoadedTeacher(at.teacher), okd().settings),
        method=okd,
        logged="train/student_loss",
        refuses=(another_module, "two methods need different online modules"),
        moves=True,
        trained="lora_",
    ),
    "mixture of equals": Kind(lambda at: TeacherEnsemble([at.teacher, at.teacher], [0.3, 0.7])),
    "mixture with a module": Kind(
        lambda at: TeacherEnsemble(
            [AdaptiveTeacher(LoadedTeacher(at.teacher), okd().settings), at.teacher]
        ),
        method=okd,
        logged="train/student_loss",
        refuses=(another_module, "two methods need different online modules"),
        moves=True,
        trained="lora_",
    ),
    "routed to equals": Kind(
        lambda at: RoutedTeachers({"a": at.teacher, "b": at.copy}), data=ROUTED
    ),
    "routed, one in host memory": Kind(
        lambda at: RoutedTeachers({"a": LoadedTeacher(at.teacher, "host"), "b": at.copy}),
        data=ROUTED,
    ),
    "routed to servers": Kind(
        lambda at: RoutedTeachers({name: ServedTeacher(at.url, k=ALL) for name in "ab"}),
        refuses=(another_module, "is trained on a teacher"),
        generates=False,
        data=ROUTED,
    ),
    "routed, with modules": Kind(
        lambda at: RoutedTeachers(
            {name: AdaptiveTeacher(LoadedTeacher(one), okd().settings) for name, one in at.both}
        ),
        method=okd,
        logged="train/student_loss",
        refuses=(another_module, "two methods need different online modules"),
        moves=True,
        trained="lora_",
        data=ROUTED,
    ),
    "cached": Kind(
        lambda at: CachedTeacher(at.teacher, at.cache, ALL, "float32"),
        refuses=(lambda: GKD(on_policy_fraction=1.0), "which no cache can hold"),
        generates=False,
    ),
    "cached ensemble": Kind(
        lambda at: CachedTeacher(TeacherEnsemble([at.teacher, at.copy]), at.cache, ALL, "float32"),
        refuses=(another_module, "does not run one"),
        generates=False,
    ),
    "foreign": Kind(
        lambda at: ForeignTeacher(at.teacher, at.foreign, loss="chunk"),
        refuses=(lambda: OPDPlus(discount=0.5), "has discount 0.5"),
        generates=False,
        has_cells=True,
    ),
    "foreign, adaptive": Kind(
        lambda at: ForeignTeacher(at.teacher, at.foreign, loss="chunk").adapted(
            lambda inner: AdaptiveTeacher(inner, okd().settings)
        ),
        method=okd,
        logged="train/student_loss",
        generates=False,
        has_cells=True,
        moves=True,
        trained="lora_",
    ),
    "served, foreign": Kind(
        lambda at: ForeignTeacher(ServedTeacher(at.foreign_url, k=ALL), at.foreign),
        refuses=(another_module, "is trained on a teacher"),
        generates=False,
        has_cells=True,
    ),
    "served": Kind(
        lambda at: ServedTeacher(at.url, k=ALL),
        refuses=(another_module, "is trained on a teacher"),
        generates=False,
    ),
}
