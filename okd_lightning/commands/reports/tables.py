"""Tables for the terminal: numbers before and after, and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from okd_lightning.commands.reports.measures import shown_measures
from okd_lightning.commands.reports.results import RunResult
from okd_lightning.commands.reports.spread import Spread, methods_of

_ROWS = (
    ("exact match", "val/exact_match", "{:.3f}"),
    ("forward KL (nats/token)", "val/forward_kl", "{:.3f}"),
    ("reverse KL (nats/token)", "val/reverse_kl", "{:.3f}"),
    ("on-policy reverse KL", "val/on_policy_reverse_kl", "{:.3f}"),
    ("agreement with the teacher", "val/agreement", "{:.3f}"),
)


@dataclass(frozen=True)
class Answer:
    """One problem with all answers.

    Attributes:
        prompt: The problem.
        reference: The right answer.
        given: (label, answer) in the order of the columns.
    """

    prompt: str
    reference: str
    given: tuple[tuple[str, str], ...]


def results_table(results: Sequence[RunResult]) -> Table:
    """Return a table of the measures before and after each run; all start from one student."""
    table = Table(title="Before and after")
    table.add_column("measure")
    table.add_column("before", justify="right")
    for result in results:
        table.add_column(Text(f"after {result.method}"), justify="right")
    for label, name, form in _ROWS:
        points = [results[0].before, *(result.after for result in results)]
        table.add_row(label, *(form.format(p[name]) if name in p else "" for p in points))
    table.add_section()
    table.add_row("optimizer steps", "", *(str(result.steps) for result in results))
    table.add_row("seconds", "", *(f"{result.seconds:.1f}" for result in results))
    table.add_row("tokens/s", "", *(f"{result.tokens / result.seconds:,.0f}" for result in results))
    table.add_row("tokens sampled", "", *(f"{result.generated_tokens:,}" for result in results))
    return table


def comparison_table(results: Sequence[RunResult]) -> Table:
    """Return a table, one line per method: measures after training, mean ± error over seeds."""
    table = Table(
        title="After training (mean ± standard error over seeds)",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method", overflow="fold")
    measures = shown_measures(results)
    spreads = {"before": [Spread.of([r.before[m.name] for r in results]) for m in measures]}
    for method in methods_of(results):
        own = [result for result in results if result.method == method]
        spreads[method] = [Spread.of([r.after[m.name] for r in own]) for m in measures]
    lines = {
        method: [f"{s.mean:.3f}" if method == "before" else s.text() for s in line]
        for method, line in spreads.items()
    }
    for number, measure in enumerate(measures):
        width = max(len(line[number]) for line in lines.values())  # a number is never broken
        header = f"{measure.label} {'↑' if measure.is_gain else '↓'}"
        table.add_column(header, justify="right", min_width=width)
    for method, line in lines.items():
        table.add_row(Text(method), *line, style="dim" if method == "before" else None)
    return table


def cost_table(results: Sequence[RunResult], failures: Mapping[str, str] | None = None) -> Table:
    """Return a table with a line per method: the cost of its runs, mean over seeds.

    Args:
        results: The finished runs.
        failures: Name of each failed run → the reason, which is shown below the table.
    """
    table = Table(title="Cost of a run (mean over seeds)", box=SIMPLE_HEAD)
    table.add_column("method", overflow="fold")
    for name in ("seeds", "steps", "seconds", "CPU s", "tokens", "sampled", "tokens/s"):
        table.add_column(name, justify="right")
    for method in methods_of(results):
        own = [result for result in results if result.method == method]
        cost = {
            name: sum(getattr(result, name) for result in own) / len(own)
            for name in ("steps", "seconds", "cpu_seconds", "tokens", "generated_tokens")
        }
        table.add_row(
            Text(method),
            str(len(own)),
            f"{cost['steps']:,.0f}",
            f"{cost['seconds']:,.1f}",
            f"{cost['cpu_seconds']:,.1f}",
            f"{cost['tokens']:,.0f}",
            f"{cost['generated_tokens']:,.0f}",
            f"{cost['tokens'] / max(cost['seconds'], 1e-9):,.0f}",
        )
    for name in failures or ():
        table.add_row(Text(name), Text("failed", style="red"))
    if failures:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in failures.items())
        table.caption, table.caption_justify = Text(reasons), "left"
    return table


def answers_table(answers: Sequence[Answer]) -> Table:
    """Return a table of problems with all answers; right ones in green, wrong ones in red."""
    table = Table(title="Answers")
    table.add_column("problem", no_wrap=True)
    for who, _ in answers[0].given:
        table.add_column(who, no_wrap=True)
    for answer in answers:
        cells = [
            Text(text, style="green" if text == answer.reference else "red")
            for _, text in answer.given
        ]
        table.add_row(Text(answer.prompt), *cells)
    return table
