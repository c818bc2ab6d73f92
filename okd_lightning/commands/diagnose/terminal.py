"""Terminal output of a diagnosis: the headline, faults, recommendations, and the main numbers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from okd_lightning.commands.diagnose.findings import Advice, Check, Diagnosis, Rows
from okd_lightning.commands.diagnose.rules import faults
from okd_lightning.commands.diagnose.stages import duration

_MARKS = {"good": ("✓", "green"), "look": ("!", "yellow"), "bad": ("✗", "red")}
SHOWN = (
    ("forward KL", "forward_kl"),
    ("reverse KL", "reverse_kl"),
    ("JSD", "jsd"),
    ("agreement", "agreement"),
    ("entropy, student", "student_entropy"),
    ("entropy, teacher", "teacher_entropy"),
)
STEPS = {"writing": "generation"}
"""Key of ``Cost.seconds`` → its label, where they differ."""

AUTHORS = {"given": "dataset", "student": "student", "teacher": "teacher"}


def show(console: Console, found: Diagnosis, advice: Sequence[Advice], command: str) -> None:
    """Print the diagnosis.

    Args:
        console: For output.
        found: The diagnosis.
        advice: The recommendations.
        command: The comparison to run next.
    """
    console.print(Text(f"student  {found.student}\nteacher  {found.teacher}\n"))
    wanted = faults(found)
    first, *others = advice
    style = "red" if any(check.verdict == "bad" for check in wanted) else "green"
    console.print(Text(first.title, style=f"bold {style}"))
    console.print(Padding(_because(first), (0, 0, 1, 2)))
    if wanted:
        console.print(Text("Data and tokenizer: to look at", style="bold"))
        console.print(Padding(_checks(wanted), (0, 0, 1, 0)))
    if others:
        console.print(_ranked(others))
    console.print(Text("What decides", style="bold"))
    console.print(Padding(Text(command), (0, 0, 1, 2)))
    console.print(_checks([check for check in found.checks if check.verdict == "good"]))
    console.print(_divergences(found.rows))
    if found.gradients.estimators:
        console.print(_estimators(found))
    if found.trials:
        console.print(_trials(found))
    console.print(_costs(found))
    taken = ", ".join(f"{name} {duration(s)}" for name, s in found.stage_seconds.items())
    left_out = f"; left out: {', '.join(found.skipped)}" if found.skipped else ""
    console.print(Text(f"time taken: {taken}{left_out}", style="dim"))


def _because(one: Advice) -> Text:
    return Text.assemble(f"{one.because} ", (f"({one.confidence})", "dim"))


def _ranked(advice: Sequence[Advice]) -> Table:
    """Return the recommendations besides the headline, those with the highest confidence first."""
    table = Table(title="What to try", box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    table.add_column("", justify="right")
    table.add_column("recommendation")
    table.add_column("certainty")
    for number, one in enumerate(advice, 2):
        cell = Text.assemble((one.title, "bold"), "\n", one.because)
        table.add_row(str(number), cell, one.confidence)
    return table


def _checks(checks: Sequence[Check]) -> Table:
    table = Table.grid(padding=(0, 1))
    for check in checks:
        table.add_row(Text(*_MARKS[check.verdict]), check.name, Text(check.text))
    return table


def _divergences(rows: Sequence[Rows]) -> Table:
    table = Table(title="On responses by ... (nats per token)", box=SIMPLE_HEAD)
    table.add_column("measure")
    for own in rows:
        table.add_column(AUTHORS[own.source], justify="right")
    for label, name in SHOWN:
        table.add_row(label, *(own.measures[name].text() for own in rows))
    for k in rows[0].top_k:
        table.add_row(f"teacher in top {k}", *(own.top_k[k].text() for own in rows))
    table.add_row("on worst 10 %", *(f"{own.top_tenth:.0%} of it" for own in rows))
    return table


def _estimators(found: Diagnosis) -> Table:
    gradients = found.gradients
    table = Table(
        title=f"Gradients against the exact one ({gradients.batches} batches of {gradients.rows}; "
        f"{gradients.part})",
        box=SIMPLE_HEAD,
    )
    for name in ("divergence", "estimator"):
        table.add_column(name)
    for name in ("along exact", "signal/noise", "variance"):
        table.add_column(name, justify="right")
    last = None
    for row in gradients.estimators:
        own, is_first = row.fidelity, row.divergence != last
        if is_first and last is not None:
            table.add_section()
        table.add_row(
            row.divergence if is_first else "",
            row.estimator,
            f"{own.along_exact:.2f}±{own.along_error:.2f}",
            f"{own.signal_to_noise:.2f}",
            f"{own.noise_over_exact:.1f}×",
            style="red" if own.is_biased else None,
        )
        last = row.divergence
    table.caption = "along exact is 1 without bias; red is off by more than three standard errors\n"
    return table


def _trials(found: Diagnosis) -> Table:
    steps = found.trials[0].steps if found.trials else 0
    table = Table(title=f"Effect of {steps} steps (change, nats per token)", box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for label, key in trial_columns(found):
        width = max(len(trial.change[key].signed()) for trial in found.trials)
        table.add_column(label, justify="right", min_width=width)  # a number is never broken
    for trial in found.trials:
        cells = [
            Text(trial.change[key].signed(), "bold" if trial is found.forecast(key)[0] else "")
            for _, key in trial_columns(found)
        ]
        table.add_row(Text(trial.method), *cells)
    table.caption = "held-out rows; below 0 is better; all from the same weights\n"
    return table


def trial_columns(found: Diagnosis) -> list[tuple[str, str]]:
    """Return heading and key of every measure that was taken before and after trials."""
    if not found.trials:
        return []
    labels = {name: label for label, name in SHOWN}
    split = {key: key.split("/") for key in found.trials[0].change}
    return [(f"{labels[name]}, {AUTHORS[by]}", key) for key, (by, name) in split.items()]


def _costs(found: Diagnosis) -> Table:
    cost = found.cost
    table = Table(title=f"A step of {cost.rows} rows on {cost.device}", box=SIMPLE_HEAD)
    table.add_column("what")
    table.add_column("here", justify="right")
    for name, seconds in cost.seconds.items():
        table.add_row(f"seconds, {STEPS.get(name, name)}", f"{seconds:.3g}")
    table.add_row("tokens generated per second", f"{cost.tokens_per_second:,.0f}")
    for name, size in cost.memory.items():
        table.add_row(f"memory, {name}", megabytes(size))
    for drift in found.drift:
        steps = "1 step" if drift.steps == 1 else f"{drift.steps} steps"
        table.add_row(f"mean |ln ρ| after {steps}", f"{drift.mean_log_ratio:.4f}")
    return table


def megabytes(size: int) -> str:
    """Format bytes as MiB or GiB."""
    return f"{size / 2**20:,.1f} MiB" if size < 2**30 else f"{size / 2**30:,.2f} GiB"
