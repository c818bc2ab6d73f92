"""Context length of a model.

Frozen here: a scaled context counts with its factor, whichever of both lengths the config gives;
where layer types differ, the shortest reach counts; a model without a limit has none.
"""

from __future__ import annotations

import pytest
import tiny
from transformers import AutoConfig, BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig

from okd_lightning.callbacks import KD
from okd_lightning.errors import ConfigError
from okd_lightning.models import max_positions


@pytest.mark.parametrize(
    ("scaling", "positions", "expected"),
    [
        (None, 64, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 64, 256),
        ({"rope_type": "yarn", "factor": 4.0}, 64, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256, 256),
        ({"rope_type": "linear", "factor": 2.0}, 64, 128),
        ({"rope_type": "dynamic", "factor": 2.5}, 64, 160),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            1024,
            1024,
        ),
    ],
)
def test_a_scaled_context_counts_with_its_factor(scaling, positions, expected, tmp_path):
    fields = {"max_position_embeddings": positions, "hidden_size": 32, "num_attention_heads": 4}
    config = LlamaConfig(**fields, **({"rope_scaling": scaling} if scaling else {}))
    assert max_positions(config) == expected
    config.save_pretrained(tmp_path)  # and as a folder says it
    assert max_positions(AutoConfig.from_pretrained(tmp_path)) == expected


def test_other_configs():
    assert max_positions(GPT2Config(n_positions=77)) == 77
    assert max_positions(BloomConfig()) is None
    by_layer = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    gemma = Gemma3TextConfig(max_position_embeddings=512, rope_parameters=by_layer)
    assert max_positions(gemma) == 512


def test_a_run_may_use_the_stretched_context(tmp_path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    data = {"data": {"max_response_length": 64, "max_prompt_length": 64}}
    settings = {"max_position_embeddings": 64}
    for is_scaled in (True, False):
        own = {**settings, **({"rope_scaling": scaling} if is_scaled else {})}
        pair = (tiny.make_llama(1, **own), tiny.make_llama(2, **own))
        module = tiny.DistillationModule(*pair, tokenizer=tiny.make_tokenizer())
        if is_scaled:
            tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4), **data)
            continue
        with pytest.raises(ConfigError, match="context of the student is 64"):
            tiny.fit(tmp_path, module, [KD()], tiny.make_rows(4), **data)
