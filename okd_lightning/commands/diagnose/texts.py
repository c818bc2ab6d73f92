"""Diagnosis of a pair with two tokenizers: their alignment, and the value of each loss.

Measured on dataset responses and on the student's. The bias of losses that read the teacher's own
tokens alone is measured against the distribution over texts (``losses.text_law``), on the same
chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from okd_lightning.commands.diagnose.findings import Check
from okd_lightning.commands.diagnose.responses import (
    ResponseGenerator,
    Responses,
    chosen,
    given_responses,
)
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ForwardKL, ReverseKL
from okd_lightning.losses import ExactDivergence, measure_chunks
from okd_lightning.losses.chunked import OutcomeLogProb
from okd_lightning.records.collation import RowReader
from okd_lightning.records.counts import count_chunks
from okd_lightning.training.module import DistillationModule

MEANING = {
    "chunk": "this chunk or anything else, by each model's own tokens; biased",
    "text": "this chunk or anything else, by the probability of the text; exact",
    "next_byte": "the next byte or the end, by the probability of the text; exact",
    "shared_tokens": "the next token, of those that both have; an approximation, since the events "
    "differ",
}
"""Outcomes compared at each chunk, by the ForeignTeacher's ``loss``."""

_MANY_UNALIGNED, _MANY_NONCANONICAL = 0.2, 0.05

_FORWARD, _REVERSE = ExactDivergence(ForwardKL()), ExactDivergence(ReverseKL())


@dataclass(frozen=True)
class SharedText:
    """Alignment of both tokenizers on some responses.

    Attributes:
        source: "given" (dataset responses) or "student".
        rows: Number of responses.
        tokens: Response tokens of the student.
        teacher_tokens: Tokens of the teacher within chunks.
        chunks: Number of chunks.
        one_to_one: Share of the student's tokens that are one token of the teacher.
        unaligned: Share without a chunk.
        noncanonical: Share in chunks that the student's tokenizer would segment differently.
        longest: Tokens of the longest chunk, on the side where it has more.
    """

    source: str
    rows: int
    tokens: int
    teacher_tokens: int
    chunks: int
    one_to_one: float
    unaligned: float
    noncanonical: float
    longest: int


@dataclass(frozen=True)
class LossFinding:
    """One loss between both models, on one kind of responses.

    Attributes:
        loss: The ForeignTeacher's ``loss``.
        source: "given" or "student".
        forward_kl: Nats per student token.
        reverse_kl: Nats per student token.
        seconds: Seconds to read and measure all rows, without a backward pass.
    """

    loss: str
    source: str
    forward_kl: float
    reverse_kl: float
    seconds: float


@dataclass(frozen=True)
class Bias:
    """Error of reading each model's own tokens in place of the probability of the text.

    Attributes:
        source: "given" or "student".
        forward_kl: That of ``chunk`` minus that of ``text``, nats per student token.
        log_ratio: Mean over chunks of the absolute error of ln u, the log-ratio of OPD and OPD+,
            nats; errors of successive chunks cancel.
    """

    source: str
    forward_kl: float
    log_ratio: float


@dataclass(frozen=True)
class TextDiagnosis:
    """All findings on a pair with two tokenizers.

    Attributes:
        student: Its name, and the tokens of its tokenizer.
        teacher: The same of the teacher.
        loss: The run's.
        checks: Findings that deserve attention.
        shared: By kind of responses.
        losses: By loss and kind.
        biases: By kind; none for a teacher on a server, whose exact losses are unknown.
    """

    student: str
    teacher: str
    loss: str
    checks: tuple[Check, ...]
    shared: tuple[SharedText, ...]
    losses: tuple[LossFinding, ...]
    biases: tuple[Bias, ...]


