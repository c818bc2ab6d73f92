"""End ids of a checkpoint, and the check that a resumed run has the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from okd_lightning.errors import CheckpointError
from okd_lightning.models import EndTokens


def loaded_ends(own: Mapping[str, Any], present: EndTokens, *, resumes: bool) -> EndTokens:
    """Return the ends of a checkpoint's run.

    Args:
        own: The checkpoint's entries of this library.
        present: The ends of the run that loads it.
        resumes: Whether that run trains: its objective has to stay the same.

    Raises:
        CheckpointError: A run that resumes takes other ids as one outcome.
    """
    stored = own.get("end_ids")
    if stored is None:  # written before end ids were one outcome
        if resumes and len(present.end_ids) > 1:
            rank_zero_warn(
                f"this checkpoint's run compared the end ids {list(present.end_ids)} one by one, "
                "and from here on they are one outcome; to continue as before, resume with "
                f"--model.end_tokens [{present.end_ids[0]}]"
            )
        return replace(present, stop_ids=tuple(own["eos_ids"]))
    if resumes and set(stored) != set(present.end_ids):
        names = ",".join(map(str, stored))
        raise CheckpointError(
            f"this checkpoint's run took the ids {list(stored)} as the ends of a response, one "
            f"outcome of both models, and this run takes {list(present.end_ids)}, which is another "
            f"objective; resume with --model.end_tokens [{names}]"
        )
    return replace(present, end_ids=tuple(stored), stop_ids=tuple(own["eos_ids"]))
