"""Location of a model's files: a folder, a hub id with or without a revision, or a GGUF file.

Owns the parsing of ``--model.student`` and ``--model.teacher``, and one-line errors for locations
that cannot be reached. Does not own the content of the files.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub import is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import cached_file

from okd_lightning.errors import ModelError, ModelNotFoundError
from okd_lightning.models.gguf_files import SUFFIX, require_gguf

ModelSource: TypeAlias = str | dict[str, Any] | PreTrainedModel
"""A location (``locate``); a config to start from random weights; or a model already loaded."""

if TYPE_CHECKING:
    ModelArgument: TypeAlias = ModelSource | PathLike[str] | PeftModel
else:  # types of the command line: --help would else list every architecture of transformers
    ModelArgument = str | dict[str, Any]

_NO_FILE = ("does not appear to have a file", "Should have a `model_type` key")
_SETTINGS = (".json", ".jinja", ".txt", ".model")
_LARGEST = 256 << 20
_CHECKPOINT = ".ckpt"

_REMOTE_CODE = ("trust_remote_code", "custom code")


@dataclass(frozen=True)
class Source:
    """Location of a model's files.

    Attributes:
        given: The user's text.
        name: A folder or a hub id, for transformers.
        revision: Branch, tag or commit of a hub id; None for its main branch.
        gguf_file: The file within ``name`` that holds config, tokenizer and weights; None for a
            folder of config.json and safetensors.
    """

    given: str
    name: str
    revision: str | None = None
    gguf_file: str | None = None

    @property
    def folder(self) -> Path | None:
        """The local folder; None for a hub id."""
        path = Path(self.name)
        return path if path.is_dir() else None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained`` besides ``name``.

        Code of a repository is never run: without the explicit False, transformers asks on stdin.
        """
        known = {"revision": self.revision, "gguf_file": self.gguf_file}
        given = {name: value for name, value in known.items() if value is not None}
        return {"trust_remote_code": False, **given}

    def file(self, name: str) -> Path | None:
        """Return a file of the folder or repository, downloaded if necessary; None if missing."""
        if self.folder is not None:
            path = self.folder / name
            return path if path.is_file() else None
        found = cached_file(
            self.name,
            name,
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)


def _check_settings(folder: Path, where: str) -> None:
    """Refuse settings and tokenizer files that are too large: they are read whole into memory.

    Raises:
        ModelError: A file is too large; the message names it.
    """
    for path in folder.glob("*"):
        is_large = path.suffix in _SETTINGS and path.is_file() and path.stat().st_size > _LARGEST
        if is_large:
            raise ModelError(
                f"{where}: {path.name} has more than {_LARGEST >> 20} MiB, which no file of "
                "settings or tokens has; copy or download it again"
            )


def locate(source: str, option: str) -> Source:
    """Parse the user's text as a location.

    Tried in this order: a folder (its name may contain @); a ``.gguf`` file;
    ``owner/name[@revision]`` on the hub; ``owner/name/FILE.gguf[@revision]`` on the hub.

    Args:
        source: Folder, file or hub id.
        option: How the user named it, for messages.

    Raises:
        ModelNotFoundError: No such folder or file, or a file that is not GGUF.
        ModelError: A GGUF file, and the package that reads it is not installed.
    """
    if not source.strip():
        raise ModelNotFoundError(f"{option} is empty; give a folder, a .gguf file or a hub id")
    path = Path(source).expanduser()
    if path.is_dir():
        _check_settings(path, f"{option} {source!r}")
        return Source(source, str(path))
    if path.is_file():
        if path.suffix == _CHECKPOINT:
            raise ModelNotFoundError(f"{option} {source!r} is a checkpoint; {_exported(path)}")
        if path.suffix.lower() != SUFFIX:
            raise ModelNotFoundError(
                f"{option} {source!r} is a file; expected a folder with config.json and "
                f"safetensors (such as {str(path.parent)!r}), a .gguf file, or a hub id"
            )
        require_gguf(source, option)
        return Source(source, str(path.parent), gguf_file=path.name)
    name, at, revision = source.partition("@")
    parts = name.split("/")
    is_path = source.startswith((".", "/", "~"))
    is_hub_file = len(parts) > 2 and name.lower().endswith(SUFFIX) and not is_path
    if is_path or (len(parts) > 2 and not is_hub_file):
        raise ModelNotFoundError(f"{option} {source!r}: there is no such folder{_near(path)}")
    if at and not revision:
        raise ModelNotFoundError(
            f"{option} {source!r}: no revision after @; give {name}@BRANCH_TAG_OR_COMMIT, or {name}"
        )
    if is_hub_file:
        require_gguf(source, option)
        return Source(source, "/".join(parts[:2]), revision or None, "/".join(parts[2:]))
    return Source(source, name, revision or None)


