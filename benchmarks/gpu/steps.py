"""Distillation steps at the shapes of real pairs, random weights, bf16, on one accelerator.

Llama-3.2-1B from Llama-3.1-8B and Qwen3-0.6B from Qwen3-8B (shapes of the published configs): a KD
step with JSD(1/2) through our loss layer, forward and backward, and the extra cost of an online
module on the teacher. Operations are those of all matrix products and of attention; MFU is their
share of the device's peak.

    python benchmarks/gpu/steps.py [--rows 8 --length 1024] [--pairs llama qwen3] [--compile]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from measuring import measure, mfu, the_device, write
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from okd_lightning.callbacks import KD, OKD
from okd_lightning.divergences import JensenShannon
from okd_lightning.losses import Measured, Side, WeightedTerm, fused_loss
from okd_lightning.models import LMHead, Vocabulary, compile_blocks, hidden_at_loss
from okd_lightning.records.batches import DistillBatch, TrainingRow
from okd_lightning.records.collation import collate
from okd_lightning.teachers import attach_online_module

LLAMA = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
PAIRS = {
    "llama": (
        {
            **LLAMA,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
        {
            **LLAMA,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3": (
        {
            **QWEN3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "tie_word_embeddings": True,
        },
        {
            **QWEN3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    ),
    "tiny": tuple(
        {
            **LLAMA,
            "vocab_size": 512,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        for width in (32, 64)
    ),
}


def make_model(fields: dict[str, Any]) -> PreTrainedModel:
    """Make a model with random weights on its device."""
    fields = dict(fields)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(the_device()):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def make_batch(rows: int, length: int, vocab: int, spread: bool) -> DistillBatch:
    """Return rows of one length, or of 20 to 100 % of it; loss on all but the first quarter."""
    torch.manual_seed(0)
    shares = torch.linspace(0.2, 1.0, rows) if spread else torch.ones(rows)
    lengths = (shares * length).int().tolist()
    made = [
        TrainingRow(
            i,
            "dataset",
            tuple(torch.randint(3, vocab, (n,)).tolist()),
            tuple(j >= n // 4 for j in range(n)),
            n // 4,
        )
        for i, n in enumerate(lengths)
    ]
    return collate(made).to(the_device())


def forward_flops(config: PretrainedConfig, batch: DistillBatch) -> tuple[float, float]:
    """Return the operations of one forward pass: body (matrix products and attention), and head."""
    heads, width = config.num_attention_heads, config.head_dim
    attended = config.hidden_size * width * 2 * (heads + config.num_key_value_heads)
    layer = attended + 3 * config.hidden_size * config.intermediate_size
    lengths = batch.lengths.double()
    attention = 2.0 * float(lengths.square().sum()) * heads * width  # q·k and p·v, causal half
    tokens = float(lengths.sum())
    body = config.num_hidden_layers * (2.0 * layer * tokens + attention)
    positions = float(batch.student_reads.places.row.numel())
    return body, 2.0 * config.hidden_size * config.vocab_size * positions


def run(name: str, options: argparse.Namespace, learns: bool, spread: bool) -> dict[str, Any]:
    """Measure one configuration: milliseconds, memory, MFU."""
    student, teacher = (make_model(fields) for fields in PAIRS[name])
    if learns:
        config = LoraConfig(r=16, target_modules=["q_proj", "v_proj"])
        teacher = attach_online_module(teacher, config, "online_module")  # type: ignore[assignment]
    else:
        teacher.requires_grad_(False).eval()
    if options.compile:
        compile_blocks(student, teacher)
    vocabulary = Vocabulary(student.config.vocab_size)
    batch = make_batch(options.rows, options.length, vocabulary.size, spread)
    method = OKD() if learns else KD(divergence=JensenShannon(0.5))
    terms = [WeightedTerm(method.term, 1.0 / batch.student_reads.places.row.numel())]

    def side(model: PreTrainedModel) -> Side:
        return Side(hidden_at_loss(model, batch.student_reads, True), LMHead.of(model, vocabulary))

    def step() -> None:
        own = side(student)
        with torch.set_grad_enabled(learns):
            its = side(teacher)
        about, targets = Measured.about(batch), batch.student_reads.targets
        fused_loss(terms, own, its, targets, about, vocabulary.size).total.backward()
        student.zero_grad(set_to_none=True)
        teacher.zero_grad(set_to_none=True)

    (own_body, own_head), (its_body, its_head) = (
        forward_flops(model.config, batch) for model in (student, teacher)
    )
    flops = 3 * (own_body + own_head) + its_body + its_head
    if learns:
        flops += its_body + its_head  # back through frozen weights: gradients of inputs alone
    found: dict[str, Any] = dict(measure(step, options.steps))
    tokens = int(batch.lengths.sum())
    return {
        "pair": name,
        "method": "OKD" if learns else "KD",
        "lengths": "20 to 100 %" if spread else "equal",
        "tokens": tokens,
        **found,
        "tokens_per_second": round(tokens / found["median_ms"] * 1e3),
        "tflop": round(flops / 1e12, 2),
        "mfu": mfu(flops, found["median_ms"]),
    }


def main() -> None:
    """Measure every pair in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=["llama", "qwen3"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    runs = []
    for name in options.pairs:
        for learns, spread in ((False, False), (False, True), (True, False)):
            runs.append(run(name, options, learns, spread))
            print(runs[-1], flush=True)
    write("steps", {**vars(options), "runs": runs})


if __name__ == "__main__":
    main()
