"""Models as PEFT writes them, and PEFT's models in memory.

Frozen here: a PEFT folder is its base with the adapter merged, saved modules and resized embeddings
included; the base is found by an absolute path, by one relative to the working folder or to the
adapter's, or is an adapter itself; a folder as a student is trained fully; a ``PeftModel`` as a
student trains its adapter, as a teacher it is merged into a copy; broken adapters are refused in
one line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from okd_lightning.callbacks import KD, OKD
from okd_lightning.commands.export import export_student
from okd_lightning.errors import ConfigError, ModelError, ModelNotFoundError
from okd_lightning.models import load_causal_lm, load_model_config, load_tokenizer
from okd_lightning.training.module import DistillationModule

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[3, 7, 11, 5, 18]])
pytestmark = [  # what PEFT says of the models that the tests make with it
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*(lora_bias=True|have invalid shape)"),
]


def adapted(base, **settings) -> PeftModel:
    """Return a model with random adapter weights that differ by layer."""
    fields = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields))
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.data = parameter + 0.2 * torch.randn_like(parameter)
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits[..., : tiny.NUM_IDS]


def load(folder, option="--model.teacher", **settings):
    config = load_model_config(str(folder), option, 0)
    return load_causal_lm(str(folder), config, option, **settings)


@pytest.fixture
def base(tmp_path) -> Path:
    tiny.make_llama(1).save_pretrained(tmp_path / "base")
    tiny.make_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(base) -> Path:
    """An adapter of two layers' q_proj, without other files."""
    out = base.parent / "adapter"
    adapted(AutoModelForCausalLM.from_pretrained(base)).save_pretrained(out)
    return out


KINDS = {
    "lora": {},
    "a start from the base's singular vectors": {"init_lora_weights": "pissa"},
    "rank-stabilised, all layers": {"use_rslora": True, "target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "a saved embedding": {"modules_to_save": ["embed_tokens"]},
    "some tokens": {"trainable_token_indices": {"embed_tokens": [3, 7]}},
    "the head": {"target_modules": ["lm_head", "v_proj"]},
    "biases": {"bias": "lora_only"},
}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_its_base_with_the_adapter_merged(kind, is_tied, tmp_path):
    tiny.make_llama(1, tie_word_embeddings=is_tied).save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **KINDS[kind])
    model.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not isinstance(loaded, PeftModel)
    assert not any("lora" in name or "modules_to_save" in name for name in loaded.state_dict())
    loaded.save_pretrained(tmp_path / "merged")  # and as a plain folder it is the same
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(loaded))


