"""Online knowledge distillation: the teacher adapts to the student during training."""

from __future__ import annotations

import math

import lightning
from lightning.pytorch.utilities import rank_zero_warn
from peft import LoraConfig, PeftConfig

from okd_lightning.callbacks.methods.base import DistillationCallback, check_fraction
from okd_lightning.divergences import Divergence, ForwardKL, ReverseKL, as_divergence
from okd_lightning.divergences.tempered import at_temperature
from okd_lightning.errors import ConfigError
from okd_lightning.losses import DrawnLogProb, ExactDivergence, Measured, Quantity, TeacherShift
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput, Source
from okd_lightning.teachers import OnlineModuleSettings
from okd_lightning.teachers.online_module import ScheduleName, check_schedule
from okd_lightning.training.module import DistillationModule


class OKD(DistillationCallback):
    """Student and a small online module on the teacher learn from each other (Rao et al., Alg. 1).

    With student p, adaptive teacher q and temperature τ (arXiv 2409.12512, Eq. 2, which names the
    roles the other way round), the two losses of a token are:

        student:        τ² KL(q^τ‖p^τ)                             q is a constant
        online module:  α τ² KL(p^τ‖q^τ) + (1-α) CE(y; q)          p is a constant
                        + anchor_weight τ² KL(q0^τ‖q^τ)            q0, the base, is a constant

    Each side is detached for the other, and their parameters are disjoint: one backward pass over
    the sum is the paper's simultaneous update. The cross-entropy keeps the teacher close to the
    data; on-policy rows do not have it. The paper does not state α, τ, the module's scale or its
    learning rate: the defaults are ours.

    The anchor is our addition, not in the paper: it keeps the teacher close to its base, on rows of
    every source. It has the direction of the cross-entropy, with the base's distribution in place
    of the one-hot target: the gradient in a logit, q - q0, is bounded where the base is certain,
    unlike that of KL(q‖q0), and the teacher must keep all modes of the base. It costs a second
    forward pass of the teacher, without gradient and without a second copy of its weights.

    Logged as train/..., in nats per token (mean over the term's tokens): ``student_loss``;
    ``online_module_loss`` and its parts before their weights, ``online_module_divergence`` (to the
    student), ``teacher_cross_entropy`` (on all rows) and, if it is measured, ``teacher_shift``,
    the τ² KL to the base. Validation always logs it at τ = 1, as ``val/adapted_teacher_shift``.

    Args:
        alpha: Weight of the divergence against the cross-entropy in the module's loss, in [0, 1),
            or 1 with an anchor; docs/okd.md has the figures for the default.
        temperature: τ of both distributions; scales losses and gradients by τ².
        divergence: The student's; forward KL by default.
        teacher_divergence: The module's, D(student, teacher); reverse KL, KL(p‖q), by default.
        online_module: Any PEFT config; LoRA of rank 32 on the query and value projections by
            default.
        learning_rate: Learning rate of the online module; the student's by default.
        clip_norm: Largest gradient norm of the online module; the student's by default.
        warmup_steps: Warm-up steps of the module's learning rate; the student's by default.
        schedule: Schedule of the module's learning rate after warm-up; the student's by default.
        anchor_weight: Factor on the KL to the base; 0 for none.
        log_shift: Measure ``teacher_shift`` in training also without an anchor, at the cost of the
            second forward pass.
        on_policy_fraction: Share of optimizer steps with on-policy samples; 0 is the paper's. 1
            needs an anchor, because these rows have no cross-entropy.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ConfigError: A setting out of its range, or two temperatures; without an anchor, alpha = 1
            or on_policy_fraction = 1, because nothing would keep the teacher close to the data.
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
        warmup_steps: int | None = None,
        schedule: ScheduleName | None = None,
        anchor_weight: float = 0.0,
        log_shift: bool = False,
        on_policy_fraction: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.alpha = check_fraction("alpha", alpha)
        self._on_policy_fraction = check_fraction("on_policy_fraction", on_policy_fraction)
        self.anchor_weight = anchor_weight
        self._check_teacher_is_held()
        for setting, value in (("learning_rate", learning_rate), ("clip_norm", clip_norm)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"OKD: {setting} must be a number above 0, got {value}")
        if warmup_steps is not None and warmup_steps < 0:
            raise ConfigError(f"OKD: warmup_steps must be a number from 0 on, got {warmup_steps}")
        if schedule is not None:
            check_schedule(schedule, "method.schedule")
        self.settings = OnlineModuleSettings(
            config=online_module if online_module is not None else LoraConfig(r=32, lora_alpha=32),
            learning_rate=learning_rate,
            clip_norm=clip_norm,
            warmup_steps=warmup_steps,
            schedule=schedule,
        )
        self.divergence = ForwardKL() if divergence is None else as_divergence(divergence)
        backward: Divergence = ReverseKL()
        if teacher_divergence is not None:
            backward = as_divergence(teacher_divergence, "teacher_divergence")
        self._student = ExactDivergence(at_temperature(self.divergence, temperature))
        self._module = ExactDivergence(at_temperature(backward, temperature), "teacher")
        self._target = DrawnLogProb("teacher")
        shift = at_temperature(ForwardKL(), temperature)
        self._shift = TeacherShift(shift, learns=anchor_weight > 0)
        self._has_shift = anchor_weight > 0 or log_shift

    def _check_teacher_is_held(self) -> None:
        if not (math.isfinite(self.anchor_weight) and self.anchor_weight >= 0):
            raise ConfigError(
                f"OKD: anchor_weight must be a number from 0 on, got {self.anchor_weight}"
            )
        if self.anchor_weight > 0:
            return
        if self.alpha == 1:
            raise ConfigError(
                "OKD: alpha 1 leaves no loss that keeps the teacher close to the data, so that it "
                "would only follow the student; expected a number in [0, 1), or an anchor_weight "
                "above 0"
            )
        if self._on_policy_fraction == 1:
            raise ConfigError(
                "OKD: on_policy_fraction 1 leaves no dataset responses, whose cross-entropy keeps "
                "the teacher close to the data, so that it would only follow the student; expected "
                "a "
                "number in [0, 1), or an anchor_weight above 0"
            )

    @property
    def on_policy_fraction(self) -> float:
        """Share of optimizer steps with on-policy samples."""
        return self._on_policy_fraction

    @property
    def sources(self) -> tuple[Source, ...]:
        """The dataset, the student, or both."""
        given: tuple[Source, ...] = ("dataset",) if self.on_policy_fraction < 1 else ()
        own: tuple[Source, ...] = ("student",) if self.on_policy_fraction > 0 else ()
        return given + own

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """Both divergences, the adaptive teacher's log-probability of the target, and its shift."""
        shift = (self._shift,) if self._has_shift else ()
        return (self._student, self._module, self._target, *shift)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Add the online module to the module, in every stage: checkpoints hold its weights."""
        module.add_online_module(self.settings)
        if stage == "fit" and self.alpha > 0 and isinstance(self.divergence, ReverseKL):
            rank_zero_warn(
                "OKD: a student that minimises reverse KL and a teacher that moves towards it can "
                "collapse together to a few tokens: in docs/okd.md's ablation (alpha 0.5) forward "
                "KL to the base was 3.71 nats per token with the online module and 0.71 without, "
                "exact match 0 and 0.17; take the default divergence, ForwardKL, or lower alpha, "
                "and watch val/forward_kl"
            )

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum of both losses, in nats; their gradients reach disjoint parameters."""
        student, divergence = measured[self._student], measured[self._module]
        is_given = measured.mask(("dataset",))
        cross_entropy = -measured[self._target]
        held = self.alpha * divergence + (1 - self.alpha) * cross_entropy
        module = held.where(is_given, self.alpha * divergence)
        shift = {"teacher_shift": measured[self._shift]} if self._has_shift else {}
        if self.anchor_weight > 0:
            module = module + self.anchor_weight * shift["teacher_shift"]
        return loss_output(
            student + module,
            measured.mask(self.sources),
            student_loss=student,
            online_module_loss=module,
            online_module_divergence=divergence,
            teacher_cross_entropy=cross_entropy,
            **shift,
        )