def unreachable(source: Source, option: str, what: str, error: Exception) -> ModelNotFoundError:
    """Return the one-line error for a model or tokenizer that does not load.

    Args:
        source: Its location.
        option: How the user named it.
        what: "model" or "tokenizer".
        error: The error from transformers.
    """
    start = f"{option} {source.given!r}"
    if needs_remote_code(error):
        return ModelNotFoundError(f"{start}: {REMOTE_CODE_ADVICE}")
    if source.gguf_file is not None and source.folder is not None:
        return ModelNotFoundError(f"{start}: no {what} can be read from it: {first_line(error)}")
    if source.folder is not None:
        return ModelNotFoundError(
            f"{start}: the folder holds no {what} that can be loaded: {first_line(error)}"
            f"{_other_contents(source.folder) if what == 'model' else ''}"
        )
    return ModelNotFoundError(f"{start}: {_hub_reason(source, error)}")


REMOTE_CODE_ADVICE = (
    "its architecture is code of its own repository (auto_map in config.json), which is not run; "
    "use a model whose model_type transformers has"
)


def needs_remote_code(error: Exception) -> bool:
    """Return whether transformers refused to run a repository's code."""
    return any(text in str(error) for text in _REMOTE_CODE)


def first_line(error: Exception) -> str:
    """Return the first line of a message, or the exception's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _hub_reason(source: Source, error: Exception) -> str:
    """Return the reason why a hub id cannot be read, and the remedy."""
    kinds = {type(cause) for cause in _causes(error)}

    def is_any(*wanted: type[Exception]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if is_any(GatedRepoError):
        return (
            f"the repository is gated; accept its terms at https://huggingface.co/{source.name} "
            "and log in (hf auth login, or the environment variable HF_TOKEN)"
        )
    if is_any(RevisionNotFoundError):
        return f"the repository has no revision {source.revision!r}; give a branch, tag or commit"
    if is_any(RepositoryNotFoundError):
        return (
            "neither a folder nor a hub id: the hub has no such repository (a private one needs "
            "hf auth login); give the path of a folder with config.json and safetensors"
        )
    of = f" revision {source.revision!r} of" if source.revision else ""
    if is_offline_mode() or is_any(OfflineModeIsEnabled):
        return (
            f"neither a folder nor in the local cache{of and f' ({of.strip()} it)'}, and "
            "HF_HUB_OFFLINE forbids a download; give the path of a folder with config.json and "
            "safetensors, or unset HF_HUB_OFFLINE"
        )
    is_missing = is_any(EntryNotFoundError) and not is_any(LocalEntryNotFoundError)
    if is_missing or any(text in str(error) for text in _NO_FILE):
        return f"the repository holds no such file: {first_line(error)}"
    return (
        f"neither a folder nor a hub id that can be reached ({first_line(error)}); give the path "
        "of a folder with config.json and safetensors"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _other_contents(folder: Path) -> str:
    """Return a hint at other models in the folder: a GGUF file, or a model in a subfolder."""
    files = sorted(folder.glob(f"*{SUFFIX}"))
    if files:
        return f"; it holds {files[0].name}: give {str(files[0])!r}"
    if folder.suffix == _CHECKPOINT:
        return f"; it is a checkpoint: {_exported(folder)}"
    for name in ("config.json", "adapter_config.json"):
        inner = sorted(folder.glob(f"*/{name}"))
        if inner and not (folder / name).is_file():
            return f"; there is one in {str(inner[0].parent)!r}"
    checkpoints = sorted([*folder.glob(f"*{_CHECKPOINT}"), *folder.glob(f"*/*{_CHECKPOINT}")])
    if checkpoints and not (folder / "config.json").is_file():
        return f"; it holds the checkpoint {checkpoints[0].name}: {_exported(checkpoints[0])}"
    return ""


def _exported(checkpoint: Path) -> str:
    """Return how a model folder is made of a run's checkpoint."""
    return (
        f"okd-lightning export --ckpt_path {shlex.quote(str(checkpoint))} --out FOLDER writes its "
        "student as a folder that can be given here"
    )


def _near(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
