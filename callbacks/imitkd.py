"""ImitKD: imitation learning of the teacher, on dataset responses and on-policy samples.

Lin et al., "Autoregressive Knowledge Distillation through Imitation Learning", arXiv 2009.07253.

Differs from the paper:

- Its mixing weight falls over training; here the share is constant, with a random choice for each
  optimizer step (as in GKD, arXiv 2306.13649). ``Stage`` changes it in steps.
- Its "optimal" variant imitates the teacher's most likely next token; here the teacher's whole
  distribution is imitated (its "full" variant).

Differs from the released code (asappresearch/imitkd, commit 8b9fadd), whose "full" loss is the
teacher's entropy more than this one on the same logits, with the same gradient, to 1e-15:

- There the source is drawn for every row, and the share of the data set's responses falls from 1
  (linearly, or as 200^(-t/N) over N steps).
- There the student's responses are greedy, or drawn from its 5 most likely ids, and 4 batches are
  generated at once, before the steps that train on them.
- Its default is the "optimal" variant; on the data set's responses that is their cross-entropy.
"""

from __future__ import annotations

from okd_lightning import DivergenceCallback
from okd_lightning.divergences import ForwardKL


class ImitKD(DivergenceCallback):
    """Forward KL to the teacher on dataset responses and on-policy samples.

    Args:
        on_policy_fraction: Share of optimizer steps with on-policy samples.
        temperature: τ of both distributions; scales loss and gradient by τ².
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    def __init__(
        self,
        on_policy_fraction: float = 0.5,
        temperature: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            ForwardKL(),
            temperature=temperature,
            on_policy_fraction=on_policy_fraction,
            weight=weight,
            name=name,
        )
