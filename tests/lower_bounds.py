"""Pin every dependency of pyproject.toml to its lower bound: constraints for make test-oldest.

torch is left out: the Makefile takes the one of constraints.txt: other builds of it are gigabytes.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lower_bounds() -> list[str]:
    """Lines of a constraints file, such as ``lightning==2.6.6``."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in project["dependencies"]]
    return [f"{match[1]}=={match[2]}" for match in found if match and match[1] != "torch"]


if __name__ == "__main__":
    print("\n".join(lower_bounds()))
