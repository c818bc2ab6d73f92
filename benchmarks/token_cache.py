"""CPU time until a run has its data as ids: tokenized again, and read from the cache.

Every start is a separate process that has loaded the tokenizer; seconds are CPU time.

    python benchmarks/token_cache.py DATA.jsonl TOKENIZER [--prompt question --response answer]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

from side_by_side import write_results
from transformers import AutoTokenizer

from okd_lightning.data import Columns, load_rows
from okd_lightning.data.token_cache import cached_examples


def start(options: argparse.Namespace) -> dict[str, float]:
    """Convert rows to examples, once."""
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    columns = Columns(prompt=options.prompt, response=options.response, messages=None)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    rows = load_rows(options.data)
    found = cached_examples(
        options.folder,
        rows,
        tokenizer,
        eos_id=1,
        columns=columns,
        max_prompt_length=512,
        max_response_length=512,
        on_overlong="skip",
        needs_response=True,
        where=options.data,
    )
    return {
        "rows": len(found),
        "tokens": sum(len(e.prompt_ids) + len(e.response_ids) for e in found.examples),
        "seconds": round(time.perf_counter() - begin, 2),
        "cpu_seconds": round(time.process_time() - cpu_begin, 2),
    }


def main() -> None:
    """Start without a cache, with an empty one and with a full one, some times each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("tokenizer")
    parser.add_argument("--prompt", default="question")
    parser.add_argument("--response", default="answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contender", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(start(options)))
        return
    runs: dict[str, list[dict[str, float]]] = {
        "no cache": [],
        "first start": [],
        "second start": [],
    }
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            for name, found in runs.items():
                own = [] if name == "no cache" else ["--folder", folder]
                command = [sys.executable, __file__, "--contender", *sys.argv[1:], *own]
                found.append(json.loads(subprocess.check_output(command, text=True)))
    best = {name: min(run["cpu_seconds"] for run in found) for name, found in runs.items()}
    ratio = round(best["no cache"] / best["second start"], 1)
    write_results("token_cache", {"times_faster": ratio, "fastest": best, "runs": runs})


if __name__ == "__main__":
    main()
