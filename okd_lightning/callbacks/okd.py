"""Online knowledge distillation: the teacher adapts to the student while it teaches."""

from __future__ import annotations

import lightning
from peft import LoraConfig, PeftConfig

from okd_lightning.callbacks.base import DistillationCallback, check_fraction
from okd_lightning.divergences import Divergence, ForwardKL, ReverseKL, Tempered
from okd_lightning.errors import ConfigError
from okd_lightning.losses import DrawnLogProb, ExactDivergence, Measured, Quantity
from okd_lightning.models import OnlineModuleSettings
from okd_lightning.module import DistillationModule
from okd_lightning.records import LossOutput, Source
from okd_lightning.reduction import loss_output


class OKD(DistillationCallback):
    """Student and a small online module on the teacher learn from each other (Rao et al., Alg. 1).

    With student p, adaptive teacher q and temperature τ (arXiv 2409.12512, Eq. 2; its roles are
    written the other way round there), the two losses of a token are::

        student:        τ² KL(q^τ‖p^τ)                             q is a constant
        online module:  α τ² KL(p^τ‖q^τ) + (1-α) CE(y; q)          p is a constant

    Each side is detached for the other, and their parameters are disjoint: one backward pass over
    the sum is the paper's simultaneous update. The cross-entropy holds the teacher to the data; on
    rows that the student wrote itself it is left out. The paper does not state α, τ, the module's
    scale or its learning rate: the defaults are ours.

    Args:
        alpha: Weight of the divergence against the cross-entropy in the module's loss, in [0, 1);
            docs/okd.md has the figures behind the default.
        temperature: τ of both distributions; scales losses and gradients by τ².
        divergence: The student's; forward KL by default.
        teacher_divergence: The module's, D(student, teacher); reverse KL, KL(p‖q), by default.
        online_module: Any PEFT config; LoRA of rank 32 on the query and value projections by
            default.
        learning_rate: Of the online module; the student's by default.
        clip_norm: Gradient norm of the online module; the student's by default.
        on_policy_fraction: Share of optimizer steps whose responses the student writes; 0 is the
            paper's.
        weight: Factor on this term's mean loss.
        name: Logged as train/<name>; two methods of one class need different names.

    Raises:
        ConfigError: A setting out of its range; alpha = 1, which leaves nothing to hold the
            teacher.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        temperature: float = 1.0,
        divergence: Divergence | None = None,
        teacher_divergence: Divergence | None = None,
        online_module: PeftConfig | None = None,
        learning_rate: float | None = None,
        clip_norm: float | None = None,
        on_policy_fraction: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.alpha = check_fraction("alpha", alpha)
        if alpha == 1:
            raise ConfigError(
                "OKD: alpha 1 leaves nothing that holds the teacher to the data: it would move to "
                "wherever the student is; expected a number in [0, 1)"
            )
        for setting, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
            if value is not None and not value > 0:
                raise ConfigError(f"OKD: {setting} must be above 0, got {value}")
        self.settings = OnlineModuleSettings(
            config=online_module if online_module is not None else LoraConfig(r=32, lora_alpha=32),
            learning_rate=learning_rate,
            clip_norm=clip_norm,
        )
        self._on_policy_fraction = check_fraction("on_policy_fraction", on_policy_fraction)
        student, teacher = divergence or ForwardKL(), teacher_divergence or ReverseKL()
        if temperature != 1:
            student, teacher = Tempered(student, temperature), Tempered(teacher, temperature)
        self._student = ExactDivergence(student)
        self._module = ExactDivergence(teacher, learner="teacher")
        self._target = DrawnLogProb("teacher")

    @property
    def on_policy_fraction(self) -> float:
        """Share of optimizer steps that are the student's own generations."""
        return self._on_policy_fraction

    @property
    def sources(self) -> tuple[Source, ...]:
        """The data set's rows, the student's, or both."""
        given: tuple[Source, ...] = ("dataset",) if self.on_policy_fraction < 1 else ()
        own: tuple[Source, ...] = ("student",) if self.on_policy_fraction > 0 else ()
        return given + own

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Both divergences, and the adaptive teacher's log-prob of the target."""
        return (self._student, self._module, self._target)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Ask for the online module, in every stage: checkpoints hold its weights."""
        module.add_online_module(self.settings)

    def loss(self, measured: Measured) -> LossOutput:
        """Both sides' sums, in nats; their gradients reach disjoint parameters."""
        student, divergence = measured[self._student], measured[self._module]
        is_given = measured.mask(("dataset",))
        cross_entropy = -measured[self._target]
        anchored = self.alpha * divergence + (1 - self.alpha) * cross_entropy
        module = anchored.where(is_given, self.alpha * divergence)
        return loss_output(
            student + module,
            measured.mask(self.sources),
            student_loss=student,
            online_module_loss=module,
            online_module_divergence=divergence,
            teacher_cross_entropy=cross_entropy,
        )
