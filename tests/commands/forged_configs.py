"""Entries of a checkpoint's config that would run code, read files or reach servers.

``FORGED`` maps a name to the option, its value, and the words of the message that refuses it; "no
run:" marks those that no flag allows.
"""

from __future__ import annotations

from typing import Any

MODULE = """
from pathlib import Path
Path("ran").touch()
from okd_lightning.rewards import RewardFunction
from okd_lightning.callbacks import KD

class Brevity(RewardFunction):
    def __call__(self, prompts, responses, references):
        return [-float(len(response)) for response in responses]

class Method(KD):
    pass
"""
PROGRAM = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}
REWARD = {
    "class_path": "okd_lightning.callbacks.Reward",
    "init_args": {"function": {"class_path": "wicked.Brevity"}},
}


def callback(path: str, /, **settings: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": settings}


FORGED: dict[str, tuple[str, Any, str]] = {
    "a model's field": ("model.student.x", PROGRAM, "subprocess.Popen"),
    "a template's setting": ("data.chat_template_kwargs", {"x": PROGRAM}, "subprocess.Popen"),
    "in a text": ("data.chat_template_kwargs", str({"x": [PROGRAM]}), "subprocess.Popen"),
    "a method": ("method", callback("wicked.Method"), "wicked.Method"),
    "a method's name": ("method", "wicked.Method", "wicked.Method"),
    "a dotted key": ("method.class_path", "wicked.Method", "no run:wicked.Method"),
    "a reward": ("trainer.callbacks", [REWARD], "--trainer.callbacks.function 'wicked.Brevity'"),
    "a reward model": (
        "trainer.callbacks",
        [
            callback(
                "okd_lightning.callbacks.Reward",
                function=callback("okd_lightning.rewards.RewardModel", path="org/reward"),
            )
        ],
        "--trainer.callbacks.function.path 'org/reward'",
    ),
    "a judge": (
        "method",
        callback(
            "okd_lightning.callbacks.Reward",
            function=callback("okd_lightning.rewards.Judge", url="http://h"),
        ),
        "--method.function.url 'http://h'",
    ),
    "another key for a judge": (
        "method",
        callback(
            "okd_lightning.callbacks.Reward",
            function=callback("okd_lightning.rewards.Judge", key_variable="PASSWORD"),
        ),
        "--method.function.key_variable 'PASSWORD'",
    ),
    "more callbacks": ("trainer.callbacks+", REWARD, "wicked.Brevity"),
    "a tool": ("data.tools", [{"class_path": "wicked.Tool"}], "wicked.Tool"),
    "a re-exported module": (
        "trainer.callbacks",
        [
            callback(
                "okd_lightning.callbacks.monitors.preemption.subprocess.Popen",
                args=["touch", "ran"],
            )
        ],
        "preemption.subprocess.Popen",
    ),
    "a function of lightning": (
        "trainer.callbacks",
        [callback("lightning.pytorch.utilities.upgrade_checkpoint.main")],
        "upgrade_checkpoint.main",
    ),
    "a function by name": (
        "trainer.callbacks",
        [callback("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="wicked.run")],
        "--trainer.callbacks.on_fit_start 'wicked.run'",
    ),
    "a schedule's function": (
        "model.lr_scheduler",
        callback("torch.optim.lr_scheduler.LambdaLR", lr_lambda="os.system"),
        "os.system",
    ),
    "a tokenizer's class": ("model.tokenizer", "wicked.Tokenizer", "wicked.Tokenizer"),
    "a file to read": ("method", "method.yaml", "method.yaml"),
    "a section in a file": ("trainer", "method.yaml", "method.yaml"),
    "another shelf": ("method", callback("callbacks.wicked.Method"), "callbacks.wicked.Method"),
    "an unknown section": ("weights_only", False, "no run:weights_only"),
    "an engine": (
        "model.engine",
        callback("okd_lightning.engines.VLLMServer", url="http://h", sync_folder="s"),
        "--model.engine",
    ),
    "a teacher's server": ("model.teacher_server", "http://h", "--model.teacher.url 'http://h'"),
    "a logger that sends": (
        "trainer.logger",
        callback("lightning.pytorch.loggers.WandbLogger"),
        "WandbLogger",
    ),
    "a kernel": ("model.attn_implementation", "org/kernel", "org/kernel"),
    "a kernel of a model": ("model.student._attn_implementation", "org/kernel", "org/kernel"),
    "a module of PEFT's": (
        "model.student_adapter",
        callback("peft.LoraConfig", megatron_config={"x": 1}, megatron_core="wicked"),
        "wicked",
    ),
    "code of a repository": (
        "method",
        callback(
            "okd_lightning.callbacks.OKD",
            online_module=callback(
                "peft.PromptTuningConfig", tokenizer_kwargs={"trust_remote_code": True}
            ),
        ),
        "--method.online_module.tokenizer_kwargs.trust_remote_code",
    ),
    "another run's folder": (
        "trainer",
        {"default_root_dir": "a", "default_root_dir.x": "b"},
        "no run:--trainer.default_root_dir.x",
    ),
    "a cache to write": ("model.teacher_cache", "/somewhere", "--model.teacher.folder"),
    "a folder to write in": (
        "trainer.callbacks",
        [callback("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="/somewhere")],
        "/somewhere",
    ),
}
