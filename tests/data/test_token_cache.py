"""Tokenized data on disk.

Frozen here: what is read is what was built, of every layout; a changed row, order, template,
tokenizer, length or setting, changed code and another day where a template asks for it are other
entries; where a tokenizer lies, and what its last call left in it, is not; small sets, rows that
JSON cannot say and null are not kept; broken entries are tokenized again with a warning; processes
that write at the same time end with one whole entry; a folder that cannot be written costs a
warning and no more.
"""

from __future__ import annotations

import datetime
import multiprocessing
from copy import deepcopy
from pathlib import Path

import pytest
import tiny
import tool_chats
from byte_tokenizer import CHATML, make_byte_tokenizer
from huggingface_hub import constants
from transformers import ByT5Tokenizer

import okd_lightning.data.token_cache as token_cache
from okd_lightning.callbacks import SFT
from okd_lightning.data import Columns, RolloutDataModule, build_examples
from okd_lightning.data.teacher_prompts import TeacherPrompts
from okd_lightning.data.token_cache import cached_examples
from okd_lightning.tools import Calculator, Toolbox

ROWS = [{"prompt": f"What is {i}?", "response": f"It is {i} \x00 é"} for i in range(1000)]
CHATS = [
    {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "A"}]}
    for i in range(1000)
]
SETTINGS = {
    "eos_id": 1,
    "columns": Columns(),
    "max_prompt_length": 14,
    "max_response_length": 12,
    "on_overlong": "skip",
    "needs_response": True,
    "where": "rows",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "tokens"


@pytest.fixture
def builds(monkeypatch) -> list[int]:
    """The number of rows at every time that rows are tokenized."""
    found = []

    def build(rows, *args, **kwargs):
        found.append(len(rows))
        return build_examples(rows, *args, **kwargs)

    monkeypatch.setattr(token_cache, "build_examples", build)
    return found


def get(folder, rows=ROWS, tokenizer=None, **settings):
    tokenizer = make_byte_tokenizer() if tokenizer is None else tokenizer
    return cached_examples(
        None if folder is None else str(folder), rows, tokenizer, **{**SETTINGS, **settings}
    )


def chat_tokenizer(template: str = CHATML):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_what_is_read_is_what_was_built(folder, builds):
    first, second = get(folder), get(folder)
    assert builds == [1000]
    assert second == first == build_examples(ROWS, make_byte_tokenizer(), **SETTINGS)
    assert first.num_cut == 1000
    assert get(folder, max_prompt_length=11) == get(folder, max_prompt_length=11)
    assert get(folder, max_prompt_length=11).skipped == {"overlong prompt": 900}
    assert [type(x) for x in second.examples[0].prompt_ids[:1]] == [int]
    assert second.ends_of_turn(make_byte_tokenizer()) == first.ends_of_turn(make_byte_tokenizer())


def test_chats_with_tools_and_teacher_prompts(folder, builds):
    tokenizer = tool_chats.make_tokenizer()
    declared = Toolbox([Calculator()]).schemas
    rows = [{"messages": [{"role": "user", "content": "ab"}]} for _ in range(1000)]
    settings = {
        "columns": Columns(prompt=None, declared_tools=declared),
        "needs_response": False,
        "max_prompt_length": 2000,
    }
    first, second = (get(folder, rows, tokenizer, **settings) for _ in range(2))
    assert first.examples[3].chat is not None
    assert second == first
    prompts = TeacherPrompts(100, template="{reference}{prompt}")
    first, second = (get(folder, ROWS, teacher_prompts=prompts) for _ in range(2))
    assert first.examples[3].teacher_prompt_ids
    assert second == first
    assert builds == [1000, 1000]


def test_loss_on_earlier_turns(folder, builds):
    turns = [{"role": r, "content": "ab"} for r in ("user", "assistant", "user", "assistant")]
    rows = [{"messages": turns[: 2 + 2 * (i % 2)]} for i in range(1000)]
    settings = {"columns": Columns(prompt=None), "max_prompt_length": 500}
    first, second = (get(folder, rows, chat_tokenizer(), **settings) for _ in range(2))
    assert any(first.examples[1].prompt_mask)
    assert not any(first.examples[0].prompt_mask)
    assert second == first
    assert builds == [1000]


CHANGES = {
    "row": {"rows": [*ROWS[:-1], {**ROWS[-1], "response": "It is 7"}]},
    "order": {"rows": ROWS[::-1]},
    "one row less": {"rows": [*ROWS, ROWS[0]]},
    "prompt length": {"max_prompt_length": 15},
    "response length": {"max_response_length": 11},
    "overlong": {"on_overlong": "error", "max_prompt_length": 99},
    "eos": {"eos_id": 0},
    "column": {"columns": Columns(response="prompt")},
    "needs response": {"needs_response": False},
    "teacher prompts": {"teacher_prompts": TeacherPrompts(90, template="{prompt}")},
    "what opens a text": {"tokenizer": make_byte_tokenizer(opening="<s>")},
    "template": {"tokenizer": chat_tokenizer()},
    "other template": {"tokenizer": chat_tokenizer(CHATML + " ")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_ids_is_another_entry(change, folder, builds):
    get(folder)
    for _ in range(2):
        assert get(folder, **CHANGES[change]) == get(None, **CHANGES[change])
    assert len(builds) == 1 + 1 + 2  # two of them without a cache
    assert len(list(folder.iterdir())) == 2


def test_added_tokens_and_merges_are_another_tokenizer(folder, builds):
    get(folder)
    tokenizer = make_byte_tokenizer()
    tokenizer.add_tokens(["What is"])
    assert get(folder, tokenizer=tokenizer) != get(folder)
    assert len(builds) == 2


def test_changed_code_and_another_day(folder, builds, monkeypatch):
    get(folder)
    monkeypatch.setattr(token_cache, "_code_digest", lambda: b"other code")
    get(folder)
    assert len(builds) == 2

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return cls(2100, 1, 1)

    dated = chat_tokenizer("{{ strftime_now('%d') }}" + CHATML)
    settings = {"columns": Columns(prompt=None), "max_prompt_length": 99}
    for tokenizer, expected in ((chat_tokenizer(), 1), (dated, 2)):
        del builds[:]
        get(folder, CHATS, tokenizer, **settings)
        with monkeypatch.context() as patch:
            patch.setattr(token_cache, "date", Tomorrow)
            get(folder, CHATS, tokenizer, **settings)
        assert len(builds) == expected


def test_where_a_tokenizer_lies_and_what_it_did_last_is_nothing(folder, builds, tmp_path):
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = "</s>"
    get(folder, tokenizer=tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer.backend_tokenizer.truncation is not None
    get(folder, tokenizer=tokenizer)
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 2  # as it was
    assert tokenizer.backend_tokenizer.padding is not None
    assert builds == [1000]
    for name in ("here", "there"):
        make_byte_tokenizer().save_pretrained(tmp_path / name)
        get(folder, tokenizer=type(tokenizer).from_pretrained(tmp_path / name))
    assert builds == [1000, 1000]  # saving writes down more than was set, once


def test_a_tokenizer_in_python(folder, builds):
    for extra in (0, 0, 5):
        get(folder, tokenizer=ByT5Tokenizer(extra_ids=extra), needs_response=True)
    assert len(builds) == 2


def test_what_is_not_kept(folder, builds):
    for _ in range(2):
        get(None)
        get(folder, ROWS[:999])
        get(folder, [{**row, "when": datetime.date(2020, 1, 1)} for row in ROWS])
    assert len(builds) == 6
    assert not folder.exists()


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, lambda p: p.write_bytes(b"")])
def test_a_broken_entry_is_made_again(folder, builds, damage):
    expected = get(folder)
    (path,) = folder.iterdir()
    damage(path)
    with pytest.warns(UserWarning, match="the rows are tokenized again"):
        assert get(folder) == expected
    assert get(folder) == expected
    assert len(builds) == 2


def test_a_folder_that_cannot_be_written(tmp_path, builds):
    (tmp_path / "file").touch()
    for _ in range(2):
        with pytest.warns(UserWarning, match="tokenized data cannot be kept in"):
            assert len(get(tmp_path / "file" / "tokens")) == 1000
    assert len(builds) == 2


def _get_in_a_process(folder: str) -> int:
    return len(get(folder))


def test_processes_that_write_at_the_same_time(folder, builds):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_get_in_a_process, [str(folder)] * 3) == [1000] * 3
    assert len(get(folder)) == 1000
    assert builds == []
    assert len(list(folder.iterdir())) == 1


def test_the_data_module_s_option(tmp_path, make_module, builds, monkeypatch, folder):
    rows = tiny.make_rows(1000)

    def fit(**data) -> list[dict[str, float]]:
        data = {"prompts_per_epoch": 8, **data}
        return tiny.fit(tmp_path, make_module(), [SFT()], rows, data=data).losses

    expected = fit(token_cache=None)
    assert fit(token_cache=str(folder)) == fit(token_cache=str(folder)) == expected
    assert builds == [1000, 1000]
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    assert RolloutDataModule(rows).token_cache == "auto"
    assert fit() == fit() == expected
    assert len(builds) == 3
    (path,) = (tmp_path / "home" / "okd_lightning" / "tokens").iterdir()
    assert path.suffix == ".tokens"
    assert deepcopy(rows) == rows
