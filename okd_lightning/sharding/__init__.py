"""Models in shards over all devices (FSDP2). No other package uses FSDP, DTensor or meshes.

* ``plan``: the modules of a model that are gathered and freed together as units.
* ``placement``: the running of a model by other packages: whole, or in gathered shards.
* ``loading``: filling shards from files, so that no rank ever holds a whole model.
* ``state``: weights and optimizer states, from shards to files and back.
* ``strategy``: ``--trainer.strategy fsdp2``.
"""

from lightning.pytorch.strategies import StrategyRegistry

from okd_lightning.sharding.placement import Placement, ShardedModels
from okd_lightning.sharding.plan import ShardSettings, shard
from okd_lightning.sharding.state import whole
from okd_lightning.sharding.strategy import FSDP2Strategy

FSDP2Strategy.register_strategies(StrategyRegistry)  # as Lightning does for its own

__all__ = [
    "FSDP2Strategy",
    "Placement",
    "ShardSettings",
    "ShardedModels",
    "shard",
    "whole",
]
