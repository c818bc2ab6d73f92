"""Check of a pair's end ids: each model's probability of them where a response ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from okd_lightning.commands.diagnose.findings import Check, Verdict
from okd_lightning.commands.diagnose.responses import Responses
from okd_lightning.losses import Agreement
from okd_lightning.models import find_end_tokens
from okd_lightning.training.module import DistillationModule

_AT_LEAST = 0.01
"""Mean probability from which a special token is listed as an end."""

_BAD, _LOOK = 0.5, 0.2
"""Total variation between both models' shares of the ends."""

_SOURCES = {"given": "dataset responses", "student": "the student's", "teacher": "the teacher's"}


def end_check(module: DistillationModule, responses: Sequence[Responses], batch_size: int) -> Check:
    """Compare both models' probability of each end id at the last token of ended responses.

    Args:
        module: A module whose models are on their devices.
        responses: Responses of each kind.
        batch_size: Rows of a forward pass.
    """
    named = module.pair.ends.described(module.tokenizer)
    masses = {
        one.author: _last_masses(module, one, batch_size) for one in responses if any(one.ended)
    }
    if not masses:
        return Check("eos", "look", f"{named}; no response ends by itself, so neither model shows")
    ids = _candidates(module, list(masses.values()))
    found = "; ".join(
        f"at the end of {_SOURCES[source]} {_listed(mass[:, ids], ids)}"
        for source, mass in masses.items()
    )
    together = torch.stack([mass[:, ids] for mass in masses.values()]).mean(0)
    distance = _distance(together, ids, module.vocabulary.end_ids)
    verdict: Verdict = "bad" if distance > _BAD else "look" if distance > _LOOK else "good"
    text = f"{named}; {found}"
    if verdict != "good":
        shares = together / together.sum(-1, keepdim=True)
        missing = [i for i, share in zip(ids, shares.T, strict=True) if share.max() >= _LOOK / 2]
        wanted = list(dict.fromkeys([*module.vocabulary.end_ids, *missing]))
        text += (
            "; the models end with different ids, which are compared one by one: on-policy "
            "training would remove the student's end, and its responses would grow to their "
            f"limit; make them one outcome with --model.end_tokens [{','.join(map(str, wanted))}]"
        )
    return Check("eos", verdict, text)


@torch.no_grad()
def _last_masses(module: DistillationModule, responses: Responses, batch_size: int) -> Tensor:
    """Return [2, vocab] mean probabilities of student and teacher at the last token."""
    pairs = zip(responses.rows, responses.ended, strict=True)
    ended = replace(responses, rows=tuple(row for row, has_ended in pairs if has_ended), ended=())
    total, count = torch.zeros(2, module.vocabulary.size, dtype=torch.float64), 0
    for batch in ended.batches(batch_size, module.device):
        student, teacher, _ = module.pair.sides(batch, [Agreement()])
        assert teacher is not None
        row = batch.student_reads.places.row
        is_last = torch.ones_like(row, dtype=torch.bool)
        is_last[:-1] = row[1:] != row[:-1]
        for place, side in enumerate((student, teacher)):
            probs = side.head(side.hidden[is_last]).double().softmax(-1)
            total[place] += probs.sum(0).cpu()
        count += int(is_last.sum())
    return total / max(1, count)


def _candidates(module: DistillationModule, masses: Sequence[Tensor]) -> list[int]:
    """Return the known end ids, and special tokens with probability at that position."""
    pair = module.pair
    teachers = pair.teacher.own_sources
    usual = find_end_tokens(pair.student_source, teachers, module.tokenizer, module.vocabulary)
    known = list(dict.fromkeys([*module.vocabulary.end_ids, *module.eos_ids, *usual.end_ids]))
    tokenizer = module.tokenizer
    specials = set(tokenizer.all_special_ids)
    specials |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = torch.stack(list(masses)).amax((0, 1))
    more = [i for i in sorted(specials) if i < len(largest) and largest[i] >= _AT_LEAST]
    return list(dict.fromkeys([*known, *more]))


def _distance(masses: Tensor, ids: Sequence[int], end_ids: Sequence[int]) -> float:
    """Return the total variation between both models' shares of the ends, in [0, 1].

    Args:
        masses: [2, ids].
        ids: The ids.
        end_ids: Those that are one outcome.
    """
    shares = masses / masses.sum(-1, keepdim=True).clamp(min=1e-12)
    is_merged = torch.tensor([i in end_ids for i in ids])
    outcomes = torch.cat([shares[:, ~is_merged], shares[:, is_merged].sum(-1, keepdim=True)], -1)
    return float((outcomes[0] - outcomes[1]).abs().sum()) / 2


def _listed(masses: Tensor, ids: Sequence[int]) -> str:
    return ", ".join(
        f"id {i} student {own:.2f} teacher {other:.2f}"
        for i, own, other in zip(ids, *masses.tolist(), strict=True)
    )
