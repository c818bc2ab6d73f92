"""Lightning OPD: on-policy distillation on fixed rollouts, with a teacher that need not be there.

Wu et al., "Lightning OPD: Efficient Post-Training for Large Reasoning Models with Offline On-Policy
Distillation", arXiv 2604.13010: the student, fine-tuned on the teacher's responses, answers every
prompt once; the teacher's log-probabilities of these tokens are computed once; then the student is
trained on them with OPD's credit log q - log p of the current student, without importance weights.

1. ``okd-lightning fit --method SFT --method.seq_kd true`` (or on data the same teacher has written:
   with another teacher both kinds of OPD have a biased optimum, section 3 of the paper).
2. ``okd-lightning predict`` with that student: ``predictions.jsonl``.
3. This method on that file, with ``--model.teacher_cache FOLDER``: the teacher is loaded to write
   the cache, and never while training.

Differs from the paper:

- Rollouts come as text and are tokenized again; where that gives other ids than were sampled, the
  run trains on those.

Differs from the released code (jet-ai-projects/Lightning-OPD, commit cd6b559):

- There PPO's clip of 0.2 is on the ratio to the student at the start of the step, which is 1 in the
  released configs (one step a batch); here there is none.
- There responses of one batch are averaged one by one, and then over the batch; here every token
  counts alike.
"""

from __future__ import annotations

from torch import Tensor

from okd_lightning import DistillationCallback
from okd_lightning.divergences import ReverseKL
from okd_lightning.losses import DrawnLogProb, DrawnOutcome, Measured
from okd_lightning.losses.reduction import loss_output
from okd_lightning.records.batches import LossOutput

_STUDENT, _TEACHER = DrawnLogProb("student"), DrawnOutcome("teacher", ReverseKL())


class LightningOPD(DistillationCallback):
    """-(log q - log p) ∇log p on the responses of the data set, which an earlier student sampled.

    Logged besides: ``train/<name>_log_ratio``, the mean of log q - log p.

    Args:
        weight: Factor on this term's mean loss.
        name: Logged as ``train/<name>``.
    """

    sources = ("dataset",)
    on_policy_fraction = 0.0
    quantities = (_STUDENT, _TEACHER)

    def loss(self, measured: Measured) -> LossOutput:
        """The sum of -A over the data set's rows; its gradient is -A ∇log p, A a constant."""
        logprobs = measured[_STUDENT]
        credit: Tensor = (measured[_TEACHER] - logprobs).detach()
        values = -credit * (logprobs - logprobs.detach()).exp()
        logged = {f"{self.name}_log_ratio": credit}
        return loss_output(values, measured.mask(self.sources), **logged)
