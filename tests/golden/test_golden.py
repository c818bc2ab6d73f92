"""Golden runs: a change that should not touch the numbers touches none of them.

Frozen here: the losses of every step, as hexadecimal floats, and a SHA-256 of the trained weights,
one section a platform in ``<name>.txt``. On a platform with a section both are compared with
``==``; elsewhere the losses are compared with the first section's, to rounding. ``make golden``
writes this platform's sections anew: only on purpose, with the reason in the changelog.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import pytest
import torch
import transformers
from golden.runs import RUNS, Golden

FOLDER = Path(__file__).parent
WRITES = os.environ.get("OKD_GOLDEN") == "write"


def this_platform() -> str:
    """What the last bit depends on."""
    capability = torch.backends.cpu.get_cpu_capability()
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = [
        re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("vendor_id", "cpu family", "model")
    ]
    processor = " ".join(match[1] for match in found if match) or platform.machine()
    return (
        f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}, "
        f"{capability}, {torch.get_num_threads()} thread(s), {processor}"
    )


def read(name: str) -> dict[str, Golden]:
    """Platform → what the run did there."""
    path = FOLDER / f"{name}.txt"
    sections = path.read_text().strip().split("\n\n") if path.exists() else []
    found = {}
    for section in sections:
        title, digest, *losses = section.splitlines()
        found[title.strip("[]")] = Golden(tuple(float.fromhex(loss) for loss in losses), digest)
    return found


def write(name: str, known: dict[str, Golden]) -> None:
    """Write all sections."""
    sections = [
        "\n".join([f"[{title}]", golden.digest, *(loss.hex() for loss in golden.losses)])
        for title, golden in known.items()
    ]
    (FOLDER / f"{name}.txt").write_text("\n\n".join(sections) + "\n")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_what_it_was(name, tmp_path):
    found, known, here = RUNS[name](tmp_path), read(name), this_platform()
    assert len(set(found.losses)) == len(found.losses) > 1
    if WRITES:
        write(name, {**known, here: found})
    elif here in known:
        assert found == known[here]
    else:
        first = next(iter(known.values()))
        assert found.losses == pytest.approx(first.losses, rel=1e-5, abs=1e-7)


def test_every_file_is_of_a_run():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(RUNS)
