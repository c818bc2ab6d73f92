"""The TeacherEnsemble: several models as one distribution, a mixture or a product."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Literal, TypeAlias, final, get_args

from torch import Tensor

from okd_lightning.errors import ConfigError
from okd_lightning.losses import Mixing, Mixture, Product, Quantity, Side, mixed_side
from okd_lightning.models import ModelArgument, ModelSource
from okd_lightning.records.batches import DistillBatch
from okd_lightning.teachers.base import Teacher
from okd_lightning.teachers.loaded import teacher_of
from okd_lightning.teachers.run import GeneratingModels
from okd_lightning.teachers.several import SeveralTeachers, argument_of, name_of

EnsembleKind: TypeAlias = Literal["mixture", "product"]
_SUM_TOLERANCE = 1e-4


@final
class TeacherEnsemble(SeveralTeachers):
    """Several models as one distribution, which every method uses like one model.

    A mixture is log q = logsumexp_k(log w_k + log q_k), a product q = softmax(sum_k w_k log q_k).
    A temperature acts on the mixed distribution. OKD's online module is put on the first model of
    positive weight and is trained through the mixture.

    Args:
        teachers: The models, in the forms of LoadedTeacher, over one vocabulary.
        weights: One number per model, at least 0; equal shares by default. A mixture's sum to 1. A
            model of weight 0 is left out, and not loaded.
        kind: mixture or product.

    Raises:
        ConfigError: No teachers, one that has no model in this process, or weights that do not fit.
    """

    def __init__(
        self,
        teachers: list[Teacher | ModelArgument],
        weights: list[float] | None = None,
        kind: EnsembleKind = "mixture",
    ) -> None:
        if kind not in get_args(EnsembleKind):
            raise ConfigError(f"model.teacher.kind is {kind!r}; expected mixture or product")
        self.weights = _checked_weights(weights, len(teachers), kind)
        self.kind = kind
        self._given = [teacher_of(one) for one in teachers]
        self._given_weights = weights
        self._mixing: Mixing = (Mixture if kind == "mixture" else Product)(
            tuple(weight for weight in self.weights if weight)
        )
        pairs = zip(self._given, self.weights, strict=True)
        super().__init__([one for one, weight in pairs if weight])

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The models, their weights and the kind."""
        models = [argument_of(one) for one in self._given]
        return {"teachers": models, "weights": self._given_weights, "kind": self.kind}

    @property
    def mark(self) -> str:
        """The kind, and each model's weight and name: a run resumes with the same."""
        pairs = zip(self.members, self._mixing.weights, strict=True)
        shown = (f"{weight:g} of {name_of(member)}" for member, weight in pairs)
        return f"TeacherEnsemble ({self.kind}: {', '.join(shown)})"

    def adapted(self, adapt: Callable[[Teacher], Teacher]) -> Teacher:
        """Put the online module on the first member."""
        return self.with_members(lambda number, one: one if number else one.adapted(adapt))

    def identity(self, digest: Callable[[ModelSource], str]) -> str:
        """Return a digest of the members' identities, their weights and their kind of mixing."""
        members = [member.identity(digest) for member in self.members]
        return sha256(repr((self._mixing, members)).encode()).hexdigest()

    def side(self, batch: DistillBatch, quantities: Sequence[Quantity]) -> Side:
        """Return the side of the mixed distribution, with gradient as each member gives it."""
        return self._mixed([member.side(batch, quantities) for member in self.members])

    def base_side(self, batch: DistillBatch) -> Side:
        """Return the same without trained parameters; a constant."""
        return self._mixed([member.base_side(batch) for member in self.members])

    def _mixed(self, sides: Sequence[Side]) -> Side:
        if self._mixing.weights == (1.0,):
            return sides[0]
        return mixed_side(sides, self._mixing)

    def generator(self) -> GeneratingModels:
        """Return all members' models, whose mixed distribution is sampled."""
        parts = [member.generator() for member in self.members]
        models = tuple(model for part in parts for model in part.models)
        sizes = [len(part.models) for part in parts]
        mixing, end_ids = self._mixing, self.run.vocabulary.end_ids

        def mix(logits: Sequence[Tensor]) -> Tensor:
            start, found = 0, []
            for part, size in zip(parts, sizes, strict=True):
                own = logits[start : start + size]
                found.append(own[0] if part.mix is None else part.mix(own))
                start += size
            return found[0] if mixing.weights == (1.0,) else mixing(found, end_ids)

        return GeneratingModels(models, self.as_base(), mix if len(models) > 1 else None)


def _checked_weights(weights: Sequence[float] | None, count: int, kind: str) -> tuple[float, ...]:
    """Return one finite weight per model; equal shares where none are given.

    Raises:
        ConfigError: Another number of weights, a negative one, only zeros, or a mixture's that do
            not sum to 1.
    """
    if weights is None:
        return (1.0 / count,) * count if count else ()
    option = f"model.teacher.weights {list(weights)}"
    if len(weights) != count:
        raise ConfigError(
            f"{option}: expected one weight per teacher ({count}), got {len(weights)}"
        )
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not any(weights):
        raise ConfigError(f"{option}: expected numbers of at least 0, and one above 0")
    total = math.fsum(weights)
    if kind == "mixture" and abs(total - 1) > _SUM_TOLERANCE:
        shares = ", ".join(f"{weight / total:.4g}" for weight in weights)
        raise ConfigError(
            f"{option}: a mixture's weights sum to 1, and these to {total:g}; give [{shares}]"
        )
    if kind == "mixture":
        return tuple(weight / total for weight in weights)
    return tuple(float(weight) for weight in weights)
