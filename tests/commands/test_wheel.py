"""Frozen here: an installed wheel is complete, and needs nothing of the checkout.

* it holds every module, ``py.typed``, the configs and the quickstart's files, and nothing of the
  tests, the benchmarks or the shelf of callbacks;
* ``okd-lightning`` starts from it, finds the configs by name, and runs the quickstart,
  which prints no message of other libraries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_workbench import NOISE

import okd_lightning

ROOT = Path(okd_lightning.__file__).parents[1]
SOURCES = ("okd_lightning", "configs", "callbacks", "tests", "benchmarks")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no old build folder of the checkout takes part."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, source / file)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out)]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's contents as pip lays them down."""
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target"]
    subprocess.run([*command, str(target), str(wheel)], check=True, capture_output=True)
    return target


def run_installed(installed: Path, code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [sys.executable, *(["-c", code] if code else ["-m", "okd_lightning"]), *argv]
    return subprocess.run(command, cwd=installed, capture_output=True, text=True, env=environment)


def test_the_wheel_is_complete_and_nothing_more(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for path in (ROOT / "okd_lightning").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            expected.add(str(path.relative_to(ROOT)))
    for path in (ROOT / "configs").rglob("*.yaml"):
        expected.add(f"okd_lightning/{path.relative_to(ROOT)}")
    assert held == expected


def test_the_wheel_states_its_licence_and_script(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    assert "LICENSE" in names
    script = archive.read(names["entry_points.txt"]).decode()
    assert "okd-lightning = okd_lightning.__main__:main" in script


def test_it_starts_where_it_is_installed(installed: Path) -> None:
    done = run_installed(installed, "", "--version")
    assert done.stdout == f"okd-lightning {okd_lightning.__version__}\n"
    where = run_installed(installed, "import okd_lightning; print(okd_lightning.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed)


SHORT_QUICKSTART = """
import sys
from okd_lightning.__main__ import main
from okd_lightning.commands.cli_arguments import packaged_configs, prepare
from okd_lightning.commands.quickstart import command

class Short(command.Recipe):
    def __init__(self, **given):
        super().__init__(warm_steps=2, **given)

print(*packaged_configs())
print(*packaged_configs().values())
print(prepare(["fit", "--config", "tinystories"])[:2])
command.Recipe = Short
sys.exit(main())
"""


def test_it_finds_its_configs_by_name_and_runs_the_quickstart(
    installed: Path, tmp_path: Path
) -> None:
    """One process runs all commands, because imports take most of the time."""
    argv = ("quickstart", "--method", "SFT", "--steps", "1", "--out", str(tmp_path))
    done = run_installed(installed, SHORT_QUICKSTART, *argv)
    assert done.returncode == 0, done.stderr
    names, paths, prepared = done.stdout.splitlines()[:3]
    assert "tinystories" in names.split()
    assert all(Path(path).is_relative_to(installed) for path in paths.split())
    assert prepared == "['fit', '--config']"
    assert "results.json" in done.stdout
    assert not [noise for noise in NOISE if noise in done.stdout + done.stderr], done.stderr
    assert (tmp_path / "results.json").is_file()
    assert (tmp_path / "learning_curve.png").is_file()
