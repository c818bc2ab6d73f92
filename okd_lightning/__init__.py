"""Knowledge distillation of autoregressive language models on PyTorch Lightning.

Main names for scripts. They are imported at first use, because importing torch and transformers
takes seconds:

    from okd_lightning import GKD, DistillationModule, RolloutDataModule
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jsonargparse import set_parsing_settings

__version__ = "0.1.0"

_DENIED = (
    *("IPython", "cffi", "cloudpickle", "dill", "joblib", "pexpect", "ptyprocess"),
    *("numpy.ctypeslib", "numpy.f2py", "numpy.load", "pandas.eval", "pandas.read_pickle"),
    *("torch.distributed.elastic", "torch.distributed.launch", "torch.distributed.run"),
    *("torch.hub", "torch.load", "torch.multiprocessing", "torch.package", "torch.serialization"),
    *("torch.utils.cpp_extension", "torch.utils.model_zoo"),
)
"""Additions to jsonargparse's own list (os, subprocess, pickle, importlib and the like)."""

# For the whole process, a script's own parsers too: a value of a type that accepts anything
# (``dict[str, Any]``) never becomes an object, and nothing that runs programs or reads pickles can
# be named, wherever a config comes from. ``config_trust``: what a checkpoint's config may name.
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=[*_DENIED])

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
]

_HOMES = {
    "DistillationModule": "okd_lightning.training.module",
    "Divergence": "okd_lightning.divergences",
    "RolloutDataModule": "okd_lightning.data",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'okd_lightning' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "okd_lightning.callbacks")), name)
