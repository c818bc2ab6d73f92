"""Fixtures of all tests: tiny models, a tiny tokenizer, folders of both, and real data."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cheap_process
import no_network
import pytest
import tiny
import torch
from longest_files import place_of
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from vllm_servers import ServerPool

from okd_lightning.training.module import DistillationModule

SHARED_DATA = Path(__file__).parents[1].parent / "shared" / "data"

# the key that signs checkpoints is not the developer's own
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="okd-config-")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # make test-portable asks for two


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: place_of(item.path))


def pytest_collection_finish() -> None:
    cheap_process.make_cheap()


@pytest.fixture(autouse=True)
def _same_environment() -> Iterator[None]:
    """Lightning tells its processes by variables where they are; other tests' are not there."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(
        {name: value for name, value in before.items() if not name.startswith("PYTEST_")}
    )


@pytest.fixture(autouse=True)
def _leaves_no_process_group() -> Iterator[None]:
    """Lightning keeps a strategy's process group until the process ends, for later tests too."""
    was_there = torch.distributed.is_initialized()
    yield
    if torch.distributed.is_initialized() and not was_there:
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _reaches_no_network() -> Iterator[None]:
    """A test that asks a server elsewhere waits, and passes or fails with what it answers."""
    no_network.attempts.clear()
    yield
    assert no_network.attempts == []


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models, data and tokenizers.

    Whatever reads it takes this fixture: pytest then sums up the tests that are skipped without it
    in one line, as all of them are skipped here.
    """
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is not here: no folder {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def vllm_servers(tmp_path_factory) -> Iterator[ServerPool]:
    """Real vLLM servers, each started when a test first asks for it.

    Tests that take this fixture have the marker ``real_vllm``; ``make test-vllm`` runs them.
    """
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed in this environment: make test-vllm")
    pool = ServerPool(tmp_path_factory.mktemp("vllm"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of one id per letter; change copies only."""
    return tiny.make_tokenizer()


@pytest.fixture
def tiny_pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """(student, teacher): both Llamas, with different padding of their vocabularies."""
    return tiny.make_llama(1), tiny.make_llama(2, tiny.TEACHER_ROWS)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A saved Llama with its tokenizer."""
    folder = tmp_path_factory.mktemp("student")
    tiny.make_llama(1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dropout_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A saved GPT-2 (dropout 0.1) with its tokenizer."""
    folder = tmp_path_factory.mktemp("dropout")
    tiny.make_gpt2(3).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A saved Llama with other weights and more padding, and the same tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny.make_llama(2, tiny.TEACHER_ROWS).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_module(student_folder, teacher_folder) -> Callable[..., DistillationModule]:
    """A module of the two Llama folders; whatever is given by name overrides them.

    ``kind`` makes a Teacher of the teacher's folder.
    """

    def make(kind=None, **overrides) -> DistillationModule:
        settings = {"student": str(student_folder), "teacher": str(teacher_folder)}
        settings = {"learning_rate": 1e-2, **settings, **overrides}
        if kind is not None:
            settings["teacher"] = kind(settings["teacher"])
        return DistillationModule(**settings)

    return make
