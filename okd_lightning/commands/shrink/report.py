"""The measured candidates of ``shrink``: on the terminal, in a file and on the model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from okd_lightning import __version__
from okd_lightning.models.shrinking import DepthCandidate, Loss


@dataclass
class Report:
    """Candidates in the order in which they were measured.

    Args:
        console: For output.
        start: The model's loss before any cut.
    """

    console: Console
    start: Loss
    candidates: list[dict[str, Any]] = field(default_factory=list)

    def tell_layers(self, candidate: DepthCandidate, is_best: bool) -> None:
        """Record a choice of layers."""
        self.tell(f"without layers {numbers(candidate.dropped)}", candidate.loss, is_best)

    def tell(self, label: str, loss: Loss, is_best: bool) -> None:
        """Record a candidate, and print its cost."""
        self.candidates.append(
            {"cut": label, "cross_entropy": loss.cross_entropy, "forward_kl": loss.forward_kl}
        )
        rise = loss.cross_entropy - self.start.cross_entropy
        text = f"  {label}: loss {loss.cross_entropy:.4f} ({rise:+.4f}), KL {loss.forward_kl:.4f}"
        self.console.print(Text(text, style="" if is_best else "dim"))

    def table(self, steps: Sequence[tuple[str, Loss]]) -> Table:
        """Return a table of the chosen cuts, one after the other."""
        table = Table("cut", "loss", "rise", "KL(teacher‖student)", title="nats per token")
        for label, loss in (("none", self.start), *steps):
            rise = loss.cross_entropy - self.start.cross_entropy
            shown = (f"{loss.cross_entropy:.4f}", f"{rise:+.4f}", f"{loss.forward_kl:.4f}")
            table.add_row(Text(label), *shown)
        return table


def numbers(values: Sequence[int]) -> str:
    """Return ascending numbers with ranges, such as 3, 8-13; "none" for none."""
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][-1] == value - 1:
            parts[-1].append(value)
        else:
            parts.append([value])
    shown = (f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
    return ", ".join(shown) or "none"


def card(source: str, record: Mapping[str, Any]) -> str:
    """Return the card of a student that is a part of its teacher."""
    rows = [
        f"| {step['cut']} | {step['cross_entropy']:.4f} | {step['forward_kl']:.4f} |"
        for step in record["steps"]
    ]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [knowledge-distillation, okd-lightning]",
            "---",
            "",
            "# Student cut from its teacher",
            "",
            f"Made by okd-lightning {__version__} (`shrink`) from `{os.path.basename(source)}`, "
            "not trained since: a start for distillation.",
            "",
            f"* layers kept: {numbers(record['kept_layers'])} of {record['num_layers']}",
            f"* sizes changed: {dict(record['sizes']) or 'none'}",
            f"* parameters: {record['parameters']:,} of {record['teacher_parameters']:,}",
            "",
            f"Measured on {record['tokens']} tokens of {record['calibration']}, in nats per token:",
            "",
            "| cut | cross-entropy | KL(teacher‖student) |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
