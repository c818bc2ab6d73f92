"""New adapters that are refused before memory is allocated for them.

* One of a rank or of a number of virtual tokens far beyond the model's own size.
* One whose saved weights do not restore the model that was trained.
"""

from __future__ import annotations

import pytest
import tiny
from peft import LoraConfig, PrefixTuningConfig

from okd_lightning.errors import ConfigError
from okd_lightning.teachers.online_module import attach_online_module
from okd_lightning.training.module import DistillationModule


@pytest.mark.parametrize(
    "settings",
    [
        *({"r": 10**9}, {"r": 10**30}, {"r": 2, "rank_pattern": {"q_proj": 10**9}}),
        {"layer_replication": [(0, 2), (0, 2)]},
        {"init_lora_weights": "pissa_niter_4"},
    ],
)
def test_a_new_adapter_that_is_huge_or_cannot_be_restored_is_refused(settings, student_folder):
    adapter = LoraConfig(target_modules=["q_proj"], **settings)
    module = DistillationModule(str(student_folder), student_adapter=adapter)
    with pytest.raises(ConfigError, match=r"^--model\.student_adapter: ") as caught:
        module.configure_model()
    assert "\n" not in str(caught.value)


def test_a_huge_prefix_on_a_teacher_is_refused():
    config = PrefixTuningConfig(num_virtual_tokens=10**9)
    with pytest.raises(ConfigError, match=r"--method.online_module: an adapter of more than"):
        attach_online_module(tiny.make_llama(2), config, "--method.online_module")
