"""vOPD: on-policy distillation with a control variate.

Oh et al., "KL for a KL: On-Policy Distillation with Control Variate Baseline", arXiv 2605.07865,
Eqs. 9-15: the advantage of a token is log q - log p minus the value of its state, -KL(p‖q) in
closed form.

Differs from the paper:

- Its cheaper baseline over the student's top k is left out: the baseline over the whole vocabulary
  is computed in the pass that measures log p.
- The advantage uses the current student, also if a rollout batch serves several steps.

Differs from the released code (holi-lab/vOPD, commit c77a078), whose advantages on the same logits
are these to 4e-16 in float64 (``configs/training/vopd.yaml``):

- Its baseline over the student's top k (``vopd-topk.yaml``) renormalises both models' distributions
  over these k ids, so that it is another constant of the state.
- Its own defaults are LoRA of rank 64 on all projections, bfloat16 and a cosine from 1e-5; the loss
  is that of TRL's MiniLLM trainer. Here these are options of the model; every token counts alike.
"""

from __future__ import annotations

from okd_lightning import AdvantageCallback
from okd_lightning.advantages import FDivergenceAdvantage
from okd_lightning.divergences import ReverseKL


class VOPD(AdvantageCallback):
    """Policy gradient with A = ln(q/p) + KL(p‖q), which has mean zero in every state.

    It has the expected gradient of OPD's ln(q/p) with less variance: OPDPlus with reverse KL and
    its value baseline.

    Args:
        max_ratio: Truncation of ρ; inf for off. By default off, and 2 with ``data.rollout_lag``.
        clip: PPO's ε; None for off.
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    def __init__(
        self,
        max_ratio: float | None = None,
        clip: float | None = None,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        advantage = FDivergenceAdvantage(ReverseKL(), "value_baseline")
        super().__init__(advantage, max_ratio, clip, weight, name)
