"""New adapters: some are refused before memory is allocated for them.

* One of a rank or of a number of virtual tokens far beyond the model's own size.
* One whose saved weights do not restore the model that was trained.

The config of an adapter stays as the user made it.
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


def test_the_config_of_an_adapter_can_be_used_for_the_next_student():
    """PEFT writes the layers of an architecture into the config that it gets."""
    adapter = LoraConfig(r=2)
    for student in (tiny.make_llama(1), tiny.make_gpt2(1)):
        module = DistillationModule(
            student, tokenizer=tiny.make_tokenizer(), student_adapter=adapter
        )
        module.configure_model()
        assert any("lora_" in name for name, _ in module.student.named_parameters())
    assert adapter.to_dict() == LoraConfig(r=2).to_dict()
