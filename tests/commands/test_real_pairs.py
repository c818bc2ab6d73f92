"""Frozen here: recipes of configs/pairs name existing models, run, and cost what the docs say.

* the architectures in benchmarks/pair_models.json have the published numbers of parameters;
* each pair trains with its task, its own method and precision, on shrunken copies of its models
  with rows of its data's columns; rows of the tables that no token has stay as they were;
* a pair trains in shards on two processes, by torchrun;
* heads of configs and the table of docs/recipes.md are what the formulas give, and the formulas'
  parts are what a run of a copy holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import real_pairs
import torch
from forked import type_on_ranks
from lightning.pytorch.callbacks import Callback
from real_pairs import RUNS, benchmark
from safetensors.torch import load_file
from tiny import make_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from okd_lightning.__main__ import main
from okd_lightning.callbacks import KD, OKD
from okd_lightning.commands.cli_arguments import packaged_configs
from okd_lightning.data import RolloutDataModule, build_examples
from okd_lightning.training.module import DistillationModule

MODELS = benchmark("recipe_tables").MODELS
SHORT = [
    *("--data.batch_size", "2", "--data.global_batch_size", "4", "--data.val_rollouts", "2"),
    *("--data.max_response_length", "6", "--trainer.accelerator", "cpu"),
    *("--trainer.max_steps", "2", "--trainer.max_epochs", "9"),
    *("--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1"),
    *("--trainer.default_root_dir", "run", "--trainer.enable_progress_bar", "false"),
]


@pytest.mark.parametrize("name", MODELS)
def test_an_architecture_has_the_published_number_of_parameters(name):
    costs = benchmark("pair_costs")
    model = costs.build(MODELS[name]["config"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name]["parameters"]
    sizes = costs.sizes_of(model)
    tables = sizes.head * (1 if model.config.tie_word_embeddings else 2)
    rest = sizes.parameters - sizes.body - tables
    rest -= sum(p.numel() for n, p in model.named_parameters() if ".connector." in n)
    assert 0 < rest < 0.01 * sizes.parameters  # norms, and GPT-2's positions


def test_qwen2_5_pads_its_tables_differently():
    student, teacher = (MODELS[f"Qwen/Qwen2.5-{size}-Instruct"] for size in ("0.5B", "7B"))
    rows = [entry["config"]["vocab_size"] - entry["tokens"] for entry in (student, teacher)]
    assert rows == [271, 399]


def write_rows(task: str | None, folder: Path, pair: str = "") -> list[str]:
    path = folder / "rows.jsonl"
    lines = [json.dumps(row) + "\n" for row in real_pairs.rows_of(task, pair, folder)]
    path.write_text("".join(lines))
    return ["--data.train", str(path), "--data.val", str(path)]


def command(pair: str, task: str | None, folder: Path, *more: str) -> list[str]:
    """``fit`` of a pair and a task with copies and rows in place of the real ones."""
    configs = [f"pairs/{pair}", *([f"tasks/{task}"] if task else []), *more]
    named = [word for config in configs for word in ("--config", config)]
    rows = write_rows(task, folder, pair)
    return ["fit", *named, *real_pairs.save_pair(pair, folder), *rows, *SHORT]


def padding(folder: Path, num_tokens: int) -> torch.Tensor:
    weights = load_file(folder / "model.safetensors")
    (name,) = (n for n in weights if n.endswith(("embed_tokens.weight", "wte.weight")))
    return weights[name][num_tokens:]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
@pytest.mark.parametrize(("pair", "task"), RUNS)
def test_a_pair_trains_on_its_task(pair, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = main(command(pair, task, tmp_path))
    assert status == 0, capsys.readouterr().err
    columns = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {RUNS[pair, task], "val/forward_kl"} <= set(columns)
    checkpoint = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert main(["export", "--ckpt_path", checkpoint, "--out", "out"]) == 0
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("student", "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    num_tokens = len(AutoTokenizer.from_pretrained(tmp_path / "student"))  # Qwen2's adds one
    assert torch.equal(*(padding(tmp_path / f, num_tokens) for f in ("student", "out")))


def test_toolalpacas_training_data_makes_rows_of_calls():
    rows = real_pairs.rows_of("toolalpaca")
    call = '<tool_call>\n{"name": "list", "arguments": {"n": 3}}\n</tool_call>'
    assert len(rows) == 8
    assert rows[3]["messages"] == [{"role": "user", "content": "Name 3 colours"}]
    assert (rows[3]["response"], rows[3]["tools"][0]["function"]["name"]) == (call, "list")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries', not ours
def test_the_teacher_of_gpt2_is_made_as_its_config_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = command("gpt2_dolly", None, tmp_path)
    asked = [*("--method", "SFT", "--model.teacher", "null"), *words[words.index("--data.train") :]]
    student = ["--model.student", str(tmp_path / "teacher"), "--model.learning_rate", "5e-5"]
    assert main(["fit", "--config", "pairs/gpt2_dolly", *student, *asked]) == 0
    exported = ["--ckpt_path", "run/checkpoints/last.ckpt", "--out", "gpt2_xl_dolly"]
    assert main(["export", *exported]) == 0
    student = ["--model.student", str(tmp_path / "student")]  # the teacher is the config's own
    data = words[words.index("--data.train") :]
    assert main(["fit", "--config", "pairs/gpt2_dolly", *student, *data]) == 0


def test_prompts_are_what_the_recipe_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = command("qwen3", "gsm8k", tmp_path)
    assert main(words) == 0
    rows = [json.loads(line) for line in Path("run/rollouts.jsonl").read_text().splitlines()]
    asked = rows[0]["prompt"]
    assert asked.startswith("user\nWhat is ")
    assert "Reason step by step" in asked
    assert asked.endswith("assistant\n<quiet>")  # enable_thinking: false


def test_a_pair_trains_in_shards_on_two_processes(tmp_path):
    """Soft caps, windows and mixed precision under FSDP2, as pairs/gemma2 advises."""
    words = command("gemma2", "gsm8k", tmp_path, "overlays/fsdp2")
    words += ["--trainer.devices", "2", "--trainer.max_steps", "1", "--data.val_rollouts", "0"]
    type_on_ranks(words, tmp_path)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert sorted(path.name for path in last.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]


def test_costs_in_configs_and_docs_are_the_formulas():
    tables = benchmark("recipe_tables")
    recipes = [tables.read_recipe(*names) for names in tables.RECIPES]
    assert set(tables.RECIPES) == set(RUNS)
    documents = tables.documents(recipes)
    pairs = {path for name, path in packaged_configs().items() if name.startswith("pairs/")}
    assert pairs < documents.keys()
    for path, (_, wanted) in documents.items():
        assert wanted in path.read_text(encoding="utf-8"), f"{path}: recipe_tables.py --write"


class Held(Callback):
    """Bytes that a run holds between its backward pass and its optimizer step's end."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not optimizer.state:  # before the first step
            return

        def num_bytes(tensors):
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        def moments(parameters):
            return [optimizer.state[p][n] for p in parameters for n in ("exp_avg", "exp_avg_sq")]

        student = list(pl_module.student.parameters())
        online = [p for p in pl_module.teacher.parameters() if p.requires_grad]
        frozen = [p for p in pl_module.teacher.parameters() if not p.requires_grad]
        self.bytes = {
            "student's weights": num_bytes(student),
            "gradients": num_bytes(p.grad for p in student),
            "AdamW": num_bytes(moments(student)),
            "teacher's weights": num_bytes(frozen),
            "online module": num_bytes([*online, *(p.grad for p in online), *moments(online)]),
        }


