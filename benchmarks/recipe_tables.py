"""Costs of the recipes in configs/pairs, for the headers of their configs and for docs/recipes.md.

Settings come from the configs, sizes from pair_models.json: the parts of the public config.json
files that decide sizes, with the public parameter counts. Formulas are in pair_costs.py.

    python benchmarks/recipe_tables.py            # show them
    python benchmarks/recipe_tables.py --write    # write them into the files
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pair_costs import (
    HARDWARE,
    Hardware,
    Recipe,
    build,
    memory,
    seconds,
    sizes_of,
    training_seconds,
    writing_seconds,
)
from shard_memory import GIB

from okd_lightning.commands.cli_arguments import load_config

ROOT = Path(__file__).parents[1]
MODELS = json.loads((ROOT / "benchmarks" / "pair_models.json").read_text(encoding="utf-8"))
LOCAL = {"gpt2_xl_dolly": "openai-community/gpt2-xl"}
"""Models that a recipe makes itself → their base model."""

ROOM = 75 * GIB
"""Usable bytes of a device of 80 GB, without CUDA's own memory and fragmentation."""

RECIPES = (
    ("qwen3", "gsm8k"),
    ("qwen3", "toolalpaca"),
    ("qwen2_5", "gsm8k"),
    ("llama3_2", "dolly"),
    ("gemma2", "gsm8k"),
    ("gpt2_dolly", None),
    ("smolvlm", None),
)
"""Pair and task; None for the pair's own. A pair's first task is the one of its config's header."""


def read_recipe(name: str, task: str | None) -> Recipe:
    """Read a recipe from the configs, merged as the command line merges them."""
    config = load_config(f"pairs/{name}")
    for section, settings in (load_config(f"tasks/{task}") if task else {}).items():
        config[section] = {**config.get(section, {}), **settings}
    model, data, method = config["model"], config["data"], config["method"]
    formats = model["teacher_dtype"], config["trainer"]["precision"]
    assert formats == ("bfloat16", "bf16-mixed"), f"no formula for {formats}"
    assert model["gradient_checkpointing"], "no formula for kept activations"
    share = method.get("init_args", {}).get("on_policy_fraction")
    by_default = {"KD": 0.0, "OKD": 0.0, "GKD": 0.5, "OPDPlus": 1.0}[method["class_path"]]
    return Recipe(
        name=name,
        task=task,
        method=method["class_path"],
        student=sizes_of(build(architecture(model["student"]))),
        teacher=sizes_of(build(architecture(model["teacher"]))),
        micro_rows=data["batch_size"],
        rows=data["global_batch_size"],
        prompt=data["max_prompt_length"],
        response=data["max_response_length"],
        written=by_default if share is None else share,
    )


def architecture(source: str) -> dict[str, Any]:
    """Return the config fields of a hub id, or of a model that a recipe makes itself."""
    return dict(MODELS[LOCAL.get(source, source)]["config"])


def _size(recipe: Recipe, hardware: Hardware) -> str:
    size = memory(recipe, hardware)
    return f"{size / GIB:.0f} GiB" + ("" if size < ROOM else ": too much")


def _time(value: float) -> str:
    return f"{value:.2g} s" if value < 9.95 else f"{value:.0f} s"


def header(recipe: Recipe) -> list[str]:
    """Return comment lines for the header of a pair's config."""
    task = f"with tasks/{recipe.task}, " if recipe.task else ""
    lines = [f"# By formula, not measured (docs/recipes.md): {task}full rows, GPUs of 80 GB"]
    for hardware in HARDWARE:
        place = hardware.name + (f", {hardware.overlay}" if hardware.overlay else "")
        costs = f"{_time(seconds(recipe, hardware)):>6} per step, {_size(recipe, hardware)}"
        lines.append(f"#   {place:<27} {costs}")
    return lines


def table(recipes: list[Recipe]) -> Iterator[str]:
    """Yield Markdown: a row per recipe and hardware."""
    yield "| pair, task | method | hardware | GiB per GPU | training | generation | **step** |"
    yield "|---|---|---|---|---|---|---|"
    for recipe in recipes:
        task = f", {recipe.task}" if recipe.task else ""
        for hardware in HARDWARE:
            overlay = f", `{hardware.overlay}`" if hardware.overlay else ""
            written = recipe.written * writing_seconds(recipe, hardware)
            cells = (
                f"{recipe.name}{task}",
                recipe.method,
                f"{hardware.name}{overlay}",
                _size(recipe, hardware).replace(" GiB", ""),
                _time(training_seconds(recipe, hardware)),
                _time(written) if written else "–",
                _time(seconds(recipe, hardware)),
            )
            yield f"| {' | '.join(cells)} |"


def documents(recipes: list[Recipe]) -> dict[Path, tuple[re.Pattern[str], str]]:
    """Return file → pattern of the costs in it, and their new text."""
    rows = re.compile(r"\| pair, task \|.*?(?=\n\n|\Z)", re.DOTALL)
    found = {ROOT / "docs" / "recipes.md": (rows, "\n".join(table(recipes)))}
    lines = re.compile(r"# By formula, not measured.*?(?=\n#\n)", re.DOTALL)
    for recipe in reversed(recipes):  # the first task comes last: it is its header's
        path = ROOT / "configs" / "pairs" / f"{recipe.name}.yaml"
        found[path] = (lines, "\n".join(header(recipe)))
    return found


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    recipes = [read_recipe(*names) for names in RECIPES]
    for path, (place, wanted) in documents(recipes).items():
        if options.write:
            text = path.read_text(encoding="utf-8")
            path.write_text(place.sub(lambda _, w=wanted: w, text, count=1), encoding="utf-8")
        else:
            print(f"{path.relative_to(ROOT)}\n{wanted}\n")


if __name__ == "__main__":
    main()
