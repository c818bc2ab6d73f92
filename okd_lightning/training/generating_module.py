"""Generation by a DistillationModule: in its run, ahead of training, and as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import lightning
from transformers import PreTrainedModel

from okd_lightning.engines import RolloutEngine, TransformersEngine
from okd_lightning.engines.ahead import AheadEngine
from okd_lightning.records.requests import Request, Rollout
from okd_lightning.training.ahead import ahead_engine
from okd_lightning.training.distilled_run import DistilledRun
from okd_lightning.training.generation import respond
from okd_lightning.training.pair import Pair


class GeneratingModule(lightning.LightningModule):
    """A LightningModule that generates with the models of its pair.

    Attributes:
        pair: The student and its teacher.
    """

    pair: Pair

    def respond(self, request: Request) -> Rollout:
        """Generate responses with the student or the teacher, in eval mode and without gradient."""
        return respond(cast(DistilledRun, self), request)

    def ahead_engine(self, lag: int) -> Callable[[], AheadEngine]:
        """Return the function that starts an engine for rollouts ahead of training.

        Raises:
            ConfigError: The run's engine or strategy cannot generate ahead.
        """
        return ahead_engine(cast(DistilledRun, self), lag)

    def build_engine(self, model: PreTrainedModel) -> RolloutEngine:
        """Build the built-in engine on ``model``; override to use another for both models."""
        return TransformersEngine(model, self.pair.vocabulary, self.pair.eos_ids)

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """Return the text of some ids, with or without special tokens."""
        kept = {"skip_special_tokens": not special_tokens, "clean_up_tokenization_spaces": False}
        return str(self.pair.tokenizer.decode(list(ids), **kept))
