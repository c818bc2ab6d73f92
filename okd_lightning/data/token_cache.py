"""Cache of tokenized data on disk, keyed by the content of everything that it depends on.

The key is a hash of the rows, the tokenizer with its chat template, all settings, and the code that
tokenizes; any change gives another entry. Entries are never changed and can be deleted at any time.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from datetime import date
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from huggingface_hub import constants
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from okd_lightning.data.columns import RawRow
from okd_lightning.data.examples import ExampleSet, build_examples, warn_of
from okd_lightning.data.images import RowImages
from okd_lightning.data.stored_examples import pack_examples, unpack_examples
from okd_lightning.durable_files import own_aside, replacing
from okd_lightning.errors import CacheError
from okd_lightning.models.text_ids import RULES_VERSION

AUTO = "auto"
FEWEST_ROWS = 1000
"""Fewest rows to cache: fewer are tokenized faster than their key is computed."""

_PLACES = ("name_or_path", "tokenizer_file", "vocab_file", "merges_file")
"""Settings about a tokenizer's location, which do not change its ids."""


def cached_examples(
    folder: str | None, rows: Sequence[RawRow], tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> ExampleSet:
    """Return the result of ``build_examples``, from disk if it is cached.

    Args:
        folder: Folder of entries; "auto" for okd_lightning/tokens in the Hugging Face cache
            (``HF_HOME``); None for no cache.
        rows: At least one.
        tokenizer: The run's tokenizer.
        **settings: The other arguments of ``build_examples``.

    Raises:
        ConfigError: See ``build_examples``.
        DataError: See ``build_examples``.
    """
    key = None
    if folder is not None and len(rows) >= FEWEST_ROWS:
        key = _key(rows, tokenizer, settings)
    if folder is None or key is None:
        return build_examples(rows, tokenizer, **settings)
    path = _folder(folder) / f"{key}.tokens"
    found = _read(path)
    if found is not None:
        warn_of(found, settings["where"])
        return found
    found = build_examples(rows, tokenizer, **settings)
    _write(path, found)
    return found


def _folder(folder: str) -> Path:
    if folder == AUTO:
        return Path(constants.HF_HOME) / "okd_lightning" / "tokens"
    return Path(folder).expanduser()


def _read(path: Path) -> ExampleSet | None:
    """Return an entry; None if it is missing, or, with a warning, broken."""
    try:
        return unpack_examples(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, CacheError) as error:
        rank_zero_warn(f"tokenized data {path}: {error}; the rows are tokenized again")
        return None


def _write(path: Path, found: ExampleSet) -> None:
    """Write an entry; warn if the folder cannot be written."""
    try:
        content = pack_examples(found)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, own_aside(path)) as file:
            file.write(content)
    except OSError as error:
        rank_zero_warn(
            f"tokenized data cannot be kept in {path.parent} ({error}), so every run tokenizes "
            "again; give --data.token_cache a folder, or null"
        )


def _key(
    rows: Sequence[RawRow], tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> str | None:
    """Return a digest of all that determines the ids; None if JSON cannot represent a row."""
    found = blake2b(digest_size=20)
    try:
        for row in rows:
            found.update(json.dumps(row).encode() + b"\n")
    except TypeError:
        return None
    told = {name: value for name, value in settings.items() if name != "where"}
    teacher = told.pop("teacher_tokenizer", None)
    images: RowImages | None = told.pop("images", None)
    if images is not None:
        found.update(images.digest_of(rows, told["columns"], settings["where"]).encode())
    if teacher is not None:
        found.update(tokenizer_digest(teacher))
    found.update(repr(sorted(told.items())).encode())
    found.update(tokenizer_digest(tokenizer))
    found.update(_code_digest())
    templates = [str(one.chat_template) for one in (tokenizer, teacher) if one is not None]
    if any("strftime_now" in template for template in templates):
        found.update(date.today().isoformat().encode())
    return found.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Return a digest of a tokenizer's behaviour, independent of its location."""
    found = blake2b(type(tokenizer).__qualname__.encode())
    kept = {k: v for k, v in tokenizer.init_kwargs.items() if k not in _PLACES}
    for part in (kept, tokenizer.special_tokens_map, tokenizer.chat_template):
        found.update(json.dumps(part, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        found.update(_backend_text(backend).encode())
        return found.digest()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                found.update(path.name.encode() + path.read_bytes())
    return found.digest()


def _backend_text(backend: tokenizers.Tokenizer) -> str:
    """Serialize a fast tokenizer without truncation and padding, which its last call has set."""
    truncation, padding = backend.truncation, backend.padding
    backend.no_truncation()
    backend.no_padding()
    try:
        return str(backend.to_str())
    finally:
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


@cache
def _code_digest() -> bytes:
    """Return a digest of the tokenizing code: this package's source, rules, library versions."""
    versions = f"{RULES_VERSION} {transformers.__version__} {tokenizers.__version__}"
    found = blake2b(versions.encode())
    package = Path(__file__).parent
    names = ("records/batches.py", "models/text_ids.py", "models/processors.py")
    others = [package.parent / name for name in names]
    for path in [*sorted(package.glob("*.py")), *others]:
        found.update(path.name.encode() + path.read_bytes())
    return found.digest()
