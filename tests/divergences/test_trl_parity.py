"""JSD(beta) against an independent implementation: TRL's GKD trainer.

TRL shares our convention (beta = 0 is KL(teacher‖student)) and tempers both sides, but leaves out
tau^2; its reduction "sum" runs over positions and ids.
"""

from __future__ import annotations

import pytest
import torch

from okd_lightning.divergences import JensenShannon, Tempered

# TRL says on import that this part of it may change; its pinned range is ours to watch.
pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")


@pytest.fixture(scope="module")
def generalized_jsd_loss():
    pytest.importorskip("trl", reason="TRL is installed for this comparison only (extra: dev)")
    from trl.experimental.gkd import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_value_and_gradient_equal_trls(generalized_jsd_loss, beta, temperature):
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(2, 2, 5, 11, generator=generator, dtype=torch.float64)
    student, teacher = logits[0].clone().requires_grad_(), logits[1]
    theirs = generalized_jsd_loss(
        student, teacher, beta=beta, temperature=temperature, reduction="sum"
    )
    divergence = Tempered(JensenShannon(beta), temperature)
    ours = divergence.value(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)).sum()
    torch.testing.assert_close(ours, temperature**2 * theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, student)[0],
        temperature**2 * torch.autograd.grad(theirs, student)[0],
    )
