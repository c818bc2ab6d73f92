"""Rewards from models on the command line.

Frozen here: a reward model and a judge are chosen by options or a config, train on two ranks, and
resume with the weights of an uninterrupted run; what is missing is one line before anything is
trained. (test_foreign_checkpoints.py: a checkpoint of somebody else brings neither along.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cli_workbench import QUIET, Assets, Result, make_tokenizer
from fake_judge import fake_judge
from forked import type_on_ranks
from transformers import LlamaConfig, LlamaForSequenceClassification

Type = Callable[..., Result]
LAST = Path("run/checkpoints/last.ckpt")
BESIDE = ["--method", "KD", "--trainer.callbacks+", "OPDPlus", "--trainer.callbacks+", "Reward"]
FUNCTION = "--trainer.callbacks.function"


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    torch.manual_seed(3)
    fields = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    fields |= {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4}
    config = LlamaConfig(vocab_size=258, num_labels=1, **fields)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def weights() -> dict[str, torch.Tensor]:
    return torch.load(LAST, weights_only=True)["state_dict"]


def test_a_reward_model_trains_and_resumes(
    okd: Type, fit: Type, assets: Assets, reward_model: str, here: Path
) -> None:
    function = [FUNCTION, "RewardModel", f"{FUNCTION}.path", reward_model]
    fit(BESIDE, function, "--trainer.max_steps", "4")
    columns = set(Path("run/metrics.csv").read_text().splitlines()[0].split(","))
    assert {"train/kd", "train/opd_plus", "train/reward", "rollout/reward"} <= columns
    whole = weights()
    Path("run").rename("whole")
    fit(BESIDE, function, "--trainer.max_steps", "2")
    result = okd("fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "4")
    assert result.status == 0, result.err
    assert all(torch.equal(value, whole[name]) for name, value in weights().items())
    words = ["fit", *assets.data, *QUIET, *assets.models, *BESIDE, FUNCTION, "RewardModel"]
    result = okd(*words, f"{FUNCTION}.path", assets.student)
    assert result.status == 1
    assert "LlamaForCausalLM) has 2 outputs; a reward model has one" in result.err
    assert len(result.err.strip().splitlines()) == 1


def test_a_judge_trains_on_two_ranks_and_resumes(okd: Type, assets: Assets, here: Path) -> None:
    with fake_judge() as server:
        config = {
            "method": "KD",
            "trainer": {
                "callbacks": [
                    {"class_path": "OPDPlus"},
                    {
                        "class_path": "Reward",
                        "init_args": {
                            "function": {
                                "class_path": "Judge",
                                "init_args": {"url": server.url, "scale": [1, 10]},
                            }
                        },
                    },
                ]
            },
        }
        Path("judge.yaml").write_text(yaml.safe_dump(config))
        two = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
        words = ["fit", "--config", "judge.yaml", *assets.data, *QUIET, *assets.models, *two]
        words += ["--trainer.default_root_dir", "run", "--data.prompts_per_rollout", "8"]
        type_on_ranks([*words, "--trainer.max_steps", "3"], here)
        asked = list(server.asked)
        assert asked
        assert len(set(asked)) >= len(asked) - 1  # one text on both ranks at once is asked twice
        checkpoint = torch.load(LAST, weights_only=True)
        (scores,) = [own["scores"] for own in checkpoint["callbacks"].values() if "scores" in own]
        assert len(scores) == len(set(asked))
        server.bodies.clear()
        type_on_ranks(["fit", "--ckpt_path", str(LAST), "--trainer.max_steps", "4"], here)
        assert not set(server.asked) & set(asked)
    lost = okd(*words[:-8], "--trainer.default_root_dir", "other", "--trainer.max_steps", "1")
    assert lost.status == 1
    assert "Judge url: " in lost.err
    assert "cannot be reached" in lost.err
