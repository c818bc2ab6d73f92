"""Merging a student's adapter at export.

Frozen here: the exported folder, loaded with transformers alone, gives the logits of the trained
student, for adapters of every kind, on bases from folders and from random weights, and where
embedding and head share weights of which one or both are adapted.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from peft import IA3Config, LoHaConfig, LoraConfig
from transformers import AutoModelForCausalLM

from okd_lightning.callbacks import KD, LastCheckpoint
from okd_lightning.commands.export import export_student
from okd_lightning.training.module import DistillationModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"
)
HEAD, EMBEDDING, INNER, MLP = "lm_head", "embed_tokens", "q_proj", "down_proj"
TAKES_APART = {
    "lora on the head",
    "lora on the embedding",
    "lora on both",
    "a saved head",
    "tokens",
}
ADAPTERS = {
    "lora": lambda: LoraConfig(r=2, target_modules=[INNER]),
    "lora on the head": lambda: LoraConfig(r=2, target_modules=[INNER, HEAD]),
    "lora on the embedding": lambda: LoraConfig(r=2, target_modules=[INNER, EMBEDDING]),
    "lora on both": lambda: LoraConfig(r=2, target_modules=[HEAD, EMBEDDING]),
    "dora": lambda: LoraConfig(r=2, target_modules=[INNER], use_dora=True),
    "ia3": lambda: IA3Config(target_modules=[INNER, MLP], feedforward_modules=[MLP]),
    "loha": lambda: LoHaConfig(r=2, alpha=2, target_modules=[INNER]),
    "a saved head": lambda: LoraConfig(r=2, target_modules=[INNER], modules_to_save=[HEAD]),
    "saved norms": lambda: LoraConfig(r=2, target_modules=[INNER], modules_to_save=["norm"]),
    "biases": lambda: LoraConfig(r=2, target_modules=[INNER], bias="lora_only"),
    "tokens": lambda: LoraConfig(r=2, target_modules=[INNER], trainable_token_indices=[3, 4]),
}
IDS = torch.tensor([[3, 4, 5, 6, 7, 8]])


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request) -> bool:
    return request.param


@pytest.fixture(params=["folder", "random"])
def student(request, tied, tmp_path):
    if request.param == "folder":
        tiny.make_llama(1, tie_word_embeddings=tied).save_pretrained(tmp_path / "student")
        tiny.make_tokenizer().save_pretrained(tmp_path / "student")
        return str(tmp_path / "student")
    return {
        **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 22},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3},
        **{"tie_word_embeddings": tied, "eos_token_id": tiny.EOS},
    }


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_merged_student_is_the_trained_one(kind, student, tied, teacher_folder, tmp_path):
    def make():
        return DistillationModule(
            dict(student) if isinstance(student, dict) else student,
            str(teacher_folder),
            student_adapter=ADAPTERS[kind](),
            learning_rate=0.1,
        )

    module = make()
    tiny.fit(tmp_path, module, [KD()], tiny.make_rows(12), callbacks=[LastCheckpoint()])
    with torch.no_grad():
        trained = module.student.eval()(input_ids=IDS).logits
    path = tmp_path / "checkpoints" / "last.ckpt"
    torch.manual_seed(99)  # a random base comes from the checkpoint
    export_student(make(), torch.load(path, weights_only=True), tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        found = exported(input_ids=IDS).logits
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in exported.state_dict())
    assert exported.config.tie_word_embeddings == (tied and kind not in TAKES_APART)
