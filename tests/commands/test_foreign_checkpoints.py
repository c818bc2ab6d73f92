"""Checkpoints and comparisons of another author: code that they name is not run.

Frozen here, for every command: a config in a checkpoint that names a program, a module of the
current folder, a re-exported module, a function, a config file, a server or a kernel is refused in
one line that names the file, and nothing has run; each remedy that the line names works. A
user's own checkpoints resume whatever they name, without a flag. The run's folder is where the
checkpoint lies.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import yaml
from cli_workbench import QUIET, STUDENT_FIELDS, Assets, Result
from forged_configs import FORGED, MODULE, PROGRAM, REWARD, callback

from okd_lightning.checkpoints import signature
from okd_lightning.data import RolloutDataModule
from okd_lightning.errors import CheckpointError, ConfigError
from okd_lightning.training.module import DistillationModule

Type = Callable[..., Result]
RAN = Path("ran")
EVIL = Path("sent/checkpoints/evil.ckpt")
COMMANDS = {
    "fit": ["fit", "--ckpt_path", str(EVIL)],
    "fit last": ["fit", "--ckpt_path", "last", "--trainer.default_root_dir", "sent"],
    "validate": ["validate", "--ckpt_path", str(EVIL)],
    "test": ["test", "--ckpt_path", str(EVIL)],
    "predict": ["predict", "--ckpt_path", str(EVIL)],
    "export": ["export", "--ckpt_path", str(EVIL), "--out", "out"],
    "diagnose": ["diagnose", "--ckpt_path", str(EVIL), "--out", "out"],
}


@pytest.fixture(scope="module")
def begun(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, signed as all runs are."""
    from process_state import unchanged_process

    from okd_lightning.__main__ import main

    folder = tmp_path_factory.mktemp("begun")
    words = [
        *assets.models,
        *assets.data,
        *QUIET,
        "--trainer.default_root_dir",
        str(folder / "run"),
    ]
    with unchanged_process(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        assert main(["fit", "--method", "KD", *words, "--trainer.max_steps", "1"]) == 0
    return folder / "run"


@pytest.fixture
def forge(begun: Path, here: Path) -> Callable[..., Path]:
    """Change a checkpoint's config, as somebody without the user's key."""
    (here / "wicked.py").write_text(MODULE)
    (here / "callbacks").mkdir()
    (here / "callbacks" / "wicked.py").write_text(MODULE)
    (here / "method.yaml").write_text("class_path: wicked.Method\n")

    def write(option: str, value: Any, name: str = "evil.ckpt") -> Path:
        checkpoint = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
        config = yaml.safe_load(checkpoint["okd_lightning"]["config"])
        *sections, last = option.split(".") if option != "method.class_path" else [option]
        node = config
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {"model_type": "llama"}
            node = node[section]
        node[last] = value
        checkpoint["okd_lightning"]["config"] = yaml.safe_dump(config)
        EVIL.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, EVIL.with_name(name))
        return EVIL.with_name(name)

    return write


def refused(result: Result, *words: str) -> None:
    """Run a command that must end with one line, and run no code and write no file."""
    assert result.status == 1, result.err
    (line,) = result.err.strip().splitlines()
    for word in words:
        assert word in line, line
    assert not RAN.exists()
    assert {path.name for path in EVIL.parents[1].rglob("*")} <= {"checkpoints", EVIL.name}


@pytest.mark.parametrize("name", FORGED)
def test_what_a_forged_config_names_is_not_run(name: str, forge: Type, okd: Type) -> None:
    option, value, named = FORGED[name]
    forge(option, value)
    advice = "take another" if named.startswith("no run:") else "--trust_checkpoint"
    refused(okd(*COMMANDS["test"]), str(EVIL), named.removeprefix("no run:"), advice)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses(command: str, forge: Type, okd: Type) -> None:
    forge("model.student.x", PROGRAM)
    refused(okd(*COMMANDS[command]), str(EVIL), "subprocess.Popen", "--trust_checkpoint")
    forge("method", callback("wicked.Method"))
    advice = [] if command == "export" else ["give --method yourself"]
    refused(okd(*COMMANDS[command]), str(EVIL), "wicked.Method", *advice)


def test_a_signature_is_of_one_config(forge: Type, okd: Type, monkeypatch: Any) -> None:
    """A signed config that was changed, and one that somebody else has signed."""
    evil = forge("method", callback("wicked.Method"))
    checkpoint = torch.load(evil, weights_only=True)
    own = checkpoint["okd_lightning"]
    assert own["signature"] is not None
    with monkeypatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(Path("somebody").absolute()))
        own["signature"] = signature.run_signature(
            own["config"], own["started_in"], own["arguments"]
        )
    torch.save(checkpoint, evil)
    refused(okd(*COMMANDS["test"]), "was not signed by you", "wicked.Method")


