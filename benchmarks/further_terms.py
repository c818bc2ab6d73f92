"""Step cost of further terms and of a quantised teacher, relative to the step without them.

The pair of ``kd_step``: 16M <- 41M, V = 32000, 8 x 256 tokens, float32; a student with experts
(Mixtral, 8 of them, 2 a token) of the same width; on-policy responses of 32 tokens, scored by a
reward model of 28M. With bitsandbytes installed also the teacher in NF4.

    python benchmarks/further_terms.py [--steps 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable

import random_pair as pair
import torch
from side_by_side import take_turns, write_results
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from okd_lightning.callbacks import KD, ExpertBalance, HiddenStates, OPDPlus, Reward
from okd_lightning.rewards import RewardModel

LAYERS = {1: 1, 2: 2, -1: -1}
RESPONSE = 32


def experts() -> MixtralForCausalLM:
    """Make a mixture-of-experts student."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=pair.NUM_IDS,
        hidden_size=224,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return MixtralForCausalLM(config)


def kd() -> None:
    """KD."""
    pair.train_in_turns(KD())


def kd_states() -> None:
    """KD and three pairs of layers, with projectors from 224 to 512."""
    pair.train_in_turns(KD(), further=[HiddenStates(LAYERS, weight=0.1)])


def kd_experts() -> None:
    """KD of the mixture of experts."""
    pair.train_in_turns(KD(), student=experts())


def kd_experts_balance() -> None:
    """KD of the mixture of experts, and its balancing loss."""
    pair.train_in_turns(KD(), student=experts(), further=[ExpertBalance()])


def opd_plus() -> None:
    """OPD+ on responses of 32 tokens, generation included."""
    pair.train_in_turns(OPDPlus(), max_response_length=RESPONSE)


def opd_plus_reward_model() -> None:
    """OPD+ and a reward model."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(2)
        config = LlamaConfig(
            vocab_size=pair.NUM_IDS,
            hidden_size=512,
            intermediate_size=1088,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_labels=1,
            pad_token_id=0,
        )
        LlamaForSequenceClassification(config).save_pretrained(folder)
        pair.make_tokenizer().save_pretrained(folder)
        reward = Reward(RewardModel(folder), weight=0.1)
        pair.train_in_turns(OPDPlus(), further=[reward], max_response_length=RESPONSE)


def kd_nf4() -> None:
    """KD with the teacher in NF4."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    with tempfile.TemporaryDirectory() as folder:
        pair.make_model("teacher").save_pretrained(f"{folder}/full")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/full", quantization_config=config)
        model.save_pretrained(f"{folder}/nf4")
        pair.make_tokenizer().save_pretrained(f"{folder}/nf4")
        pair.train_in_turns(KD(), teacher=f"{folder}/nf4")


CONTENDERS: dict[str, Callable[[], None]] = {
    "KD": kd,
    "KD, hidden states": kd_states,
    "KD, experts": kd_experts,
    "KD, experts, balance": kd_experts_balance,
    "OPD+": opd_plus,
    "OPD+, reward model": opd_plus_reward_model,
    "KD, NF4 teacher": kd_nf4,
}
OVER = {
    "KD, hidden states": "KD",
    "KD, experts, balance": "KD, experts",
    "OPD+, reward model": "OPD+",
    "KD, NF4 teacher": "KD",
}


def main() -> None:
    """Measure all contenders, or run as one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    if options.contender:
        CONTENDERS[options.contender]()
        return
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    names = [name for name in CONTENDERS if has_bitsandbytes or "NF4" not in name]
    found = take_turns(__file__, {name: [name] for name in names}, options.steps)
    ratios = {
        f"cpu_seconds_of_{name}_over_{base}": round(
            found[name]["median_cpu_seconds"] / found[base]["median_cpu_seconds"], 3
        )
        for name, base in OVER.items()
        if name in found
    }
    write_results("further_terms", {**ratios, "contenders": found})


if __name__ == "__main__":
    main()
