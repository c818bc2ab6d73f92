"""The page on models.

Frozen here: every example in its table is built and loads as student and as teacher, and no row is
left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
import yaml
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from okd_lightning.training.module import DistillationModule

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "models.md"
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def examples() -> list[str]:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [cells[2].strip().strip("`") for cells in rows if "`" in cells[2]]


def save(folder: Path, seed: int = 1) -> PreTrainedModel:
    tiny.make_llama(seed).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def adapted(folder: Path) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(save(folder), config)


def in_cache(cache: Path, commit: str, revision: str) -> None:
    repository = cache / "models--org--model"
    save(repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Make what an example names, and return what is given for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def make(example: str):
        if example == "models/adapter":
            adapted(tmp_path / "base").save_pretrained(example)
        elif example == "PeftModel":
            return adapted(tmp_path / "base")
        elif example == "PreTrainedModel":
            return tiny.make_llama(1)
        elif example.startswith("{"):
            return yaml.safe_load(example)
        elif example.startswith("org/"):
            in_cache(tmp_path, "a" * 40, "main")
            in_cache(tmp_path, "b" * 40, "v2")
        else:
            save(tmp_path / example)
        return example

    return make


def test_the_table_has_all_forms():
    assert len(examples()) == 8


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("example", [e for e in examples() if not e.endswith(".gguf")])
def test_every_example_loads(example, side, build):  # GGUF: tests/models/test_sources.py
    pair = {"student": tiny.make_llama(2), "teacher": tiny.make_llama(3), side: build(example)}
    module = DistillationModule(**pair, tokenizer=tiny.make_tokenizer())
    module.configure_model()
    model = module.student if side == "student" else module.teacher
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert bool(trained) == (side == "student")
    assert all("lora" in name for name in trained) == (example == "PeftModel" or side == "teacher")
    assert torch.isfinite(model(torch.tensor([[3, 4]])).logits).all()