@pytest.mark.parametrize("config", ["[]", "text", "a: [", 3, "&a [*a]"])
def test_a_config_that_is_none(config: Any, forge: Type, okd: Type) -> None:
    evil = forge("seed_everything", 1)
    checkpoint = torch.load(evil, weights_only=True)
    checkpoint["okd_lightning"]["config"] = config
    torch.save(checkpoint, evil)
    refused(okd(*COMMANDS["test"]), str(EVIL), "take another checkpoint")


def test_a_config_in_a_circle(forge: Type, okd: Type) -> None:
    circle: list[Any] = []
    circle.append(circle)
    forge("data.chat_template_kwargs", {"x": circle})
    refused(okd(*COMMANDS["test"]), str(EVIL), "take another checkpoint")


def test_each_way_out_is_one(forge: Type, okd: Type, monkeypatch: Any) -> None:
    """The flag; the option that is given again; a config that names the same code."""
    monkeypatch.syspath_prepend(str(Path.cwd()))
    forge("method", callback("wicked.Method"))
    given = okd(*COMMANDS["fit"], "--method", "KD", "--trainer.max_steps", "1")
    assert "the checkpoint is of" not in given.err
    assert not RAN.exists()
    Path("mine.yaml").write_text("method: {class_path: wicked.Method}\n")
    assert okd(*COMMANDS["test"], "--config", "mine.yaml").status == 0
    RAN.unlink()
    assert okd(*COMMANDS["test"], "--trust_checkpoint").status == 0
    assert okd(*COMMANDS["export"], "--trust_checkpoint=true").status == 0
    wrong = okd(*COMMANDS["test"], "--trust_checkpoint=perhaps")
    assert wrong.status == 2
    assert "true or false" in wrong.err


def test_a_server_that_is_typed_is_used(forge: Type, okd: Type, assets: Assets) -> None:
    """A server of the config that typed options replace is not used."""
    option, value, _ = FORGED["a teacher's server"]
    forge(option, value)
    assert okd(*COMMANDS["test"], "--model.teacher", assets.teacher).status == 0
    server = ["--model.teacher", "ServedTeacher", "--model.teacher.url", "http://127.0.0.1:9"]
    typed = okd(*COMMANDS["test"], *server)
    assert typed.status == 1
    assert "signed" not in typed.err


