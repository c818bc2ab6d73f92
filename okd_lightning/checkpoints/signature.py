"""Signatures of checkpoints: whether this user wrote a config.

A config can name code to run. A run signs its config with a key that only its user can read, so
that the user's own checkpoints resume whatever they name. The key is made at the first checkpoint,
in ``okd_lightning/checkpoint.key`` of the user's config folder (``XDG_CONFIG_HOME``, by default
``~/.config``). Without such a folder nothing is signed, and nothing counts as signed.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

_FOLDER, _FILE = "okd_lightning", "checkpoint.key"
_NUM_BYTES = 32


def signature_of(content: Any) -> str | None:
    """Return an HMAC-SHA256 of plain values with this user's key; None where no key can be made."""
    key = _user_key(makes=True)
    return None if key is None else _signed(key, content)


def is_own(content: Any, signature: object) -> bool:
    """Return whether ``signature`` is this user's signature of ``content``."""
    if not isinstance(signature, str):
        return False
    key = _user_key(makes=False)
    return key is not None and hmac.compare_digest(_signed(key, content), signature)


def can_sign() -> bool:
    """Return whether this user has a key, or can have one."""
    return _user_key(makes=True) is not None


def run_signature(
    config: str | None, started_in: str | None, arguments: Mapping[str, Any]
) -> str | None:
    """Return the signature of the settings from which a run can be rebuilt, for its checkpoint.

    Args:
        config: The resolved config; None in a run from Python.
        started_in: The folder that its paths are relative to.
        arguments: The module's constructor arguments, as primitives.
    """
    return signature_of([config, started_in, arguments])


def is_own_run(own: Mapping[str, Any]) -> bool:
    """Return whether this user signed the settings from which a checkpoint's run can be rebuilt.

    Args:
        own: ``okd_lightning`` of the checkpoint.
    """
    content = [own.get("config"), own.get("started_in"), own.get("arguments")]
    return is_own(content, own.get("signature"))


def _signed(key: bytes, content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _user_key(makes: bool) -> bytes | None:
    path = _key_file()
    if path is None:
        return None
    try:
        if makes and not path.exists():
            _make_key(path)
        about = path.stat()
        key = path.read_bytes()
    except OSError:
        return None
    is_private = os.name != "posix" or (
        about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    )
    if not is_private or len(key) != _NUM_BYTES:
        _warn_once(
            f"{path} is not used: expected {_NUM_BYTES} bytes that only you can read (mode 0600); "
            "remove it, and the next checkpoint makes a new one"
        )
        return None
    return key


def _key_file() -> Path | None:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base, _FOLDER, _FILE) if os.path.isabs(base) else None


def _make_key(path: Path) -> None:
    """Write a key aside and link it: if several processes do so at once, the first link counts."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    aside = path.with_name(f".{_FILE}.{secrets.token_hex(8)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_NUM_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(aside, path)
    except FileExistsError:  # another process was first: its key counts
        pass
    finally:
        aside.unlink(missing_ok=True)


@functools.cache
def _warn_once(message: str) -> None:
    rank_zero_warn(message)
