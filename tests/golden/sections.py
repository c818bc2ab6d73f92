"""Files of golden runs: one section a platform, with the weights' digest and the losses."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import pytest
import torch
import transformers
from golden.runs import Golden

FOLDER = Path(__file__).parent
STEP_ROUNDING = 3e-5
"""Most that one float32 step may move the losses of two platforms apart.

AdamW moves a weight by the learning rate times its gradient over the gradient's own size. An error
of 2^-24 of itself in each of 17,000 gradients changes the next loss by up to
1e-2 * 17,000 * 2^-24 = 1e-5, and by a few times as much where summands of a gradient cancel."""
WRITES = os.environ.get("OKD_GOLDEN") == "write"


def this_platform() -> str:
    """Return the properties of the platform that determine the last bit."""
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


def read(path: Path) -> dict[str, Golden]:
    """Platform → what the run did there."""
    sections = path.read_text().strip().split("\n\n") if path.exists() else []
    found = {}
    for section in sections:
        title, digest, *losses = section.splitlines()
        found[title.strip("[]")] = Golden(tuple(float.fromhex(loss) for loss in losses), digest)
    return found


def write(path: Path, known: dict[str, Golden]) -> None:
    """Write all sections."""
    sections = [
        "\n".join([f"[{title}]", golden.digest, *(loss.hex() for loss in golden.losses)])
        for title, golden in known.items()
    ]
    path.write_text("\n\n".join(sections) + "\n")


def compare(path: Path, found: Golden) -> None:
    """Assert that a run did what its file says; write it where that is asked for."""
    known, here = read(path), this_platform()
    assert len(set(found.losses)) == len(found.losses) > 1
    if WRITES:
        write(path, {**known, here: found})
    elif here in known:
        assert found == known[here]
    else:
        first = next(iter(known.values()))
        assert len(found.losses) == len(first.losses)
        for steps, (own, other) in enumerate(zip(found.losses, first.losses, strict=True)):
            assert own == pytest.approx(other, rel=1e-5, abs=1e-7 + steps * STEP_ROUNDING), steps