def test_ones_own_code_resumes_without_a_flag(
    begun: Path, okd: Type, assets: Assets, here: Path, monkeypatch: Any
) -> None:
    (here / "rewards.py").write_text(MODULE)
    words = [*assets.models, *assets.data, *QUIET, "--method", "OPDPlus"]
    words += ["--trainer.callbacks+=Reward", "--trainer.callbacks.function", "rewards.Brevity"]
    words += ["--trainer.default_root_dir", "run", "--trainer.max_steps", "1"]
    assert okd("fit", *words).status == 0
    last = "run/checkpoints/last.ckpt"
    resumed = okd("fit", "--ckpt_path", last, "--trainer.max_steps", "2")
    assert resumed.status == 0, resumed.err
    assert "--trust_checkpoint" not in resumed.log
    # without a key: the printed commands carry the flag, and are true
    Path("file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(Path("file").absolute()))
    assert okd("fit", "--ckpt_path", last, "--trainer.max_steps", "3").status == 1
    flagged = ["fit", "--ckpt_path", last, "--trust_checkpoint", "--trainer.max_steps", "3"]
    unsigned = okd(*flagged)
    assert unsigned.status == 0, unsigned.err
    (measure,) = [line for line in unsigned.log.splitlines() if line.startswith("measure:")]
    assert measure.endswith(" --trust_checkpoint")
    again = okd(*measure.split()[2:])
    assert again.status == 0, again.err


def test_a_run_continues_where_its_checkpoint_lies(begun: Path, forge: Type, okd: Type) -> None:
    """The folder is the checkpoint's own, not the one that it names, signed or not."""
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    forge("trainer.default_root_dir", str(begun))
    shutil.copytree(begun, "moved")
    for path, folder in ((EVIL, EVIL.parents[1]), (Path("moved/checkpoints/last.ckpt"), "moved")):
        result = okd("test", "--ckpt_path", str(path))
        assert result.status == 0, result.err
        assert (Path(folder) / "measures.jsonl").exists()
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_a_forged_comparison_runs_nothing(okd: Type, assets: Assets, here: Path) -> None:
    (here / "wicked.py").write_text(MODULE)
    words = [*assets.models, *assets.data, *QUIET, "--budget", "steps=1", "--out", "sent"]
    manifest = Path("sent/comparison.json")
    manifest.parent.mkdir()
    options = words[:-4]
    record: dict[str, Any] = {"seeds": [0], "budget": "steps=1", "configs": [], "options": options}

    def write(methods: Mapping[str, Any]) -> None:
        manifest.write_text(json.dumps({"methods": methods, **record}))

    trust = ("Evil", "--trust_checkpoint")
    shared = ("data.chat_template_kwargs", "all contenders of a comparison share")
    for entry, named in (
        ({"method": "wicked.Method"}, ("wicked.Method", *trust)),
        ({"method": "KD", "trainer": {"callbacks+": [REWARD]}}, ("wicked.Brevity", *trust)),
        ({"method": "KD", "data": {"chat_template_kwargs": {"x": PROGRAM}}}, shared),
    ):
        write({"KD": {"method": "KD"}, "Evil": entry})
        result = okd("compare", "--methods", "KD", *words)
        assert result.status == 1
        (line,) = result.err.strip().splitlines()
        for word in (str(manifest), *named):
            assert word in line
        assert [path.name for path in manifest.parent.iterdir()] == [manifest.name]
    assert not RAN.exists()


def test_load_from_checkpoint_builds_nothing_that_a_file_names(begun: Path, here: Path) -> None:
    (here / "wicked.py").write_text(MODULE)
    checkpoint = torch.load(begun / "checkpoints" / "last.ckpt", weights_only=True)
    own = checkpoint["okd_lightning"]
    checkpoint["hyper_parameters"] = {
        "_instantiator": "wicked.Method",
        "_class_path": "wicked.Method",
        "student": PROGRAM,
    }
    checkpoint["hparams_name"] = "wicked.Method"
    torch.save(checkpoint, "forged.ckpt")
    module = DistillationModule.load_from_checkpoint("forged.ckpt")
    assert module.student is not None
    with pytest.raises(ConfigError, match=r"make RolloutDataModule\(train=..., ...\)"):
        RolloutDataModule.load_from_checkpoint("forged.ckpt")

    def refuse(name: str, value: Any, message: str, **given: Any) -> None:
        forged = {**checkpoint, "okd_lightning": {**own, "arguments": dict(own["arguments"])}}
        forged["okd_lightning"]["arguments"][name] = value
        torch.save(forged, "forged.ckpt")
        with pytest.raises(CheckpointError, match=message):
            DistillationModule.load_from_checkpoint("forged.ckpt", **given)

    refuse(
        "teacher_server",
        "http://h",
        "forged.ckpt was not signed by you, and its teacher names a server",
    )
    refuse("attn_implementation", "org/kernel", "the kernel 'org/kernel'")
    refuse("student", {"model_type": "llama", "attn_implementation": "a/b"}, "the kernel 'a/b'")
    files = {"kept": "files", "value": {"../../ran": "x"}}
    refuse("tokenizer", files, "not in its own folder")
    lora = {"peft_type": "LORA", "megatron_config": {}, "megatron_core": "wicked"}
    refuse(
        "student_adapter", {"kept": "peft_config", "value": lora}, "import code of others .*wicked"
    )
    assert not RAN.exists()


@pytest.mark.parametrize(
    "path", ["subprocess.Popen", "torch.hub.load", "lightning.pytorch.os.system"]
)
def test_a_config_given_now_cannot_name_programs_either(
    path: str, okd: Type, assets: Assets, here: Path
) -> None:
    """Values of any type stay what they are; where code is expected, it is refused."""
    program = {"class_path": path, "init_args": {"args": ["touch", "ran"]}}
    config = {"model": {"student": {"model_type": "llama", **STUDENT_FIELDS, "x": program}}}
    Path("own.yaml").write_text(yaml.safe_dump({**config, "method": program}))
    result = okd("fit", "--config", "own.yaml")
    assert result.status != 0
    assert not RAN.exists()
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DistillationModule, "model", skip={"optimizer", "lr_scheduler"})
    given = {**config["model"], "tokenizer": assets.tokenizer, "learning_rate": 1e-3}
    built = parser.instantiate_classes(parser.parse_object({"model": given}))
    built.model.configure_model()  # a field of the student's config is kept as it is written
    assert not RAN.exists()
