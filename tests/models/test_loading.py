"""Loading of models, and settings that a run reads from them.

Frozen here: every mistake is one readable error that names the option; safetensors only; a mapping
is random weights of the tokenizer's size; number formats of student and teacher are their own; a
response may be ended by several ids, of which training data get the first; the teacher is frozen.
"""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from peft import LoraConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from okd_lightning.callbacks import KD, OKD
from okd_lightning.errors import (
    ConfigError,
    ModelError,
    ModelNotFoundError,
)
from okd_lightning.models import (
    add_adapter,
    eos_token_ids,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
)
from okd_lightning.training.module import DistillationModule

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def load(folder, **settings):
    config = load_model_config(str(folder), "--model.student", 0)
    return load_causal_lm(str(folder), config, "--model.student", **settings)


def test_a_folder_that_is_not_there_and_what_was_meant(student_folder):
    wrong = str(student_folder)[:-1] + "O"
    with pytest.raises(ModelNotFoundError, match=f"--model.teacher.*did you mean {student_folder}"):
        load_model_config(wrong, "--model.teacher", 0)
    with pytest.raises(FileNotFoundError):
        load_tokenizer(wrong, "--model.tokenizer")


NO_MODELS = {
    "a compiled model": (
        lambda: torch.compile(tiny.make_llama(1), backend="eager"),
        "is a OptimizedModule; expected .*give the model as it was, and compile_blocks=True",
    ),
    "a config": (lambda: tiny.make_llama(1).config, "is a LlamaConfig; .*give its to_dict"),
    "a bare module": (lambda: torch.nn.Linear(2, 2), "is a Linear; expected .*a PreTrainedModel"),
    "a class": (lambda: AutoModelForCausalLM, "expected a folder or hub id"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # torch's own, at its import
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", NO_MODELS)
def test_what_is_no_model_is_refused_where_it_is_given(name, side, make_module):
    make, words = NO_MODELS[name]
    with pytest.raises(ConfigError, match=f"model.{side} {words}" if "is a" in words else words):
        make_module(**{side: make()}, tokenizer=tiny.make_tokenizer())
    with pytest.raises(ConfigError, match=r"model\.student is a NoneType"):
        make_module(student=None)


def test_a_config_as_a_mapping_is_a_student(tmp_path, make_module):
    module = make_module(student=tiny.make_llama(1).config.to_dict())
    recorder = tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4))
    assert recorder.losses


def test_paths_are_taken_for_models_and_tokenizers(tmp_path, student_folder, teacher_folder):
    other = tiny.make_tokenizer()
    other.chat_template = "{{ messages }}"
    other.save_pretrained(tmp_path / "tokenizer")
    module = DistillationModule(
        student_folder, teacher_folder, tokenizer=tmp_path / "tokenizer", learning_rate=1e-2
    )
    assert module.tokenizer.chat_template == other.chat_template
    trainer = tiny.make_trainer(tmp_path, [KD()], max_steps=1)
    trainer.fit(module, tiny.RolloutDataModule(tiny.make_rows(4), max_response_length=8))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    found = DistillationModule.load_from_checkpoint(tmp_path / "some.ckpt")
    assert found.tokenizer.chat_template == other.chat_template
    assert tiny.distance(tiny.weights(found), tiny.weights(module)) == 0
    with pytest.raises(ConfigError, match=r"tokenizer is a Tokenizer; .*PreTrainedTokenizerFast"):
        DistillationModule(student_folder, tokenizer=other.backend_tokenizer)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"--model.student.*holds no model"):
        load_model_config(str(tmp_path), "--model.student", 0)
    with pytest.raises(ModelNotFoundError, match=r"--model.student.*holds no tokenizer"):
        load_tokenizer(str(tmp_path), "--model.student")


def test_a_broken_config(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="holds no model"):
        load_model_config(str(tmp_path), "--model.student", 0)


def test_weights_that_are_not_safetensors_are_refused(tmp_path, tiny_tokenizer):
    model = tiny.make_llama(1)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"--model.student.*safetensors"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_base_of_a_peft_folder_is_loaded_as_any_model(kernel, tmp_path, student_folder):
    """The base has the requested attention, and is read from safetensors only."""
    base = AutoModelForCausalLM.from_pretrained(student_folder)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapted")
    base.config.save_pretrained(tmp_path / "adapted")
    loaded = load(tmp_path / "adapted", attn_implementation=kernel, dtype="bfloat16")
    assert loaded.config._attn_implementation == kernel
    assert loaded.dtype == torch.bfloat16
    (tmp_path / "base" / "model.safetensors").unlink()
    weights = AutoModelForCausalLM.from_pretrained(student_folder).state_dict()
    torch.save(weights, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"--model.student.*safetensors"):
        load(tmp_path / "adapted")


