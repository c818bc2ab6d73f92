"""What the tests of a teacher's cache share: a folder of small files, and who is loaded."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from transformers import PreTrainedModel

import okd_lightning.training.pair_module
from okd_lightning.teachers import CachedTeacher


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(CachedTeacher, "part_positions", 20)
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch) -> list[weakref.ref[PreTrainedModel]]:
    """Every teacher that is loaded, weakly."""
    found = []
    original = okd_lightning.training.pair_module.load_checked

    def load(source, option, *args, **kwargs):
        model = original(source, option, *args, **kwargs)
        if option == "--model.teacher":
            found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(okd_lightning.training.pair_module, "load_checked", load)
    return found