class TextExamination(Callback):
    """Callback that measures such a pair when ``trainer.validate`` begins.

    Args:
        rows: Responses of each kind.
        say: Called with progress messages.

    Attributes:
        found: The diagnosis; None before.
    """

    def __init__(self, rows: int, say: Callable[[str], None]) -> None:
        self.rows = rows
        self.found: TextDiagnosis | None = None
        self._say = say

    def on_validation_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        """Measure everything; Lightning has disabled gradients."""
        assert isinstance(pl_module, DistillationModule)
        data = trainer.datamodule  # type: ignore[attr-defined]
        with trainer.precision_plugin.forward_context(), torch.random.fork_rng():
            self.found = self._examine(pl_module, data)

    def _examine(self, module: DistillationModule, data: RolloutDataModule) -> TextDiagnosis:
        examples = chosen(data.examples("val").examples, self.rows, data.seed)
        generator = ResponseGenerator(module, data.sampling, data.max_response_length, data.seed)
        self._say(f"the student answers {len(examples)} prompts")
        kinds = (given_responses(examples, module.eos_ids), generator.generate("student", examples))
        readers = module.pair.teacher.text_readers()
        self._say("losses on dataset responses and the student's: " + ", ".join(readers))
        measured = [responses for responses in kinds if responses.num_tokens]
        shared = tuple(_shared(responses, readers["chunk"]) for responses in measured)
        losses = tuple(
            _loss(module, responses, name, reader, data.batch_size)
            for responses in measured
            for name, reader in readers.items()
        )
        exact = readers.get("text")
        biases = tuple(
            _bias(module, responses, exact, losses, data.batch_size)
            for responses in measured
            if exact is not None
        )
        teacher = module.pair.teacher
        assert teacher.tokenizer is not None
        return TextDiagnosis(
            student=f"{module.pair.student_source}, {len(module.tokenizer):,} tokens",
            teacher=f"{teacher.source or 'on a server'}, {len(teacher.tokenizer):,} tokens",
            loss=str(teacher.arguments["loss"]),
            checks=tuple(check for one in shared for check in _checks(one)),
            shared=shared,
            losses=losses,
            biases=biases,
        )


def _shared(responses: Responses, reader: RowReader) -> SharedText:
    rows = reader(responses.rows)
    others, total, *counts = count_chunks(rows).sum(-1).tolist()
    one_to_one, unaligned, noncanonical = (count / max(1, total) for count in counts)
    found = [row.aligned for row in rows if row.aligned is not None]
    return SharedText(
        source=responses.author,
        rows=len(rows),
        tokens=total,
        teacher_tokens=others,
        chunks=sum(len(one.spans) for one in found),
        one_to_one=one_to_one,
        unaligned=unaligned,
        noncanonical=noncanonical,
        longest=max((one.longest for one in found), default=0),
    )


def _read(responses: Responses, reader: RowReader) -> Responses:
    """Return the responses with chunks, those that have any."""
    rows = [row for row in reader(responses.rows) if row.aligned and row.aligned.spans]
    return Responses(responses.author, tuple(rows), (True,) * len(rows))


def _loss(
    module: DistillationModule, responses: Responses, loss: str, reader: RowReader, size: int
) -> LossFinding:
    start = time.perf_counter()
    sums, num = torch.zeros(2, dtype=torch.float64), 0
    for batch in _read(responses, reader).batches(size, module.device):
        values = measure_chunks(
            batch, (_FORWARD, _REVERSE), module.pair.sides(batch, (_FORWARD, _REVERSE))
        )
        sums += torch.stack([values.of(one).double().sum() for one in (_FORWARD, _REVERSE)]).cpu()
        num += int((values.chunks.student >= 0).sum())
    forward, reverse = (sums / max(1, num)).tolist()
    return LossFinding(loss, responses.author, forward, reverse, time.perf_counter() - start)


def _bias(
    module: DistillationModule,
    responses: Responses,
    reader: RowReader,
    losses: Sequence[LossFinding],
    size: int,
) -> Bias:
    errors: list[Tensor] = []
    for batch in _read(responses, reader).batches(size, module.device):
        values = measure_chunks(batch, (_FORWARD,), module.pair.sides(batch, (_FORWARD,)))
        chunks, points = values.chunks, values.chunks.points
        assert points is not None
        own, exact = [], []
        for name, index in (("student", chunks.student), ("teacher", chunks.teacher)):
            path = chunks.sums(values.tokens[name, OutcomeLogProb()], index)  # type: ignore[index]
            law = values.laws[name, 1.0]  # type: ignore[index]
            own.append(path.double())
            exact.append(law.chunk_logprobs(points.start, points.end, path))
        errors.append(((own[1] - own[0]) - (exact[1] - exact[0])).cpu())
    error = torch.cat(errors) if errors else torch.zeros(1, dtype=torch.float64)
    of = {one.loss: one.forward_kl for one in losses if one.source == responses.author}
    return Bias(responses.author, of["chunk"] - of["text"], float(error.abs().mean()))