class HeldWithImages(Callback):
    """``Held`` for a student with a frozen vision tower."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        def num_bytes(tensors):
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        trained = [p for p in pl_module.student.parameters() if p.requires_grad]
        frozen = [p for p in pl_module.student.parameters() if not p.requires_grad]
        teacher = pl_module.teacher
        towers = [*frozen, *teacher.model.vision_model.parameters()]
        self.bytes = {
            "student's weights": num_bytes(trained),
            "gradients": num_bytes(p.grad for p in trained),
            "AdamW": 2 * num_bytes(trained),
            "teacher's weights": num_bytes(teacher.parameters()) - num_bytes(towers[len(frozen) :]),
            "vision towers": num_bytes(towers),
        }


def test_what_a_run_with_images_keeps_is_what_the_formula_says(tmp_path):
    costs, tables = benchmark("pair_costs"), benchmark("recipe_tables")
    flags = real_pairs.save_pair("smolvlm", tmp_path)
    write_rows(None, tmp_path, "smolvlm")
    module = DistillationModule(flags[1], flags[3], teacher_dtype="bfloat16")
    held = HeldWithImages()
    trainer = make_trainer(tmp_path, [KD(), held], max_steps=1)
    limits = {"max_prompt_length": 999, "max_response_length": 8}
    trainer.fit(module, RolloutDataModule(str(tmp_path / "rows.jsonl"), batch_size=2, **limits))
    kinds = real_pairs.vision.AutoModelForImageTextToText
    sizes = [costs.sizes_of(kinds.from_pretrained(folder)) for folder in flags[1::2]]
    recipe = tables.Recipe("smolvlm", None, "KD", *sizes, 2, 2, 8, 8, 0.0)
    assert held.bytes == costs.kept(recipe, costs.HARDWARE[0])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT, on GPT-2
@pytest.mark.parametrize("pair", ["gpt2_dolly", "qwen2_5"])
def test_what_a_run_keeps_is_what_the_formula_says(pair, tmp_path):
    costs, tables = benchmark("pair_costs"), benchmark("recipe_tables")
    flags = real_pairs.save_pair(pair, tmp_path)
    module = DistillationModule(flags[1], flags[3], teacher_dtype="bfloat16")
    held = Held()
    rows = [{"prompt": "Name one", "response": "blue"}] * 2
    trainer = make_trainer(tmp_path, [OKD(), held], max_steps=2, max_epochs=9)
    trainer.fit(module, RolloutDataModule(rows, batch_size=2, max_response_length=8))
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in flags[1::2]]
    sizes = [costs.sizes_of(model) for model in models]
    recipe = tables.Recipe(pair, None, "OKD", *sizes, 2, 2, 8, 8, 0.0)
    assert held.bytes == costs.kept(recipe, costs.HARDWARE[0])


def proportional(fields: dict) -> dict:
    """Return the architecture with a part of its width, and a tiny vocabulary."""
    small = {**fields, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    if fields["model_type"] == "gpt2":
        part = 4 if fields["n_head"] % 4 == 0 else 5
        return small | {name: fields[name] // part for name in ("n_head", "n_embd")}
    part = fields["num_key_value_heads"]
    widths = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return small | {name: fields[name] // part for name in widths}


@pytest.mark.parametrize("name", [name for name in MODELS if "SmolVLM" not in name])
def test_a_block_at_work_saves_what_the_formula_says(name):
    """Within 1.3, under autocast as the recipes train: two layers' saved bytes less one layer's."""
    costs, fields = benchmark("pair_costs"), proportional(MODELS[name]["config"])
    layers = "n_layer" if fields["model_type"] == "gpt2" else "num_hidden_layers"
    rows, length = 4, 61
    saved = []
    for num in (1, 2):
        model = real_pairs.make({**fields, layers: num}).train()
        found = {}

        def pack(tensor, found=found):
            storage = tensor.untyped_storage()
            if storage.nbytes() % length == 0:  # not of the weights, nor their bfloat16 copies
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.arange(rows * length).remainder(64).view(rows, length)
        kept = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with kept, torch.autocast("cpu", torch.bfloat16):
            model.get_decoder()(ids, use_cache=False)
        saved.append(sum(found.values()) / (rows * length))
    sizes = costs.sizes_of(model)
    expected = benchmark("shard_memory").block_at_work(sizes, learns=True)
    if sizes.is_eager:
        expected += 10 * sizes.heads * length  # scores, capped scores, softmax in both formats
    assert expected / 1.3 < saved[1] - saved[0] < expected * 1.3, (saved[1] - saved[0], expected)


@pytest.mark.parametrize("task", ["gsm8k", "toolalpaca"])
def test_real_rows_fit_a_tasks_limits(task, shared_data):
    """The rows fit, with Qwen2.5's tokenizer and template; longer rows would be skipped."""
    datasets = shared_data / "datasets"
    if task == "gsm8k":
        lines = (datasets / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:300]]
    else:
        text = (datasets / "toolalpaca" / "eval_simulated.json").read_text(encoding="utf-8")
        rows = benchmark("toolalpaca").rows_of(json.loads(text))
    settings = benchmark("recipe_tables").load_config(f"tasks/{task}")["data"]
    data = RolloutDataModule(**{**settings, "train": rows, "val": None})
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5")
    found = build_examples(
        rows,
        tokenizer,
        eos_id=tokenizer.eos_token_id,
        columns=data.columns,
        max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length,
        on_overlong="error",
        needs_response=True,
        where=task,
    )
    assert (len(found), found.num_cut) == (len(rows), 0)
    assert all(e.prompt.endswith("<|im_start|>assistant\n") for e in found.examples)
