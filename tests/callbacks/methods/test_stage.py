"""Stages and two methods of one class: what they refuse, remember and log.

Frozen here: a stage in a stage, a stage that never acts and a method whose own hooks nobody would
call are refused; a run is not resumed with another method in a stage; where two methods bound
their ratio, each logs its own share; a norm that value clipping would ignore is refused.
"""

import pytest
import tiny

from okd_lightning.callbacks import GKD, OKD, SFT, LastCheckpoint, OPDPlus, Stage
from okd_lightning.errors import CheckpointError, ConfigError


class Watching(SFT):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pytest.fail("nobody calls it")


def test_stages_that_are_refused():
    with pytest.raises(ConfigError, match="a stage in a stage"):
        Stage(Stage(SFT(), end=1), start=0)
    with pytest.raises(ConfigError, match="factor 0 throughout it never acts"):
        Stage(SFT(), first_factor=0.0)
    with pytest.raises(ConfigError, match="Watching has on_train_batch_end of its own"):
        Stage(Watching())
    Stage(SFT(), end=4, first_factor=0.0, last_factor=1.0)


def test_another_method_in_a_stage_is_not_resumed(tmp_path, make_module):
    saver = LastCheckpoint(every_n_steps=1)
    tiny.fit(tmp_path, make_module(), [Stage(SFT())], tiny.make_rows(8), callbacks=[saver])
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(CheckpointError, match=r"of Stage\(SFT\), this run.*Stage\(GKD\)"):
        tiny.fit(
            tmp_path / "other", make_module(), [Stage(GKD())], tiny.make_rows(8), ckpt_path=last
        )


def test_each_bound_is_logged_by_its_own_name(tmp_path, make_module):
    methods = [OPDPlus(clip=0.01, name="tight"), OPDPlus(max_ratio=1e6, name="loose")]
    recorder = tiny.fit(
        tmp_path,
        make_module(learning_rate=0.1),
        methods,
        tiny.make_rows(16),
        data={"prompts_per_rollout": 16},
    )
    shares = recorder.losses[-1]
    assert shares["train/tight_ratio_bounded"] > 0
    assert shares["train/loose_ratio_bounded"] == 0
    assert "train/ratio_bounded" not in shares


def test_a_norm_next_to_value_clipping_is_refused(tmp_path, make_module):
    settings = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    with pytest.raises(ConfigError, match=r"clip_norm 0\.1 .*gradient_clip_algorithm value"):
        tiny.fit(tmp_path, make_module(), [OKD(clip_norm=0.1)], tiny.make_rows(4), **settings)
