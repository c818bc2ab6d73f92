"""Base of every exact method: a divergence between student and teacher, on chosen rows."""

from __future__ import annotations

from okd_lightning.callbacks.methods.base import DistillationCallback, check_fraction
from okd_lightning.divergences import Divergence, ForwardKL, as_divergence
from okd_lightning.divergences.tempered import at_temperature
from okd_lightning.errors import ConfigError
from okd_lightning.losses import DrawnLogProb, ExactDivergence, Measured, Quantity
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput, Source


class DivergenceCallback(DistillationCallback):
    """Minimise D(student, teacher), exact over the vocabulary, on dataset and on-policy responses.

    The loss of a token is (1 - w) τ² D(p^τ, q^τ) + w CE, with p^τ = softmax(z/τ), and w the
    ``cross_entropy_weight``. Gradient flows to the student, not to the teacher and not through
    sampling. Cross-entropy acts only on rows that the student did not sample: on its own samples it
    would train the student to repeat itself.

    Args:
        divergence: The minimised divergence; forward KL by default.
        temperature: τ of both distributions; scales loss and gradient by τ².
        cross_entropy_weight: w, in [0, 1).
        on_policy_fraction: Share of optimizer steps with on-policy samples, in [0, 1].
        seq_kd: Train the other steps on the teacher's generations instead of dataset responses.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ConfigError: A setting out of its range, two temperatures, or no divergence.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        temperature: float = 1.0,
        cross_entropy_weight: float = 0.0,
        on_policy_fraction: float = 0.0,
        seq_kd: bool = False,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.divergence = ForwardKL() if divergence is None else as_divergence(divergence)
        self.temperature = temperature
        self.cross_entropy_weight = check_fraction("cross_entropy_weight", cross_entropy_weight)
        self._on_policy_fraction = check_fraction("on_policy_fraction", on_policy_fraction)
        self.seq_kd = seq_kd
        if cross_entropy_weight == 1:
            raise ConfigError("cross_entropy_weight 1 leaves no divergence: use the method SFT")
        if cross_entropy_weight and on_policy_fraction == 1:
            raise ConfigError(
                f"cross_entropy_weight {cross_entropy_weight} has no effect with "
                "on_policy_fraction 1: there is no dataset response; set one of them to 0"
            )
        if seq_kd and on_policy_fraction == 1:
            raise ConfigError(
                "seq_kd has no effect with on_policy_fraction 1: the student generates every "
                "response; lower on_policy_fraction, or leave seq_kd out"
            )
        self._exact = ExactDivergence(at_temperature(self.divergence, temperature))

    @property
    def on_policy_fraction(self) -> float:
        """Share of optimizer steps with on-policy samples."""
        return self._on_policy_fraction

    @property
    def given_sources(self) -> tuple[Source, ...]:
        """Sources of the rows that are not on-policy."""
        if self.on_policy_fraction == 1:
            return ()
        return ("teacher",) if self.seq_kd else ("dataset",)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The off-policy sources, the student, or both."""
        own: tuple[Source, ...] = ("student",) if self.on_policy_fraction > 0 else ()
        return self.given_sources + own

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """The exact divergence, and the target's log-probability if cross-entropy is used."""
        if self.cross_entropy_weight:
            return (self._exact, DrawnLogProb())
        return (self._exact,)

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum over the rows of all sources, in nats."""
        mask, values = measured.mask(self.sources), measured[self._exact]
        w = self.cross_entropy_weight
        if not w:
            return loss_output(values, mask)
        cross_entropy = -measured[DrawnLogProb()]
        mixed = (1 - w) * values + w * cross_entropy
        is_given = measured.mask(self.given_sources)
        return loss_output(mixed.where(is_given, values), mask)
