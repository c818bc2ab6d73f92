"""The router's balancing loss of a mixture-of-experts student."""

from __future__ import annotations

import lightning

from okd_lightning.callbacks.methods.base import DistillationCallback
from okd_lightning.losses import Measured, Quantity, RouterBalance
from okd_lightning.losses.reduction import loss_output
from okd_lightning.models import load_model_config
from okd_lightning.models.routers import check_has_experts
from okd_lightning.records.batches import SOURCES, LossOutput, Source
from okd_lightning.training.module import DistillationModule


class ExpertBalance(DistillationCallback):
    """Balance the experts of a student that is a mixture of experts, next to another method.

    The loss of a token is its row's E Σ_e f_e P_e (Switch Transformer, arXiv 2101.03961, Eqs. 4-6),
    mean over MoE layers: f_e is the share of the row's assignments (tokens × top_k) that go to
    expert e, P_e the mean of the softmax of the raw router logits over the row's real tokens. It is
    1 where all experts get equal shares and E where one gets all. The product is not linear in the
    batch: it is taken for each row, so that it does not depend on micro-batches, ranks or packing.
    transformers' ``router_aux_loss_coef`` has no effect in this library; its loss averages over
    all layers and tokens of a micro-batch before the product, and is top_k times as large. Logged:
    ``train/<name>``, the mean over loss tokens.

    Gradient flows to the routers and to what they read. The rows are those that the other methods
    of the run need. The teacher does not take part.

    Args:
        weight: Factor on this term's mean loss; 0.001 to 0.01 is usual.
        name: Logged as ``train/<name>``; two methods of one class need different names.

    Raises:
        ModelError: At set-up, a dense student; at the first step, one whose routers do not choose
            by their largest logits.
    """

    on_policy_fraction = None
    sources: tuple[Source, ...] = SOURCES
    quantities: tuple[Quantity, ...] = (RouterBalance(),)

    def __init__(self, weight: float = 0.001, name: str | None = None) -> None:
        super().__init__(weight, name)

    def prepare(self, trainer: lightning.Trainer, module: DistillationModule, stage: str) -> None:
        """Refuse a dense student, before its weights are loaded.

        Raises:
            ModelError: Its config names no experts.
        """
        super().prepare(trainer, module, stage)
        if stage == "fit":
            pair = module.pair
            given = pair.student or pair.student_source
            check_has_experts(load_model_config(given, "--model.student", pair.vocabulary.size))

    def loss(self, measured: Measured) -> LossOutput:
        """Return the sum of the rows' balances over their loss tokens, without unit."""
        return loss_output(measured[RouterBalance()], measured.mask(self.sources))
