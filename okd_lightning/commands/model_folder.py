"""Output folder of a model: the files that may be replaced, and their complete replacement.

A model of an earlier command may be replaced. Its files stay until all of the new ones are written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from okd_lightning.commands.run_folder import CONFIG_FILE
from okd_lightning.durable_files import require_writable, sync_file, sync_folder
from okd_lightning.errors import OutputError

_MARKER = ".okd-lightning-export"
CUT_RECORD = "shrink.json"
"""Record of a student cut from a teacher: an export replaces it only with ``--overwrite``."""

_OLD_MODEL = ("model*.safetensors*", "adapter_config.json", "adapter_model.*", CUT_RECORD)


def check_model_folder(
    out: Path, sources: Mapping[str, str], overwrite: bool, replaces_exports: bool = True
) -> None:
    """Refuse a folder that is needed again, or that holds something else.

    Args:
        out: The folder to write.
        sources: Locations of the models that are read, by option.
        overwrite: Whether any folder may be written among its files.
        replaces_exports: Whether the folder of an earlier export is replaced without ``overwrite``.

    Raises:
        OutputError: The folder cannot be written, is that of a model that is read, or is not
            empty.
    """
    for option, source in sources.items():
        path = Path(source).expanduser()
        folder = path.parent if path.is_file() else path
        if folder.is_dir() and folder.resolve() == out.resolve():
            raise OutputError(
                f"--out {str(out)!r} is the folder that {option} is loaded from; choose another one"
            )
    is_used = out.is_dir() and any(out.iterdir())
    if is_used and not overwrite and not (replaces_exports and _is_export(out)):
        kind = "a run" if (out / CONFIG_FILE).is_file() else "something other than an export"
        kind = kind if replaces_exports or kind == "a run" else "files"
        raise OutputError(
            f"--out {str(out)!r} holds {kind}: choose another folder, or give --overwrite to write "
            "among its files"
        )
    require_writable(out, "--out")


@contextmanager
def replaced_model(out: Path) -> Iterator[Path]:
    """Yield an empty folder; it becomes ``out`` when the block has ended without an error.

    A new or empty folder is replaced in one step. In a folder with files, the new ones are moved in
    one by one; weights and record of an earlier model are removed, as they would be read instead.

    Raises:
        OutputError: An error such as a full disk. The files that ``out`` held before are untouched.
    """
    out = out.resolve()
    is_used = out.is_dir() and any(out.iterdir())
    aside = out / ".new" if is_used else out.with_name(f".{out.name}.new")
    shutil.rmtree(aside, ignore_errors=True)  # left by a killed command
    try:
        aside.mkdir(parents=True)
        yield aside
        if not (aside / CUT_RECORD).exists():
            (aside / _MARKER).touch()
        for path in aside.rglob("*"):
            sync_file(path)
        sync_folder(aside)
        if is_used:
            _move_in(aside, out)
        else:
            os.replace(aside, out)
            sync_folder(out.parent)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"--out {str(out)!r} cannot be written ({error}); make room, or choose another folder"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_in(aside: Path, out: Path) -> None:
    for old in [path for pattern in _OLD_MODEL for path in out.glob(pattern)]:
        old.unlink()
    for path in aside.iterdir():
        if (out / path.name).is_dir():
            shutil.rmtree(out / path.name)
        path.replace(out / path.name)
    sync_folder(out)


def _is_export(folder: Path) -> bool:
    """Return whether an export wrote this folder: by its marker, or by the card of old versions."""
    if (folder / CUT_RECORD).is_file():
        return False
    card = folder / "README.md"
    is_ours = card.is_file() and "okd-lightning" in card.read_text(errors="replace")
    return (folder / _MARKER).is_file() or (is_ours and (folder / "config.json").is_file())