def _checks(shared: SharedText) -> list[Check]:
    """Return the findings that deserve attention on one kind of responses."""
    of = "dataset responses" if shared.source == "given" else "the student's responses"
    found = []
    if shared.unaligned > _MANY_UNALIGNED:
        found.append(
            Check(
                "alignment",
                "bad" if shared.unaligned > 0.5 else "look",
                f"{shared.unaligned:.0%} of the tokens of {of} carry no loss: characters that the "
                "teacher's tokenizer lacks or changes, or responses that are cut",
            )
        )
    if shared.noncanonical > _MANY_NONCANONICAL:
        found.append(
            Check(
                "segmentation",
                "look",
                f"{shared.noncanonical:.0%} of the tokens of {of} are in chunks that the student's "
                "own tokenizer would segment differently, and carry no loss",
            )
        )
    return found


SOURCE_NAMES = {"given": "dataset responses", "student": "student's responses"}

SHARES: Mapping[str, Callable[[SharedText], Any]] = {
    "one token of the teacher": lambda one: f"{one.one_to_one:.1%}",
    "unaligned (no loss)": lambda one: f"{one.unaligned:.1%}",
    "non-canonical (no loss)": lambda one: f"{one.noncanonical:.1%}",
    "longest chunk, tokens": lambda one: one.longest,
}
"""Rows of the table of shares, by label."""


def headline(found: TextDiagnosis) -> tuple[str, str]:
    """Return the main finding about the pair, and its reason."""
    faults = [check for check in found.checks if check.verdict == "bad"]
    if faults:
        return f"Do not train on this pair as it is: {faults[0].name}", faults[0].text
    if not found.shared:
        return "Nothing was measured", "neither the data nor the student's responses have tokens"
    first = found.shared[0]
    title = (
        f"{first.one_to_one:.0%} of the student's tokens are one token of the teacher, and "
        f"{first.unaligned:.0%} carry no loss"
    )
    because = f"This run compares by {found.loss}: {MEANING[found.loss]}."
    for bias in found.biases[:1]:
        because += f" chunk's forward KL is off by {bias.forward_kl:+.4f} nats per token."
    return title, because


def show_texts(console: Console, found: TextDiagnosis) -> None:
    """Print the diagnosis."""
    console.print(Text(f"student  {found.student}\nteacher  {found.teacher}\n"))
    for check in found.checks:
        console.print(Text(f"! {check.name}: {check.text}", "yellow"))
    title, because = headline(found)
    console.print(Text(f"{title}. {because}\n"))
    names = SOURCE_NAMES
    table = Table(title="Alignment of both tokenizers", box=SIMPLE_HEAD)
    table.add_column("of the student's tokens")
    for one in found.shared:
        table.add_column(names[one.source], justify="right")
    for label, cell in SHARES.items():
        table.add_row(label, *(str(cell(one)) for one in found.shared))
    console.print(table)
    table = Table(title="Losses (nats per student token)", box=SIMPLE_HEAD)
    for heading in ("loss", "on", "forward KL", "reverse KL", "seconds"):
        table.add_column(heading)
    for loss in found.losses:
        own = f"{loss.loss} (this run)" if loss.loss == found.loss else loss.loss
        numbers = (f"{n:.4f}" for n in (loss.forward_kl, loss.reverse_kl))
        table.add_row(own, names[loss.source], *numbers, f"{loss.seconds:.2f}")
    console.print(table)
    console.print("What is compared at each chunk:")
    for name in dict.fromkeys(loss.loss for loss in found.losses):
        meaning = MEANING[name]
        console.print(Padding(Text(f"{name}: {meaning}"), (0, 0, 0, 2)))
    if not found.biases:
        console.print("the teacher gives probabilities of its own tokens alone: no bias is known")
    for bias in found.biases:
        console.print(
            f"{names[bias.source]}: chunk's forward KL is off by {bias.forward_kl:+.4f} nats per "
            f"token, ln u of OPD and OPD+ by {bias.log_ratio:.4f} per chunk in absolute value"
        )
