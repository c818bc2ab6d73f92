"""What the tests of a teacher's cache share: a folder of small files, and who is loaded."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from okd_lightning.teachers import CachedTeacher
from okd_lightning.teachers import loaded as loaded_module


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(CachedTeacher, "part_positions", 20)
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch) -> list[weakref.ref[PreTrainedModel]]:
    """Every teacher that is loaded, weakly."""
    found = []
    original = loaded_module.load_checked

    def load(source, option, *args, **kwargs):
        model = original(source, option, *args, **kwargs)
        if option == "--model.teacher":
            found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loaded_module, "load_checked", load)
    return found
