"""The journey of a row through an optimizer step: the files and functions that it passes.

Frozen here: an upper limit of the files that one optimizer step enters, and of the changes from a
function of one file to a function of another, for a KD step and an on-policy GKD step on a tiny
pair with the built-in engine. Counted by ``sys.setprofile`` from the end of the first step to the
end of the second, without comprehensions and lambdas. A reader who follows a row opens these files;
a step that needs one more is a reason to look for a shorter way. Run as a program, this file prints
both journeys.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
from lightning.pytorch.callbacks import Callback

import okd_lightning
from okd_lightning import DistillationModule
from okd_lightning.callbacks import GKD, KD, DistillationCallback
from okd_lightning.data import RolloutDataModule

ROOT = str(Path(okd_lightning.__file__).parent)
HIDDEN = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>")
METHODS = {"KD": KD(temperature=2.0), "GKD": GKD(0.5, on_policy_fraction=1.0)}
LIMITS = {"KD": (26, 70), "GKD": (34, 140)}
"""Method → most files, and most changes of file."""


class Journey(Callback):
    """Records the functions of this package that the second optimizer step calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def on_train_batch_end(self, trainer, *args) -> None:
        sys.setprofile(self._record if trainer.global_step == 1 else None)

    def _record(self, frame, event, argument) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname
        if event == "call" and path.startswith(ROOT) and not name.endswith(HIDDEN):
            self.calls.append((path[len(ROOT) + 1 :], name))

    @property
    def files(self) -> list[str]:
        """The files, in the order in which they are first entered."""
        return list(dict.fromkeys(path for path, _ in self.calls))

    @property
    def switches(self) -> list[tuple[str, str]]:
        """The changes from one file to another."""
        return [(a, b) for (a, _), (b, _) in pairwise(self.calls) if a != b]

    def __str__(self) -> str:
        changes = Counter(self.switches).most_common(12)
        functions = len(set(self.calls))
        shown = "\n".join(f"  {count} times {a} -> {b}" for (a, b), count in changes)
        return (
            f"{len(self.files)} files, {functions} functions, {len(self.switches)} changes of file"
            f"\n  {', '.join(self.files)}\n{shown}"
        )


def journey_of(method: DistillationCallback, folder: Path) -> Journey:
    """Train two steps of four rows with responses of up to eight tokens."""
    tokenizer = tiny.make_tokenizer()
    pair = {"student": tiny.make_llama(1), "teacher": tiny.make_llama(2, tiny.TEACHER_ROWS)}
    for name, model in pair.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    data = RolloutDataModule(
        tiny.make_rows(8),
        batch_size=4,
        max_prompt_length=16,
        max_response_length=8,
        seed=7,
        val_rollouts=0,
    )
    journey = Journey()
    trainer = tiny.make_trainer(folder, [method, journey], max_steps=2)
    profile = sys.getprofile()
    try:
        module = DistillationModule(*(str(folder / name) for name in pair), learning_rate=1e-2)
        trainer.fit(module, data)
    finally:
        sys.setprofile(profile)
    return journey


@pytest.mark.parametrize("name", METHODS)
def test_a_step_passes_no_more_files_than_before(name, tmp_path):
    journey = journey_of(METHODS[name], tmp_path)
    files, switches = LIMITS[name]
    assert len(journey.files) <= files, journey
    assert len(journey.switches) <= switches, journey


if __name__ == "__main__":
    for method in METHODS.values():
        with tempfile.TemporaryDirectory() as place:
            print(f"{type(method).__name__}: {journey_of(method, Path(place))}")
