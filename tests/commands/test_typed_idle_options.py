"""A command names what was typed, or set in a config of one's own, and has no effect.

* One warning an option, and the run goes on; a packaged config's options are not named.
* ``config.yaml`` of a run, which holds all defaults, names no more than the run did.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

from cli_workbench import Assets, Result

MARK = " has no effect in this run: "


def named(type_command: Callable[..., Result], *words: str | list[str]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = type_command(*words)
    assert result.status == 0, result.err
    lines = [str(w.message) for w in caught]
    return sorted(line.partition(MARK)[0] for line in lines if MARK in line)


def test_what_was_chosen_in_vain_is_named(
    okd: Callable[..., Result], assets: Assets, here: Path
) -> None:
    (here / "own.yaml").write_text("data: {subset: main, val_rollouts: 64}\n")
    short = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    short += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", "run"]
    data = ["--data.train", assets.train, "--data.val", assets.val, "--data.val_rollouts", "2"]
    limits = ["--data.max_prompt_length", "16", "--data.max_response_length", "8"]
    columns = ["--data.prompt_column", "prompt", "--data.response_column", "response"]
    typed = ["--data.sampling.temperature", "0.5", "--method", "KD"]
    base = [*assets.models, *data, *limits, *short]
    packaged = ["--config", "gsm8k", "--model.tokenizer", "null"]  # has subset main too
    other = ["--trainer.default_root_dir", "other"]
    expected = ["--data.sampling.temperature 0.5", "--data.subset main"]
    assert named(okd, "fit", "--config", "own.yaml", base, typed) == expected
    assert named(okd, "fit", "--config", "run/config.yaml") == ["--data.sampling", expected[1]]
    assert named(okd, "fit", packaged, base, columns, typed, other) == expected[:1]
    last = ["--ckpt_path", "run/checkpoints/last.ckpt"]
    assert named(okd, "test", last) == []
    assert named(okd, "test", last, typed[:2]) == expected[:1]
