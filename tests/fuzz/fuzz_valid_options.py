"""Random sets of options that belong together: each trains and resumes, or is one clean line."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from cli_workbench import make_rows, make_tokenizer, write_jsonl
from datasets import Dataset
from fake_vllm_server import FakeVLLM, serving
from fuzz_program import Bench, Case
from option_draws import (
    Draw,
    draw_callbacks,
    draw_methods,
    draw_models,
    draw_optimizer,
    draw_trainer,
    maybe,
)
from transformers import AutoModelForCausalLM
from typed_commands import Words, check_resume, draw_kill, make_assets

NUM_CASES = 300


def _row_of(kind: str, row: dict[str, str]) -> dict[str, Any]:
    prompt, response = row["prompt"], row["response"]
    user = {"role": "user", "content": prompt}
    answer = {"role": "assistant", "content": response}
    return {
        "plain": row,
        "named": {"question": prompt, "answer": response},
        "text": {"response": prompt + response},
        "chat": {"messages": [user, answer]},
        "long chat": {"messages": [{**user, "role": "system"}, user, answer, user, answer]},
        "trl": {"prompt": [user], "completion": [answer]},
        "fields": {"a": prompt, "b": "x", "response": response},
    }[kind]


_KINDS: dict[str, Words] = {
    "plain": [],
    "named": ["--data.prompt_column", "question", "--data.response_column", "answer"],
    "text": ["--data.prompt_column", "null"],
    "chat": [],
    "long chat": [],
    "trl": ["--data.response_column", "completion"],
    "fields": ["--data.prompt_template", "{a}:{b}="],
}


def _write_rows(folder: Path, name: str, form: str, rows: list[dict[str, Any]]) -> str:
    """Write a dataset in a random supported format; return its path."""
    path = folder / f"{name}.{form}"
    if form == "jsonl":
        write_jsonl(path, rows)
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    elif form in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


_FORMS = ("jsonl", "jsonl", "json", "jsonl.gz", "csv", "tsv", "parquet", "saved")


def _draw_kind(draw: Draw) -> str:
    return draw.choices(list(_KINDS), (6, 2, 1, 1, 1, 1, 1))[0]


def _data(draw: Draw, folder: Path, kind: str) -> Words:
    is_flat = kind in ("plain", "named", "text", "fields")
    form = draw.choice([form for form in _FORMS if is_flat or form not in ("csv", "tsv")])
    rows = [_row_of(kind, row) for row in make_rows(draw.choice((7, 12)), draw.randrange(99))]
    words = ["--data.train", _write_rows(folder, "train", form, rows), *_KINDS[kind]]
    if draw.random() < 0.7:
        rows = [_row_of(kind, row) for row in make_rows(4, draw.randrange(99))]
        words += ["--data.val", _write_rows(folder, "val", form, rows)]
        words += ["--data.val_rollouts", draw.choice(("0", "2"))]
    return words + _batches(draw) + _lengths(draw, kind)


def _lengths(draw: Draw, kind: str) -> Words:
    is_long = "chat" in kind or kind == "trl"
    return [
        *("--data.max_prompt_length", "96" if is_long else draw.choice(("7", "16", "16"))),
        *("--data.max_response_length", draw.choice(("1", "4", "8"))),
        *maybe(draw, 0.05, ["--data.on_overlong", "error"]),
        *maybe(draw, 0.2, ["--data.token_cache", "null"]),
        *maybe(draw, 0.2, ["--data.seed", "5"]),
    ]


def _batches(draw: Draw) -> Words:
    size = draw.choice((1, 2, 3))
    steps = draw.choice((1, 1, 2, 3))
    samples = draw.choice((1, 1, 1 + (size * steps + 1) % 2))
    words = ["--data.batch_size", str(size)]
    if steps > 1:
        words += draw.choice(
            (
                ["--data.global_batch_size", str(size * steps)],
                ["--trainer.accumulate_grad_batches", str(steps)],
            )
        )
    words += ["--data.samples_per_prompt", str(samples)] if samples > 1 else []
    chunk = size * steps * draw.choice((1, 2)) // samples
    words += maybe(draw, 0.3, ["--data.prompts_per_rollout", str(max(1, chunk))])
    words += maybe(draw, 0.2, ["--data.prompts_per_epoch", "6"])
    at = "--data.sampling"
    return words + maybe(
        draw,
        0.3,
        [f"{at}.temperature", "0"],
        [f"{at}.temperature", "0.7", f"{at}.top_p", "0.9"],
        [f"{at}.top_k", "5"],
    )


def option_set(seed: int, assets: Path, folder: Path, url: str) -> Words:
    """The words of one command.

    Args:
        seed: Which.
        assets: Made by ``make_assets``.
        folder: For its data.
        url: Of a server for those that take one.
    """
    draw = random.Random(seed)
    methods, kind = draw_methods(draw), _draw_kind(draw)
    is_chat = "chat" in kind or kind == "trl"
    return [
        *("fit", "--ckpt_path", "last", "--trainer.default_root_dir", "run"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *(*methods, *draw_models(draw, assets, folder, url, methods, is_chat)),
        *(*draw_optimizer(draw), *_data(draw, folder, kind)),
        *(*draw_trainer(draw), *draw_callbacks(draw)),
    ]


def _case(seed: int) -> Case:
    def act(bench: Bench) -> None:
        assets = bench.student.parent / "assets"
        make_assets(assets)
        draw = random.Random(seed + 1)
        kills = [draw_kill(draw) for _ in range(draw.choice((1, 1, 2)))]
        with ExitStack() as stack:
            url = "http://127.0.0.1:9"
            words = option_set(seed, assets, bench.folder, url)
            if url in words:
                teacher = AutoModelForCausalLM.from_pretrained(assets / "teacher")
                url = stack.enter_context(serving(FakeVLLM(teacher, make_tokenizer()))).url
                words = option_set(seed, assets, bench.folder, url)
            bench.write("command.txt", " ".join(map(repr, words)))
            check_resume(bench, words, kills)
        os.chdir(bench.folder)

    return Case(f"option set {seed}", act)


def cases(seed: int) -> list[Case]:
    """Yield three hundred option sets."""
    return [_case(1000 * seed + number) for number in range(NUM_CASES)]
