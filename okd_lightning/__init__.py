"""Knowledge distillation of autoregressive language models on PyTorch Lightning.

Main names for scripts. They are imported at first use, because importing torch and transformers
takes seconds:

    from okd_lightning import GKD, DistillationModule, RolloutDataModule
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.4.0"

if TYPE_CHECKING:
    from okd_lightning.callbacks import (
        GKD,
        KD,
        OKD,
        OPD,
        SFT,
        AdvantageCallback,
        DistillationCallback,
        DivergenceCallback,
        OPDPlus,
        Reward,
        Stage,
    )
    from okd_lightning.data import RolloutDataModule
    from okd_lightning.divergences import Divergence
    from okd_lightning.training.lightning_messages import quiet
    from okd_lightning.training.module import DistillationModule

__all__ = [
    "GKD",
    "KD",
    "OKD",
    "OPD",
    "SFT",
    "AdvantageCallback",
    "DistillationCallback",
    "DistillationModule",
    "Divergence",
    "DivergenceCallback",
    "OPDPlus",
    "Reward",
    "RolloutDataModule",
    "Stage",
    "__version__",
    "quiet",
]

_HOMES = {
    "DistillationModule": "okd_lightning.training.module",
    "Divergence": "okd_lightning.divergences",
    "RolloutDataModule": "okd_lightning.data",
    "quiet": "okd_lightning.training.lightning_messages",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'okd_lightning' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "okd_lightning.callbacks")), name)
