"""Frozen here: the recipes of configs/pairs are for models that exist, run, and cost what they say.

* the architectures in benchmarks/pair_models.json have the published numbers of parameters;
* each pair trains with its task, its own method and precision, on shrunken copies of its models
  with rows of its data's columns; rows of the tables that no token has stay as they were;
* a pair trains in shards on two processes, by torchrun;
* heads of configs and the table of docs/recipes.md are what the formulas give, and the formulas'
  parts are what a run of a copy holds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import real_pairs
import torch
from lightning.pytorch.callbacks import Callback
from real_pairs import RUNS, benchmark
from safetensors.torch import load_file
from tiny import make_trainer

from okd_lightning.__main__ import main
from okd_lightning.callbacks import OKD
from okd_lightning.cli_arguments import packaged_configs
from okd_lightning.data import RolloutDataModule
from okd_lightning.module import DistillationModule

MODELS = benchmark("recipe_tables").MODELS
SHORT = [
    *("--data.batch_size", "2", "--data.global_batch_size", "4", "--data.val_rollouts", "2"),
    *("--data.max_response_length", "6", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"),
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
    assert 0 < rest < 0.01 * sizes.parameters  # norms, and GPT-2's positions


def test_qwen2_5_pads_its_tables_differently():
    student, teacher = (MODELS[f"Qwen/Qwen2.5-{size}-Instruct"] for size in ("0.5B", "7B"))
    rows = [entry["config"]["vocab_size"] - entry["tokens"] for entry in (student, teacher)]
    assert rows == [271, 399]


def write_rows(task: str | None, folder: Path) -> list[str]:
    path = folder / "rows.jsonl"
    lines = [json.dumps(row) + "\n" for row in real_pairs.rows_of(task)]
    path.write_text("".join(lines))
    return ["--data.train", str(path), "--data.val", str(path)]


def command(pair: str, task: str | None, folder: Path, *more: str) -> list[str]:
    """``fit`` of a pair and a task with copies and rows in place of the real ones."""
    configs = [f"pairs/{pair}", *([f"tasks/{task}"] if task else []), *more]
    named = [word for config in configs for word in ("--config", config)]
    return ["fit", *named, *real_pairs.save_pair(pair, folder), *write_rows(task, folder), *SHORT]


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
    num_tokens = len(real_pairs.AutoTokenizer.from_pretrained(tmp_path / "student"))
    assert torch.equal(*(padding(tmp_path / f, num_tokens) for f in ("student", "out")))


def test_prompts_are_what_the_recipe_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = command("qwen3", "gsm8k", tmp_path)
    assert main(words) == 0
    rows = [json.loads(line) for line in Path("run/rollouts.jsonl").read_text().splitlines()]
    asked = rows[0]["prompt"]
    assert asked.startswith("<|im_start|>user\nWhat is ")
    assert "Reason step by step" in asked
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n<quiet>")  # enable_thinking: false


def test_a_pair_trains_in_shards_on_two_processes(tmp_path):
    """Soft caps, windows and mixed precision under FSDP2, as pairs/gemma2 advises."""
    words = command("gemma2", "gsm8k", tmp_path, "overlays/fsdp2")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, "-m", "okd_lightning", *words, "--trainer.devices", "2"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
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

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        def num_bytes(tensors):
            return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

        student = list(pl_module.student.parameters())
        online = [p for p in pl_module.teacher.parameters() if p.requires_grad]
        moments = {p: [optimizer.state[p][n] for n in ("exp_avg", "exp_avg_sq")] for p in student}
        frozen = [p for p in pl_module.teacher.parameters() if not p.requires_grad]
        own = [*online, *(p.grad for p in online)]
        self.bytes = {
            "student's weights": num_bytes(student),
            "gradients": num_bytes(p.grad for p in student),
            "AdamW": num_bytes(m for p in student for m in moments[p]),
            "teacher's weights": num_bytes(frozen),
            "online module": num_bytes(
                [*own, *(optimizer.state[p][n] for p in online for n in ("exp_avg", "exp_avg_sq"))]
            ),
        }


@pytest.mark.parametrize("pair", ["gpt2_dolly", "qwen2_5"])
def test_what_a_run_keeps_is_what_the_formula_says(pair, tmp_path):
    costs, tables = benchmark("pair_costs"), benchmark("recipe_tables")
    flags = real_pairs.save_pair(pair, tmp_path)
    module = DistillationModule(flags[1], flags[3], teacher_dtype="bfloat16")
    held = Held()
    rows = [{"prompt": "Name one", "response": "blue"}] * 2
    trainer = make_trainer(tmp_path, [OKD(), held], max_steps=2, max_epochs=9)
    trainer.fit(module, RolloutDataModule(rows, batch_size=2, max_response_length=8))
    sizes = [costs.sizes_of(real_pairs.AutoModelForCausalLM.from_pretrained(f)) for f in flags[1::2]]
    recipe = tables.Recipe(pair, None, "OKD", *sizes, 2, 2, 8, 8, 0.0)
    assert held.bytes == costs.kept(recipe, costs.HARDWARE[0])


@pytest.mark.parametrize("name", [name for name in MODELS if "-2b" not in name])
def test_a_block_at_work_holds_what_the_formula_says_within_a_factor_of_two(name):
    """Tensors that one block saves for its backward pass, in numbers a token."""
    fields = {**MODELS[name]["config"], "vocab_size": 64, "attention_dropout": 0.0}
    wide = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 768}
    if fields["model_type"] == "gpt2":
        wide = {"n_layer": 1, "n_embd": 256, "n_head": 4}
        wide |= {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    elif "head_dim" in fields:
        wide["head_dim"] = 256 // fields["num_attention_heads"]
    model = real_pairs.make({**fields, **wide, "bos_token_id": 0, "eos_token_id": 1}).train()
    sizes, saved = benchmark("pair_costs").sizes_of(model), {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens, length = 8 * 32, 32
    ids = torch.arange(tokens).remainder(64).view(8, length)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_decoder()(ids, use_cache=False)
    formula = 8 * sizes.hidden + 3 * sizes.intermediate
    if sizes.is_eager:
        formula += 3 * sizes.heads * length  # scores, capped scores, softmax
    measured = sum(saved.values()) / (4 * tokens)
    assert formula / 2 < measured < formula * 2, (measured, formula)
