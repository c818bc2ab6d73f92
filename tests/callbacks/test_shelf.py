"""Plug-ins of the shelf: public names only, and one idea per file."""

import ast
import re

import pytest
import shelf
import tiny

from okd_lightning.callbacks import GKD, DistillationCallback
from okd_lightning.training.module import DistillationModule

LONGER = {"deltaopd": 80, "distillm": 105, "distillm2": 85, "minillm": 125, "topd": 95, "tropd": 70}
"""Lines below the docstring of a file whose paper has more than one idea."""


def losses(tmp_path, method) -> list[float]:
    module = DistillationModule(
        tiny.make_llama(1), tiny.make_llama(2), tokenizer=tiny.make_tokenizer(), learning_rate=1e-2
    )
    data = tiny.RolloutDataModule(
        tiny.make_rows(16), batch_size=4, max_response_length=6, val_rollouts=0, seed=7
    )
    recorder = tiny.Recorder()
    tiny.make_trainer(tmp_path, [method, recorder]).fit(module, data)
    return [step["train/loss"] for step in recorder.losses]


@pytest.mark.parametrize("path", shelf.FILES, ids=lambda path: path.stem)
def test_only_public_names_are_imported(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = (
            [alias.name for alias in getattr(node, "names", [])] if hasattr(node, "names") else []
        )
        module = getattr(node, "module", "") or ""
        assert not any(part.startswith("_") for name in names for part in name.split("."))
        assert not any(p.startswith("_") and p != "__future__" for p in module.split("."))
    code = path.read_text().splitlines()[tree.body[0].end_lineno :]
    assert len(code) <= LONGER.get(path.stem, 60)


def test_the_table_names_every_plug_in():
    text = (shelf.FOLDER / "README.md").read_text()
    found = re.findall(r"--method callbacks\.(\w+)\.(\w+)", text)
    rows = [row for row in text.splitlines() if row.startswith("| ") and "arXiv" in row]
    assert {file for file, _ in found} == {path.stem for path in shelf.FILES}
    assert all("arXiv" in row and "--method callbacks." in row for row in rows)
    assert len(rows) == len(shelf.FILES)
    for file, kind in found:
        needed = {"teacher_base": "a folder"} if kind == "DeltaOPD" else {}
        assert isinstance(shelf.method(f"{file}.{kind}", **needed), DistillationCallback)


def test_imitkd_is_gkd_with_forward_kl(tmp_path):
    imitkd = shelf.method("imitkd.ImitKD", on_policy_fraction=0.5)
    expected = losses(tmp_path / "a", GKD(beta=0.0, on_policy_fraction=0.5))
    assert losses(tmp_path / "b", imitkd) == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) > 1
