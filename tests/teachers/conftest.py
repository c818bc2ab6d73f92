"""Shared by the tests of teachers: a small cache, who is loaded, a pair with two tokenizers."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
from foreign_pairs import save_folders
from transformers import PreTrainedModel

from okd_lightning.teachers import CachedTeacher
from okd_lightning.teachers import loaded as loaded_module


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(CachedTeacher, "part_positions", 20)
    return tmp_path / "cache"


@pytest.fixture
def loaded(monkeypatch) -> list[weakref.ref[PreTrainedModel]]:
    """Weak references to all loaded teachers."""
    found = []
    original = loaded_module.load_checked

    def load(source, option, *args, **kwargs):
        model = original(source, option, *args, **kwargs)
        if option == "--model.teacher":
            found.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loaded_module, "load_checked", load)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folders of a student, and of teachers with its tokenizer and others."""
    folder = tmp_path_factory.mktemp("foreign")
    save_folders(folder)
    return folder
