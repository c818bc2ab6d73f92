"""Imports between packages go downwards only, and the linter detects upward ones.

* The contract of ``.importlinter`` is kept by the package as it is.
* It fires on an upward import and on Lightning inside the mathematics.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def copy_package(folder: Path) -> None:
    shutil.copytree(
        ROOT / "okd_lightning",
        folder / "okd_lightning",
        ignore=shutil.ignore_patterns("__pycache__"),
        dirs_exist_ok=True,
    )
    shutil.copy(ROOT / ".importlinter", folder)


def run(folder: Path) -> tuple[int, str]:
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_contract_is_kept(tmp_path):
    copy_package(tmp_path)
    status, output = run(tmp_path)
    assert status == 0, output
    assert "5 kept, 0 broken" in output


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("divergences/kl.py", "import lightning", "The mathematics knows neither"),
        (
            "records/batches.py",
            "import okd_lightning.training.module",
            "Each floor imports only downwards",
        ),
        ("data/sources.py", "import okd_lightning.callbacks.methods.kd", "Each floor imports only"),
    ],
)
def test_contract_fires(tmp_path, file, line, contract):
    copy_package(tmp_path)
    path = tmp_path / "okd_lightning" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    status, output = run(tmp_path)
    assert status != 0
    assert "Broken contracts" in output, output
    assert contract in output.split("Broken contracts")[1]
