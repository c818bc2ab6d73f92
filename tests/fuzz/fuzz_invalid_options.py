"""Commands with one mistake: each must be one clean line, and none may train."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
from fuzz_program import Bench, Case
from typed_commands import Words, check_command, make_assets

_NUM_DRAWN = 160

_WHOLE_NUMBERS = (
    *("data.batch_size", "data.global_batch_size", "data.max_prompt_length"),
    *("data.max_response_length", "data.prompts_per_epoch", "data.prompts_per_rollout"),
    *("data.samples_per_prompt", "data.val_rollouts", "data.seed", "model.warmup_steps"),
    *("model.tile_positions", "trainer.max_steps", "trainer.max_epochs", "trainer.min_epochs"),
    *("trainer.accumulate_grad_batches", "trainer.log_every_n_steps"),
    *("trainer.check_val_every_n_epoch", "trainer.num_sanity_val_steps", "data.sampling.top_k"),
    *("model.teacher.k", "model.student_adapter.r", "trainer.callbacks.every_n_steps"),
)
_NO_WHOLE_NUMBERS = ("many", "1.5", "[2]", "{a: 1}", "", "1e400", "-7", "9" * 400, "0x1g")
_NUMBERS = (
    *("model.learning_rate", "model.weight_decay", "model.ema_decay", "method.temperature"),
    *("method.weight", "method.cross_entropy_weight", "trainer.gradient_clip_val"),
    *("data.sampling.temperature", "data.sampling.top_p", "model.student_adapter.lora_dropout"),
)
_NO_NUMBERS = ("fast", "[1]", "{a: 1}", "nan", "inf", "-3", "1e400", "", "1,5")
_SWITCHES = (
    *("model.gradient_checkpointing", "model.packing", "model.compile_blocks", "data.as_chat"),
    *("method.seq_kd", "trainer.enable_checkpointing", "trainer.enable_progress_bar"),
    "trainer.detect_anomaly",
)
_NO_SWITCHES = ("maybe", "2", "[true]", "{a: true}", "")
_CHOICES = (
    *("model.schedule", "model.dtype", "model.teacher_dtype"),
    *("data.on_overlong", "trainer.precision", "model.normalization", "trainer.accelerator"),
    *("trainer.strategy", "model.attn_implementation", "trainer.gradient_clip_algorithm"),
    "trainer.profiler",
)
_NO_CHOICES = ("cosin", "7e", "[linear]", "{a: b}", "")
_CLASSES = {
    "method": ("KD", "GKD", "OKD", "OPD", "OPDPlus", "SFT", "Stage", "Reward"),
    "method.divergence": ("ForwardKL", "ReverseKL", "JensenShannon", "TopK", "Tempered"),
    "model.optimizer": ("SGD", "AdamW", "Adafactor", "RMSprop"),
    "model.lr_scheduler": ("StepLR", "CosineAnnealingLR", "OneCycleLR"),
    "model.student_adapter": ("LoraConfig", "IA3Config", "LoHaConfig"),
    "model.engine": ("VLLMServer", "VLLMEngine"),
    "trainer.callbacks+": ("RolloutLog", "SampleTable", "ExactMatch", "AvgAtK", "TaskScore"),
    "trainer.logger": ("CSVLogger", "TensorBoardLogger"),
}
_NEEDED: dict[str, Words] = {
    "model.student_adapter.": ["--model.student_adapter", "LoraConfig"],
    "model.teacher.": [
        *("--model.teacher", "CachedTeacher", "--model.teacher.model", "teacher"),
        *("--model.teacher.folder", "cache"),
    ],
    "trainer.callbacks.": ["--trainer.callbacks+", "RolloutLog"],
}
_FREE = {
    # values that are no mistake there
    *(("data.seed", value) for value in ("-7", "9" * 400)),
    *(("trainer.gradient_clip_val", value) for value in ("", "inf", "1e400")),
    *(("trainer.num_sanity_val_steps", value) for value in ()),
}


def _typed(option: str, value: str) -> Words:
    needed = next((words for start, words in _NEEDED.items() if option.startswith(start)), [])
    return [*needed, f"--{option}={value}"]


def _wrong_value(draw: random.Random) -> Words:
    kinds = (
        (_WHOLE_NUMBERS, _NO_WHOLE_NUMBERS),
        (_WHOLE_NUMBERS, _NO_WHOLE_NUMBERS),
        (_NUMBERS, _NO_NUMBERS),
        (_SWITCHES, _NO_SWITCHES),
        (_CHOICES, _NO_CHOICES),
    )
    while True:
        options, values = draw.choice(kinds)
        found = draw.choice(options), draw.choice(values)
        if found not in _FREE:
            return _typed(*found)


def _misspelt(word: str, draw: random.Random) -> str:
    place = draw.randrange(max(1, len(word) - 1))
    change = draw.choice(("drop", "double", "swap", "add"))
    a, b = word[place], word[place + 1 : place + 2]
    if change == "drop":
        return word[:place] + word[place + 1 :]
    if change == "double":
        return word[:place] + a + word[place:]
    if change == "swap" and a != b:
        return word[:place] + b + a + word[place + 2 :]
    return word[:place] + "q" + word[place:]


def _misspelt_option(draw: random.Random) -> Words:
    option = draw.choice((*_WHOLE_NUMBERS, *_NUMBERS, *_SWITCHES, *_CHOICES))
    section, _, name = option.rpartition(".")
    return _typed(f"{section}.{_misspelt(name, draw)}", "1")


def _misspelt_class(draw: random.Random) -> Words:
    option = draw.choice(list(_CLASSES))
    return [f"--{option}", _misspelt(draw.choice(_CLASSES[option]), draw)]


def _unknown_setting(draw: random.Random) -> Words:
    option = draw.choice(list(_CLASSES))
    name = draw.choice(("lambda_", "alpha_", "num_beams", "class_path_", "__class__", "x.y"))
    return [f"--{option}", draw.choice(_CLASSES[option]), f"--{option.rstrip('+')}.{name}", "1"]


_DRAWN: tuple[Callable[[random.Random], Words], ...] = (
    *(_wrong_value, _wrong_value, _wrong_value, _misspelt_option, _misspelt_class),
    _unknown_setting,
)

_FOREIGN = (
    *("--learning_rate", "--lr", "--num_train_epochs", "--per_device_train_batch_size"),
    *("--gradient_accumulation_steps", "--max_steps", "--warmup_ratio", "--output_dir", "--bf16"),
    *("--fp16", "--deepspeed", "--fsdp", "--report_to", "--logging_steps", "--save_steps"),
    *("--eval_steps", "--lmbda", "--beta", "--seq_kd", "--teacher_model_name_or_path"),
    *("--model_name_or_path", "--dataset_name", "--max_length", "--max_new_tokens"),
    *("--temperature", "--use_vllm", "--vllm_mode", "--lora_r", "--lora_alpha", "--use_peft"),
    *("--load_in_4bit", "--gradient_checkpointing", "--trust_remote_code", "--seed"),
    *("--algorithm.kl_ctrl.kl_coef", "--actor_rollout_ref.rollout.n", "--data.train_files"),
    *("--trainer.total_epochs", "--trainer.n_gpus_per_node", "--model.path", "--rollout.n"),
    *("--micro_batch_size", "--global-batch-size", "--tensor-model-parallel-size"),
    *("--trainer.gpus", "--trainer.resume_from_checkpoint", "--optimizer.name", "--model.lora"),
)

_COMBINATIONS: dict[str, str] = {
    "beta and divergence": "--method GKD --method.beta 0.1 --method.divergence ForwardKL",
    "ema_decay alone": "--model.ema_decay 0.9",
    "a teacher of an earlier version": "--model.self_teacher ema",
    "cache on-policy": "--method GKD --model.teacher CachedTeacher --model.teacher.folder cache "
    "--model.teacher.model teacher",
    "cache and temperature": "--method.temperature 2 --model.teacher CachedTeacher "
    "--model.teacher.folder cache --model.teacher.model teacher",
    "cache and server": "--model.teacher_cache cache --model.teacher_server http://127.0.0.1:9",
    "settings of a path": "--model.teacher.url http://127.0.0.1:9",
    "no teacher": "--model.teacher null",
    "samples alone": "--data.samples_per_prompt 3",
    "seq_kd of on-policy": "--method GKD --method.on_policy_fraction 1 --method.seq_kd true",
    "two of one method": "--trainer.callbacks+=KD",
    "global batch": "--data.global_batch_size 3",
    "accumulation twice": "--data.global_batch_size 4 --trainer.accumulate_grad_batches 3",
    "schedule and scheduler": "--model.schedule cosine --model.lr_scheduler StepLR "
    "--model.lr_scheduler.step_size 2",
    "warmup and scheduler": "--model.warmup_steps 2 --model.lr_scheduler ConstantLR",
    "two rates": "--model.learning_rate 2 --model.optimizer SGD --model.optimizer.lr 1",
    "momentum without optimizer": "--model.optimizer.momentum 0.9",
    "optimizer of a sparse kind": "--model.optimizer SparseAdam",
    "second-order optimizer": "--model.optimizer LBFGS",
    "chat without template": "--data.as_chat true",
    "kwargs without chats": "--data.chat_template_kwargs {enable_thinking: false}",
    "turns without tools": "--data.max_turns 3",
    "tools without chats": "--data.tools+=Calculator",
    "template's column": "--data.prompt_template {nothing}",
    "template's brace": "--data.prompt_template {prompt",
    "teacher's template": "--data.teacher_prompt_template {x}",
    "teacher's column": "--data.teacher_prompt_column nothing",
    "prompt column": "--data.prompt_column nothing",
    "response column": "--data.response_column nothing",
    "messages column alone": "--data.prompt_column null --data.response_column nothing",
    "PPO clip of a greedy": "--method OPDPlus --method.clip -1",
    "reward without baseline's group": "--method Reward --method.function RougeL "
    "--method.baseline leave_one_out",
    "reward of no class": "--method Reward --method.function os.system",
    "advantage of a divergence": "--method AdvantageCallback --method.advantage ForwardKL",
    "divergence of an advantage": "--method DivergenceCallback --method.divergence RougeL",
    "top k of zero": "--method.divergence TopK --method.divergence.k 0 "
    "--method.divergence.divergence ForwardKL",
    "top k without k": "--method.divergence TopK",
    "tempered twice": "--method.temperature 2 --method.divergence Tempered "
    "--method.divergence.temperature 2 --method.divergence.divergence ForwardKL",
    "stage of nothing": "--method Stage",
    "stage backwards": "--method Stage --method.method KD --method.start 5 --method.end 2",
    "online module of nothing": "--method OKD --method.online_module LoraConfig "
    "--method.online_module.target_modules [nothing]",
    "online module of no rank": "--method OKD --method.online_module LoraConfig "
    "--method.online_module.r 0",
    "huge online module": "--method OKD --method.online_module LoraConfig "
    "--method.online_module.r 1000000000",
    "huge prefix": "--method OKD --method.online_module PrefixTuningConfig "
    "--method.online_module.num_virtual_tokens 1000000000",
    "huge adapter": "--model.student_adapter LoraConfig --model.student_adapter.r 1000000000",
    "huge adapter of a pattern": "--model.student_adapter LoraConfig "
    "--model.student_adapter.rank_pattern {q_proj: 1000000000}",
    "enormous adapter": "--model.student_adapter LoHaConfig --model.student_adapter.r " + "9" * 30,
    "prompt learning student": "--model.student_adapter PrefixTuningConfig",
    "adapter of no layers": "--model.student_adapter LoraConfig "
    "--model.student_adapter.target_modules [nothing]",
    "alpha of OKD": "--method OKD --method.alpha 2",
    "OKD without references": "--method OKD --method.on_policy_fraction 1",
    "long responses": "--data.max_response_length 1000",
    "engine without url": "--model.engine VLLMServer",
    "engine nobody answers": "--method GKD --model.engine VLLMServer --model.engine.url "
    "http://127.0.0.1:9 --model.engine.sync_folder w --model.engine.num_retries 0",
    "engine of no address": "--method GKD --model.engine VLLMServer --model.engine.url x "
    "--model.engine.sync_folder w",
    "engine without sampling": "--model.engine VLLMServer --model.engine.url http://127.0.0.1:9 "
    "--model.engine.sync_folder w",
    "server nobody answers": "--model.teacher ServedTeacher --model.teacher.url "
    "http://127.0.0.1:9 --model.teacher.num_retries 0",
    "password in an address": "--model.teacher ServedTeacher --model.teacher.url "
    "http://a:b@localhost",
    "devices": "--trainer.devices 0",
    "many devices": "--trainer.accelerator gpu --trainer.devices 64",
    "device of a name": "--trainer.devices x",
    "barebones": "--trainer.barebones true",
    "overfit": "--trainer.overfit_batches 2",
    "limit of nothing": "--trainer.limit_train_batches 0",
    "negative limit": "--trainer.limit_train_batches=-1",
    "interval of zero": "--trainer.val_check_interval 0",
    "time": "--trainer.max_time yesterday",
    "plugins": "--trainer.plugins nothing",
    "half precision": "--trainer.precision 8",
    "clip of another kind": "--trainer.gradient_clip_algorithm median",
    "fsdp of one process": "--trainer.strategy fsdp --trainer.accelerator cpu",
    "deepspeed": "--trainer.strategy deepspeed",
    "callback of no class": "--trainer.callbacks+=os.system",
    "callback of a module": "--trainer.callbacks+=okd_lightning.callbacks",
    "callback of a function": "--trainer.callbacks+=okd_lightning.callbacks.methods.base",
    "callback twice": "--trainer.callbacks+=LastCheckpoint --trainer.callbacks+=LastCheckpoint",
    "method as a callback of zero": "--trainer.callbacks+=GKD --trainer.callbacks.weight 0",
    "pattern": "--trainer.callbacks+=ExactMatch --trainer.callbacks.pattern (",
    "avg at zero": "--trainer.callbacks+=AvgAtK --trainer.callbacks.k 0",
    "monitor of nothing": "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor nothing",
    "early stopping of nothing": "--trainer.callbacks+=EarlyStopping",
    "best of no mode": "--trainer.callbacks+=BestCheckpoint --trainer.callbacks.mode best",
    "keep of zero": "--trainer.callbacks+=LastCheckpoint --trainer.callbacks.keep 0",
    "module without method": "--method.temperature 2 --method null",
    "junk": "junk",
    "junk after dashes": "-- junk",
    "dash": "-",
    "no value": "--method",
    "empty option": "-- --method KD",
    "one dash": "-method KD",
    "equals": "--=x",
    "no name": "--.x 1",
    "a section": "--model 7",
    "a section of a list": "--data [1]",
    "a section of a mapping": "--trainer {max_step: 3}",
    "a mapping that is cut": "--model.student {model_type: llama",
    "unknown architecture": "--model.student {model_type: nothing}",
    "architecture of no sizes": "--model.student {hidden_size: 3}",
    "architecture of an encoder": "--model.student {model_type: bert}",
    "odd heads": "--model.student {model_type: llama, hidden_size: 16, num_attention_heads: 3}",
    "huge layers": "--model.student {model_type: llama, hidden_size: 1000000000}",
    "seed": "--seed_everything x",
    "seed of a fraction": "--seed_everything 1.5",
    "negative seed": "--seed_everything=-5",
    "no such config": "--config nothing.yaml",
    "config of a folder": "--config .",
    "config of a binary": "--config rows.bin",
    "checkpoint": "--ckpt_path nothing.ckpt",
    "checkpoint of rows": "--ckpt_path rows.bin",
    "checkpoint of a folder": "--ckpt_path .",
    "checkpoint without ours": "--ckpt_path foreign.ckpt",
    "student": "--model.student nothing",
    "student on the hub": "--model.student some/thing",
    "student of a revision": "--model.student some/thing@x",
    "student outside": "--model.student ../../../nothing",
    "student of a file": "--model.student rows.bin",
    "student of an empty folder": "--model.student empty",
    "teacher of an empty folder": "--model.teacher empty",
    "tokenizer": "--model.tokenizer empty",
    "tokenizer of a file": "--model.tokenizer rows.bin",
    "teacher as a list": "--model.teacher [a]",
    "train": "--data.train nothing.jsonl",
    "train of an empty name": "--data.train=",
    "train of a folder": "--data.train empty",
    "train of a binary": "--data.train rows.bin",
    "train of no rows": "--data.train none.jsonl",
    "train of another column": "--data.train other.jsonl",
    "train of long prompts": "--data.train long.jsonl",
    "train on the hub": "--data.train some/thing",
    "train of a null byte": "--data.train a\0b",
    "val": "--data.val nothing.jsonl",
    "val split": "--data.val_split nothing --data.val some/thing",
    "root of a file": "--trainer.default_root_dir rows.bin",
    "root below a file": "--trainer.default_root_dir rows.bin/x",
    "root of no name": "--trainer.default_root_dir=",
    "root of the system": "--trainer.default_root_dir /proc/nothing",
    "cache of a file": "--model.teacher CachedTeacher --model.teacher.model teacher "
    "--model.teacher.folder rows.bin",
}
_CONFIGS: dict[str, str] = {
    "config: list": "- a\n",
    "config: text": "abc\n",
    "config: section": "modle:\n  student: a\n",
    "config: section of a list": "model: [1, 2]\n",
    "config: section of text": "data: abc\n",
    "config: option": "model:\n  studnet: a\n",
    "config: number": "model:\n  learning_rate: [1]\n",
    "config: method": "method: KDD\n",
    "config: method of a list": "method: [KD]\n",
    "config: method without class": "method:\n  init_args:\n    temperature: 2\n",
    "config: init_args": "method:\n  class_path: KD\n  init_args: [2]\n",
    "config: class_path": "method:\n  class_path: 7\n",
    "config: callbacks": "trainer:\n  callbacks: 7\n",
    "config: callbacks of text": "trainer:\n  callbacks: [7, {a: b}]\n",
    "config: callback": "trainer:\n  callbacks:\n  - class_path: Nothing\n",
    "config: foreign": "training_args:\n  lr: 1e-4\n",
    "config: indentation": "model:\n student: a\n  teacher: b\n",
    "config: tabs": "model:\n\tstudent: a\n",
    "config: template": "data:\n  prompt_template: 7\n",
    "config: sampling": "data:\n  sampling: [1]\n",
    "config: adapter": "model:\n  student_adapter: {r: 2}\n",
    "config: code": "model:\n  student: !!python/name:os.system x\n",
}


def _act(words: Words, files: dict[str, str]) -> Callable[[Bench], None]:
    def act(bench: Bench) -> None:
        assets = bench.student.parent / "assets"
        make_assets(assets)
        row = {"prompt": "a" * 40, "response": "b"}
        bench.write("long.jsonl", json.dumps(row) + "\n")
        bench.write("other.jsonl", '{"question": "a", "answer": "b"}\n')
        bench.write("none.jsonl", "")
        bench.write("rows.bin", b"\0\1\2\3" * 99)
        torch.save({"state_dict": {}}, bench.folder / "foreign.ckpt")
        (bench.folder / "empty").mkdir()
        for name, text in files.items():
            bench.write(name, text)
        command = [*_base(assets), *words]
        bench.write("command.txt", " ".join(map(repr, command)))
        check_command(command)
        raise AssertionError("it trained")

    return act


def _base(assets: Path) -> Words:
    """Return a command that trains for one step."""
    return [
        *("fit", "--method", "KD", "--model.student", str(assets / "student")),
        *("--model.teacher", str(assets / "teacher"), "--data.train", str(assets / "train.jsonl")),
        *("--data.val", str(assets / "val.jsonl"), "--data.max_prompt_length", "16"),
        *("--data.max_response_length", "8", "--data.batch_size", "2", "--data.val_rollouts", "2"),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        *("--trainer.max_steps", "1", "--trainer.default_root_dir", "run"),
    ]


def _split(text: str) -> Words:
    """Split a text into words; text in brackets is one word."""
    words: Words = []
    for word in text.split(" "):
        if words and words[-1].count("{") > words[-1].count("}") and not word.startswith("--"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def cases(seed: int) -> list[Case]:
    """Yield the listed cases, and as many random ones; no mistake occurs twice."""
    draw = random.Random(seed)
    drawn: dict[str, Words] = {}
    while len(drawn) < _NUM_DRAWN:
        words = draw.choice(_DRAWN)(draw)
        drawn[" ".join(words)] = words
    return [
        *(Case(name, _act(_split(text), {})) for name, text in _COMBINATIONS.items()),
        *(Case(flag, _act([flag, "1"], {})) for flag in _FOREIGN),
        *(
            Case(name, _act(["--config", "own.yaml"], {"own.yaml": text}))
            for name, text in _CONFIGS.items()
        ),
        *(Case(f"drawn: {name:.200}", _act(words, {})) for name, words in drawn.items()),
    ]
