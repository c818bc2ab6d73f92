"""The key of a user, and its signatures.

Frozen here: signed content is recognised, and nothing that differs from it; the key is in the
user's config folder and no other user can read it; processes that need it at the same moment make
one; without a place for it, and with one that others can read, nothing is signed.
"""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from okd_lightning.checkpoints import signature
from okd_lightning.checkpoints.signature import can_sign, is_own, is_own_run, run_signature


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path at which a new user's key is made."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "okd_lightning" / "checkpoint.key"


def run(**changed):
    own = {"config": "model: {}", "started_in": "/there", "arguments": {"student": "a"}}
    return {**own, "signature": run_signature(*own.values()), **changed}


def test_a_run_is_recognised_and_no_other(key, monkeypatch, tmp_path):
    assert is_own_run(run())
    for name, value in {"config": "", "started_in": "/", "arguments": {}, "signature": 3}.items():
        assert not is_own_run(run(**{name: value}))
    assert not is_own_run({})
    signed = run()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "somebody"))
    assert not is_own_run(signed)
    assert not (tmp_path / "somebody").exists()


def test_only_its_user_can_read_the_key(key):
    assert can_sign()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert [path.name for path in key.parent.iterdir()] == [key.name]


def test_processes_at_the_same_moment_make_one_key(key, monkeypatch):
    """All processes have found no key before one is made."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: signature._make_key(key), range(16)))
    first = key.read_bytes()
    signature._make_key(key)
    assert key.read_bytes() == first
    assert [path.name for path in key.parent.iterdir()] == [key.name]


def test_without_a_place_for_the_key_nothing_is_signed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert not can_sign()
    assert run()["signature"] is None
    assert not is_own("text", None)


def test_a_key_that_others_can_read_is_not_used(key):
    signed = run()
    key.chmod(0o640)
    signature._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="checkpoint.key is not used.*mode 0600.*remove it"):
        assert not is_own_run(signed)
    assert run()["signature"] is None
    key.unlink()
    assert run()["signature"] is not None