def test_adapters_on_two_parameters_of_one_module_are_both_merged(tmp_path):
    """A mixture's experts have such adapters: PEFT wraps one layer around the other."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        experts = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=tiny.STUDENT_ROWS,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=4,
                initializer_range=0.3,
            )
        )
    experts.save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(model, target_parameters=names)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_resized_embeddings_come_with_the_adapter(tmp_path, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.STUDENT_ROWS + 5, mean_resizing=False)
    model = adapted(model)
    model.save_pretrained(tmp_path / "adapter")
    config = load_model_config(str(tmp_path / "adapter"), "--model.teacher", 0)
    assert config.vocab_size == tiny.STUDENT_ROWS + 5
    loaded = load(tmp_path / "adapter")
    assert loaded.config.vocab_size == len(loaded.lm_head.weight) == tiny.STUDENT_ROWS + 5
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def name_base(folder: Path, base) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": base}))


@pytest.mark.parametrize("start", ["working folder", "adapter's folder", "above it"])
def test_a_relative_base_is_found(start, base, folder, monkeypatch):
    expected = logits(load(folder))
    name_base(folder, "base" if start != "adapter's folder" else "inner/base")
    if start == "working folder":
        monkeypatch.chdir(base.parent)
        folder = Path(shutil.move(folder, base.parent / "a" / "b"))
        folder = folder.relative_to(base.parent)
    elif start == "adapter's folder":
        shutil.move(base, folder / "inner" / "base")
    else:
        (base.parent / "runs").mkdir()
        folder = Path(shutil.move(folder, base.parent / "runs" / "adapter"))
    torch.testing.assert_close(logits(load(folder)), expected)


def test_the_tokenizer_is_next_to_the_adapter_or_at_the_base(base, folder):
    assert load_tokenizer(str(folder), "--model.teacher").get_vocab() == (
        tiny.make_tokenizer().get_vocab()
    )
    tiny.make_tokenizer(tiny.LETTERS + "z").save_pretrained(folder)
    assert "z" in load_tokenizer(str(folder), "--model.teacher").get_vocab()


def test_an_adapter_on_an_adapter(base, folder, tmp_path):
    second = adapted(load(folder), target_modules=["v_proj"])
    second.save_pretrained(tmp_path / "second")
    name_base(tmp_path / "second", str(folder))
    torch.testing.assert_close(
        logits(load(tmp_path / "second")), logits(second), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_a_student_it_is_trained_fully(dtype, folder):
    student = load(folder, "--model.student", dtype=dtype, learns="all")
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert {str(p.dtype) for p in student.parameters()} == {f"torch.{dtype}"}


def test_a_pair_of_folders_trains(base, folder, tmp_path):
    module = DistillationModule(str(folder), str(folder), learning_rate=1e-2)
    tiny.fit(tmp_path, module, [KD()], tiny.make_rows(8))
    before, after = tiny.weights(module), dict(module.teacher.named_parameters())
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert set(moved) == before.keys() or tiny.distance(before, after) < 1e-3  # equal pair: no loss
    other = DistillationModule(str(folder), str(base), learning_rate=1e-2)
    tiny.fit(tmp_path, other, [KD()], tiny.make_rows(8))
    assert not torch.equal(
        other.student.model.layers[0].mlp.up_proj.weight,
        other.teacher.model.layers[0].mlp.up_proj.weight,
    )


def lacking(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    del weights[sorted(weights)[0]]
    save_file(weights, folder / WEIGHTS)


def with_nan(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    weights[sorted(weights)[0]][0, 0] = float("nan")
    save_file(weights, folder / WEIGHTS)


def with_a_layer_more(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    name = sorted(weights)[0]
    weights[name.replace("layers.0", "layers.9")] = weights[name].clone()
    save_file(weights, folder / WEIGHTS)


def of_another_width(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({n: torch.cat([w, w]) for n, w in weights.items()}, folder / WEIGHTS)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def with_setting(**settings: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **settings}))

    return change


def with_bias(folder: Path) -> None:
    base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted(model, lora_bias=True).save_pretrained(folder)


BROKEN = {
    "a huge rank": (with_setting(r=10**9), "an adapter of more than .* numbers.*its rank r"),
    "an enormous rank": (with_setting(r=10**30), "does not fit its base"),
    "a rank of text": (with_setting(r="x"), "does not fit its base"),
    "no base named": (lambda f: name_base(f, None), "names no base"),
    "a base that is gone": (lambda f: name_base(f, "/nowhere/base"), "no such folder.*base of the"),
    "its own base": (lambda f: name_base(f, str(f)), "own folder as its base"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"its weights \({WEIGHTS}\) are not"),
    "pickled weights": (pickled, r"pickled \(adapter_model\.bin\)"),
    "weights missing": (lacking, "lacks 1 of the adapter's 4 weights"),
    "shared layers": (with_setting(layer_replication=[[0, 2], [0, 2]]), "cannot be merged"),
    "a base changed at random": (with_setting(init_lora_weights="pissa_niter_4"), "use 'pissa'"),
    "a bias that the base has no place for": (with_bias, "cannot be merged.*lora_bias"),
    "NaN": (with_nan, "hold NaN or infinity"),
    "a layer more": (with_a_layer_more, r"no place in its base.*layers\.9"),
    "another width": (of_another_width, "does not fit its base.*size mismatch"),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes(b"0" * 50),
        "not a complete safetensors file",
    ),
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "cannot be read"),
    "an unknown kind": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "NEW", "base_model_name_or_path": "x"}'),
        "cannot be read",
    ),
    "a whole model as well": (
        lambda f: tiny.make_llama(1).save_pretrained(f),
        r"an adapter \(adapter_config\.json\) and a whole model \(model\.safetensors\)",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_broken_adapter_is_refused_in_one_line(side, damage, folder):
    BROKEN[damage][0](folder)
    option = f"--model.{side}"
    with pytest.raises(ModelError, match=rf"^{option}.*{BROKEN[damage][1]}") as caught:
        load(folder, option)
    assert "\n" not in str(caught.value)


def test_a_folder_of_adapters_names_one(base, folder, tmp_path):
    (tmp_path / "outer").mkdir()
    shutil.move(folder, tmp_path / "outer" / "first")
    with pytest.raises(ModelNotFoundError, match=r"there is one in .*first"):
        load(tmp_path / "outer")


def test_a_peft_model_as_a_student_trains_its_adapter(tmp_path, base):
    own = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    module = DistillationModule(
        own, tiny.make_llama(2), tokenizer=tiny.make_tokenizer(), learning_rate=1e-2
    )
    before = {n: p.detach().clone() for n, p in own.named_parameters()}
    tiny.fit(tmp_path, module, [KD()], tiny.make_rows(8))
    moved = {n for n, p in own.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}
    with pytest.raises(ConfigError, match="another one"):
        DistillationModule(own, tokenizer=tiny.make_tokenizer(), student_adapter=LoraConfig(r=2))


@pytest.mark.parametrize("is_merged", [True, False])
def test_such_a_student_is_saved_by_its_owner(is_merged, tmp_path, base):
    """Before ``merge_and_unload`` as a PEFT folder, and after it as a plain model."""
    own = adapted(AutoModelForCausalLM.from_pretrained(base))
    module = DistillationModule(own, tiny.make_llama(2), tokenizer=tiny.make_tokenizer())
    module.configure_model()
    expected = logits(own.eval())
    model = own.merge_and_unload() if is_merged else module.student
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / CONFIG).is_file() == (not is_merged)
    torch.testing.assert_close(logits(load(tmp_path / "saved")), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["merged", "apart"])
def test_such_a_student_is_exported(form, tmp_path, base):
    own = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"])
    )
    module = DistillationModule(
        own, tiny.make_llama(2), tokenizer=tiny.make_tokenizer(), learning_rate=1e-2
    )
    trainer = tiny.make_trainer(tmp_path, [KD()])
    limits = {"max_prompt_length": 16, "max_response_length": 8}
    data = tiny.RolloutDataModule(tiny.make_rows(8), batch_size=4, val_rollouts=0, **limits)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    expected = logits(own.eval())
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    export_student(module, checkpoint, tmp_path / "out", form)
    assert (tmp_path / "out" / CONFIG).is_file() == (form == "apart")
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_a_peft_model_as_a_teacher_is_merged_into_a_copy(tmp_path, base):
    own = adapted(AutoModelForCausalLM.from_pretrained(base), modules_to_save=["lm_head"])
    expected, state = logits(own), {n: v.clone() for n, v in own.state_dict().items()}
    module = DistillationModule(
        tiny.make_llama(2), own, tokenizer=tiny.make_tokenizer(), learning_rate=1e-2
    )
    module.configure_model()
    torch.testing.assert_close(logits(module.teacher), expected, rtol=1e-5, atol=1e-5)
    assert not any("lora" in name for name, _ in module.teacher.named_parameters())
    shared = own.get_base_model().model.layers[0].mlp.up_proj.weight
    assert module.teacher.model.layers[0].mlp.up_proj.weight.data_ptr() == shared.data_ptr()
    tiny.fit(tmp_path, module, [OKD(online_module=LoraConfig(r=2))], tiny.make_rows(8))
    for name, value in own.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_an_adapter_on_a_merged_folder_is_exported_merged(folder, tmp_path):
    """No PEFT folder can name a merged adapter as its base."""
    module = DistillationModule(
        str(folder),
        tiny.make_llama(2),
        tokenizer=tiny.make_tokenizer(),
        student_adapter=LoraConfig(r=2, target_modules=["q_proj"]),
        learning_rate=1e-2,
    )
    trainer = tiny.make_trainer(tmp_path, [KD()])
    limits = {"max_prompt_length": 16, "max_response_length": 8}
    data = tiny.RolloutDataModule(tiny.make_rows(8), batch_size=4, val_rollouts=0, **limits)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    expected = logits(module.student.eval())
    with pytest.raises(ConfigError, match="use --adapter merged"):
        export_student(module, checkpoint, tmp_path / "out", "apart")
    export_student(module, checkpoint, tmp_path / "out", "merged")
    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_peft_models_that_are_refused():
    tokenizer = tiny.make_tokenizer()
    prompt = get_peft_model(
        tiny.make_llama(1), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    for pair in ({"student": prompt}, {"student": tiny.make_llama(2), "teacher": prompt}):
        with pytest.raises(ModelError, match="prompt-learning"):
            DistillationModule(**pair, tokenizer=tokenizer)
    base = tiny.make_llama(1)
    with pytest.raises(ConfigError, match="the same object"):
        DistillationModule(
            get_peft_model(base, LoraConfig(target_modules=["q_proj"])), base, tokenizer=tokenizer
        )