def test_a_model_in_memory_keeps_its_number_format(student_folder):
    student, teacher = (tiny.make_llama(i).to(torch.bfloat16) for i in (1, 2))
    tokenizer = tiny.make_tokenizer()
    module = DistillationModule(student, teacher, tokenizer=tokenizer)
    assert (module.pair.dtype, module.pair.teacher.run.dtype) == ("bfloat16", "bfloat16")
    module = DistillationModule(student, str(student_folder), tokenizer=tokenizer)
    assert (module.pair.dtype, module.pair.teacher.run.dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize("damage", ["cut", "empty", "other shapes"])
def test_weights_that_do_not_fit(damage, tmp_path):
    tiny.make_llama(1).save_pretrained(tmp_path)
    if damage == "other shapes":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    else:
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: 1000 if damage == "cut" else 0])
    with pytest.raises(ModelError, match=r"--model.student"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_number_formats(dtype, student_folder):
    model = load(student_folder, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_each_side_has_its_own_number_format(make_module):
    module = make_module(teacher_dtype="bfloat16")
    module.configure_model()
    assert module.student.dtype == torch.float32
    assert module.teacher.dtype == torch.bfloat16
    both = make_module(dtype="bfloat16")
    both.configure_model()
    assert both.student.dtype == both.teacher.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    "config", [LoraConfig(r=2), PromptEncoderConfig(num_virtual_tokens=3)], ids=["lora", "prompts"]
)
def test_trained_weights_are_float32_or_as_wide_as_their_base(config, dtype, make_module):
    module = make_module(dtype=dtype, student_adapter=LoraConfig(r=2))
    module.add_online_module(OKD(online_module=config).settings)
    module.configure_model()
    trained = {p.dtype for p in module.parameters() if p.requires_grad}
    frozen = {p.dtype for p in module.parameters() if not p.requires_grad}
    assert trained == {torch.float64 if dtype == "float64" else torch.float32}
    assert frozen == {getattr(torch, dtype)}


def test_loading_keeps_the_weights_and_freezes_the_teacher(make_module):
    module = make_module()
    module.configure_model()
    pairs = ((module.student, tiny.make_llama(1)), (module.teacher, tiny.make_llama(2, 27)))
    for loaded, saved in pairs:
        for (name, found), (_, expected) in zip(
            loaded.named_parameters(), saved.named_parameters(), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, msg=name)
    assert all(p.requires_grad for p in module.student.parameters())
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert module.student.training
    assert not any(m.training for m in module.teacher.modules())


def test_configure_model_again_keeps_the_models(make_module):
    module = make_module()
    module.configure_model()
    student, teacher = module.student, module.teacher
    module.configure_model()
    assert module.student is student
    assert module.teacher is teacher


def test_a_mapping_is_random_weights_of_the_tokenizers_size(teacher_folder):
    module = DistillationModule(dict(LLAMA), str(teacher_folder))
    module.configure_model()
    assert module.student.config.model_type == "llama"
    assert module.student.get_output_embeddings().weight.shape == (tiny.NUM_IDS, 16)
    wider = load_model_config({**LLAMA, "vocab_size": 40}, "--model.student", tiny.NUM_IDS)
    assert wider.vocab_size == 40


def test_a_mapping_is_not_changed_by_being_read():
    fields = dict(LLAMA)
    load_model_config(fields, "--model.student", 19)
    assert fields == LLAMA


@pytest.mark.parametrize(
    "fields", [{"hidden_size": 16}, {"model_type": "lama"}, {**LLAMA, "hidden_size": "wide"}]
)
def test_mappings_that_are_no_model(fields):
    with pytest.raises(ModelError, match=r"--model.student"):
        load_model_config(fields, "--model.student", 19)


def test_eos_ids(tmp_path, tiny_tokenizer, student_folder):
    assert eos_token_ids(str(student_folder), tiny_tokenizer) == (tiny.EOS,)
    assert eos_token_ids(dict(LLAMA), tiny_tokenizer) == (tiny.EOS,)
    assert eos_token_ids({**LLAMA, "eos_token_id": [5, 6]}, tiny_tokenizer) == (5, 6)
    model = tiny.make_llama(1)
    model.generation_config.eos_token_id = [9, 1]
    assert eos_token_ids(model, tiny_tokenizer) == (9, 1)
    model.save_pretrained(tmp_path)
    assert eos_token_ids(str(tmp_path), tiny_tokenizer) == (9, 1)
    (tmp_path / "generation_config.json").unlink()
    assert eos_token_ids(str(tmp_path), tiny_tokenizer) == (tiny.EOS,)


def test_no_eos_anywhere_is_an_error():
    tokenizer = tiny.make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="end-of-sequence"):
        eos_token_ids(dict(LLAMA), tokenizer)


def test_a_tokenizer_is_found_or_asked_for(tiny_pair, tiny_tokenizer, student_folder):
    with pytest.raises(ConfigError, match=r"--model.tokenizer"):
        DistillationModule(*tiny_pair)
    module = DistillationModule(*tiny_pair, tokenizer=str(student_folder))
    assert module.tokenizer.get_vocab() == tiny_tokenizer.get_vocab()
    module = DistillationModule(dict(LLAMA), tiny_pair[1], tokenizer=tiny_tokenizer)
    assert module.tokenizer is tiny_tokenizer


def test_a_folder_without_a_tokenizer_takes_the_named_one(tmp_path, tiny_tokenizer, teacher_folder):
    tiny.make_llama(1).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"--model.student.*is not compared with it"):
        module = DistillationModule(str(tmp_path), str(teacher_folder), tokenizer=tiny_tokenizer)
    module.configure_model()
    assert module.student.num_parameters() == tiny.make_llama(1).num_parameters()


def test_adapters_train_alone():
    model = tiny.make_llama(1)
    add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]), "--model.student_adapter")
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in n for n in trained)
    with pytest.raises(ConfigError, match=r"--model.student_adapter.*q_proj"):
        add_adapter(
            tiny.make_llama(1), LoraConfig(target_modules=["nope"]), "--model.student_adapter"
        )
    prompt = PromptTuningConfig(num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="prompt-learning"):
        add_adapter(tiny.make_llama(1), prompt, "--model.student_adapter")


def test_sequences_longer_than_a_model_was_made_for_are_refused(tmp_path, make_module):
    from okd_lightning.callbacks import KD

    settings = {"data": {"max_response_length": 64, "max_prompt_length": 64}}
    with pytest.raises(ConfigError, match="context of the student is 64"):
        tiny.fit(tmp_path, make_module(), [KD()], tiny.make_rows(4), **settings)
