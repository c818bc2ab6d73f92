"""Calibration rows: dataset responses as ``fit`` reads them, or samples of the model itself."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.commands.cli import DistillationCLI
from okd_lightning.commands.cli_arguments import prepare
from okd_lightning.data import RolloutDataModule
from okd_lightning.engines import NoiseStream, Sampling, TransformersEngine
from okd_lightning.errors import DataError
from okd_lightning.models import Vocabulary, max_positions
from okd_lightning.records.batches import Example, TrainingRow
from okd_lightning.records.collation import dataset_row, micro_batches
from okd_lightning.records.noise import NoiseDomain, hashed_choice
from okd_lightning.records.requests import Prompt, Request
from okd_lightning.records.sequences import Sequences

_BATCH_SIZE = 8
_SAMPLED_TOKENS = 128
"""Longest sampled row."""


def dataset_rows(model: str, options: Sequence[str], num_rows: int, seed: int) -> list[TrainingRow]:
    """Return rows of ``--data.train`` with its columns, template and lengths, as in ``fit``.

    Loss lies where it lies in ``fit``; in a row without a response, on the whole prompt.

    Args:
        model: The model's location; its tokenizer and chat template are used.
        options: ``--data.*`` options of ``fit``.
        num_rows: Most rows; they are chosen from all over the dataset.
        seed: Key of the choice.

    Raises:
        OKDLightningError: What ``fit`` would refuse.
    """
    _, *prepared = prepare(["fit", "--model.student", model, *options])
    cli = DistillationCLI(args=prepared, run=False)
    data: RolloutDataModule = cli.datamodule
    data.trainer = cli.trainer
    cli.trainer.strategy.connect(cli.model)  # rows are read by the module's tokenizer
    examples = data.examples("train").examples
    chosen = hashed_choice(len(examples), num_rows, NoiseDomain.CALIBRATION_ROWS, seed)
    rows = [_row(examples[number]) for number in chosen]
    found = [row for row in rows if row.num_loss_tokens]
    if not found:
        raise DataError(
            "--data.train: its rows hold no token after the first one; give longer texts"
        )
    return found


def sampled_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    eos_ids: tuple[int, ...],
    num_rows: int,
    seed: int,
) -> list[TrainingRow]:
    """Return rows that the model generates from its first token alone.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer; without a bos token, texts begin with the end-of-sequence id.
        vocabulary: The ids that are sampled.
        eos_ids: Ids that end a row.
        num_rows: Number of rows.
        seed: Key of the noise.
    """
    longest = min(_SAMPLED_TOKENS, (max_positions(model.config) or _SAMPLED_TOKENS + 1) - 1)
    bos = tokenizer.bos_token_id
    first = eos_ids[0] if bos is None else int(bos)
    prompts = tuple(Prompt((first,), number) for number in range(num_rows))
    request = Request(prompts, Sampling(), NoiseStream(seed, NoiseDomain.CALIBRATION), longest)
    rollout = TransformersEngine(model, vocabulary, eos_ids).respond(request)
    return [
        TrainingRow(number, "teacher", (first, *ids), (False, *(True,) * len(ids)), 1)
        for number, ids in enumerate(response.ids for response in rollout)
    ]


def batches(rows: Sequence[TrainingRow]) -> list[Sequences]:
    """Return micro-batches of rows of similar length."""
    num = -(-len(rows) // _BATCH_SIZE)  # rounds up
    return [batch.student_reads for batch in micro_batches(list(rows), num)]


def _row(example: Example) -> TrainingRow:
    row = dataset_row(example)
    if row.num_loss_tokens:
        return row
    ids = example.prompt_ids
    return TrainingRow(example.index, "dataset", ids, (True,) * len(ids), 0)
