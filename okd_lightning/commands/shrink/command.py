"""``okd-lightning shrink``: the order of the cuts, and the written folder."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd_lightning.commands.cli_errors import parse
from okd_lightning.commands.model_folder import CUT_RECORD, check_model_folder, replaced_model
from okd_lightning.commands.shrink.options import (
    checked_options,
    chosen_device,
    data_options,
    layer_numbers,
    num_dropped_layers,
    shrink_parser,
)
from okd_lightning.commands.shrink.report import Report, card, numbers
from okd_lightning.commands.shrink.rows import batches, dataset_rows, sampled_rows
from okd_lightning.durable_files import write_json
from okd_lightning.errors import ModelError, UsageError
from okd_lightning.models import (
    DTypeName,
    Vocabulary,
    eos_token_ids,
    load_checked,
    load_model_config,
    load_tokenizer,
    reads_images,
)
from okd_lightning.models.generation_settings import save_with_settings
from okd_lightning.models.shrinking import (
    Calibration,
    DepthCandidate,
    Loss,
    WidthCut,
    Widths,
    choose_layers,
    choose_widths,
    cut_model,
    wanted_sizes,
    without,
)
from okd_lightning.training.lightning_messages import PrintableConsole, only_warnings

_MODEL = "--model"


def shrink_command(arguments: list[str], debug: bool = False) -> int:
    """Cut a student from a teacher and write it.

    Args:
        arguments: The words after ``shrink``.
        debug: Unused: the caller handles errors.

    Raises:
        OKDLightningError: An option that does not fit the model, a model that cannot be cut, or a
            folder that cannot be written.
    """
    del debug
    begin = time.perf_counter()
    parser = shrink_parser()
    own, of_data = data_options(arguments)
    options = parse(parser, own, list(parser._option_string_actions))
    widths = Widths(options.intermediate, options.heads, options.hidden)
    out = checked_options(options, widths)
    device = chosen_device(options.device)
    config = load_model_config(options.model, _MODEL, 0)
    if reads_images(config):
        raise ModelError(
            f"{_MODEL} {options.model!r} is a vision-language model ({config.model_type}), which "
            "is not cut; give a text model"
        )
    num_dropped = num_dropped_layers(config, options)
    is_cut = num_dropped > 0 or widths != Widths()
    wanted_sizes(config, widths)  # refuses before anything is loaded
    check_model_folder(out, {_MODEL: options.model}, options.overwrite, replaces_exports=False)
    console = PrintableConsole(file=sys.stdout, highlight=False)
    with only_warnings(), torch.no_grad():
        tokenizer = load_tokenizer(options.model, _MODEL)
        rows = _dataset_rows(options, of_data) if is_cut else None
        dtype = options.dtype or _own_dtype(config)
        model = load_checked(
            options.model, _MODEL, len(tokenizer), dtype=dtype, attn_implementation=None
        )
        if getattr(model.config, "quantization_config", None) is not None:
            raise ModelError(
                f"{_MODEL} {options.model!r} is quantised, and its weights cannot be cut; give the "
                "unquantised model, or a .gguf file of it"
            )
        model.to(device)  # type: ignore[arg-type]
        student, record = model, None
        if is_cut:
            calibration = _calibration(model, tokenizer, rows, options, of_data, console)
            student, record = _Shrinking(options, calibration, console).run(num_dropped, widths)
        seconds = round(time.perf_counter() - begin, 1)
        with replaced_model(out) as folder:
            save_with_settings(student, folder)
            tokenizer.save_pretrained(folder)
            if record is not None:
                write_json(folder / CUT_RECORD, {**record, "seconds": seconds})
                (folder / "README.md").write_text(card(options.model, record), encoding="utf-8")
    what = "student" if is_cut else "the whole model, nothing cut,"
    console.print(f"{what} written to {out} in {seconds:.0f} s")
    return 0


class _Shrinking:
    """The cuts of one command, in order: layers, neurons, heads, channels."""

    def __init__(self, options: Any, calibration: Calibration, console: Console) -> None:
        self.options = options
        self.calibration = calibration
        self.console = console
        self.report = Report(console, calibration.loss())

    def run(self, num_dropped: int, widths: Widths) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the student and the record of its making."""
        depth = self._layers(num_dropped)
        kept = [n for n in range(len(self.calibration.layers)) if n not in depth.dropped]
        steps: list[tuple[str, Loss]] = []
        if depth.dropped:
            steps.append((f"layers {numbers(depth.dropped)} dropped", depth.loss))

        def tell(label: str, loss: Loss, is_best: bool) -> None:
            self.report.tell(label, loss, is_best)
            chosen.append((label, loss))

        chosen: list[tuple[str, Loss]] = []
        cut: WidthCut = choose_widths(self.calibration, widths, tell, depth.dropped)
        steps += [(label, loss) for label, loss in chosen if label in cut.label]
        model, layers = self.calibration.model, self.calibration.layers
        student = cut_model(model, layers, depth.dropped, cut.sizes, cut.selection)
        self.console.print(self.report.table(steps))
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, student)]
        self.console.print(f"parameters: {sizes[0]:,} → {sizes[1]:,}")
        return student, {
            "model": self.options.model,
            "num_layers": len(layers),
            "kept_layers": kept,
            "sizes": dict(cut.sizes),
            "teacher_parameters": sizes[0],
            "parameters": sizes[1],
            "calibration": self.calibration.name,
            "tokens": self.calibration.num_tokens,
            "start": {"cross_entropy": self.report.start.cross_entropy, "forward_kl": 0.0},
            "steps": [
                {"cut": n, "cross_entropy": x.cross_entropy, "forward_kl": x.forward_kl}
                for n, x in steps
            ],
            "candidates": self.report.candidates,
        }

    def _layers(self, num_dropped: int) -> DepthCandidate:
        given = layer_numbers(self.options.drop_layers, len(self.calibration.layers))
        if given:
            candidate = without(self.calibration, given)
            self.report.tell_layers(candidate, True)
            return candidate
        return choose_layers(
            self.calibration, num_dropped, self.options.tried, self.report.tell_layers
        )


def _own_dtype(config: Any) -> DTypeName:
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    is_known = name in ("float32", "bfloat16", "float16", "float64")
    return name if is_known else "float32"  # type: ignore[return-value]


def _dataset_rows(options: Any, of_data: Sequence[str]) -> list[Any] | None:
    """Return the rows of ``--data.train``; None without it.

    Raises:
        UsageError: Other data options without it.
    """
    if not of_data:
        return None
    if not any(word.split("=")[0] == "--data.train" for word in of_data):
        raise UsageError(f"{of_data[0]} without --data.train: name the calibration rows with it")
    return dataset_rows(options.model, of_data, options.rows, options.seed)


def _calibration(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Any] | None,
    options: Any,
    of_data: Sequence[str],
    console: Console,
) -> Calibration:
    num_ids = model.config.get_text_config().vocab_size
    vocabulary = Vocabulary.of(tokenizer).within(num_ids)
    name = "the dataset"
    if rows is None:
        name = "the model's own samples"
        eos_ids = eos_token_ids(options.model, tokenizer)
        console.print(
            f"no --data.train: {options.rows} texts are sampled from the model, which is then "
            "measured on them"
        )
        rows = sampled_rows(model, tokenizer, vocabulary, eos_ids, options.rows, options.seed)
    reads = [batch.to(model.device) for batch in batches(rows)]
    calibration = Calibration(model, reads, vocabulary, name)
    console.print(
        f"calibration: {len(rows)} rows, {calibration.num_tokens:,} loss tokens of {name}"
    )
    return calibration
