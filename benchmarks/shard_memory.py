"""Memory per device under FSDP2, computed from sizes (not measured): the table of docs/scaling.md.

Run: python benchmarks/shard_memory.py
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
TILE, BLOCK = 2**27, 2**25
"""Logits of a tile and of a block of the loss, as in okd_lightning.losses.projection."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model for the formulas.

    Attributes:
        layers: Number of blocks.
        hidden: Width.
        intermediate: Width of the feed-forward part.
        key_value: Width of keys, and of values.
        vocab: Rows of the embedding.
        is_tied: Whether the head is the embedding.
    """

    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocab: int
    is_tied: bool

    @property
    def block(self) -> int:
        """Parameters of a block: attention and gated feed-forward."""
        attention = 2 * self.hidden * (self.hidden + self.key_value)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def query(self) -> int:
        """Width of all queries of a token."""
        return self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.block + (1 if self.is_tied else 2) * self.head + self.hidden


LLAMA_1B = Model(16, 2048, 8192, 512, 128256, is_tied=True)
LLAMA_8B = Model(32, 4096, 14336, 1024, 128256, is_tied=False)
LLAMA_70B = Model(80, 8192, 28672, 1024, 128256, is_tied=False)


def block_at_work(model: Model, learns: bool) -> float:
    """Return bytes per token of one block: saved for the backward pass, or used in a forward one.

    Attention's matrices are counted separately. Under autocast norms and their inputs are float32.
    """
    if not learns:
        return 2 * (8 * model.hidden + 3 * model.intermediate)
    return 20 * (model.hidden + model.query) + 8 * model.intermediate


def per_device(
    student: Model, teacher: Model, devices: int, tokens: int, adapts: bool = False
) -> dict[str, float]:
    """Return bytes by purpose.

    Args:
        student: Weights, gradients and AdamW's moments in float32, gathered in bfloat16.
        teacher: Frozen, in bfloat16.
        devices: Number of devices that share all of these.
        tokens: Tokens of a micro-batch on one device, padding included.
        adapts: Whether a gradient goes through the teacher too.
    """
    return {
        "student's weights": 4 * student.parameters / devices,
        "gradients": 4 * student.parameters / devices,
        "AdamW": 8 * student.parameters / devices,
        "teacher's weights": 2 * teacher.parameters / devices,
        "gathered: heads, two blocks": 2 * (student.head + teacher.head + 2 * teacher.block),
        "student's block inputs": 2 * tokens * student.layers * student.hidden,
        "one block at work": tokens
        * max(block_at_work(student, learns=True), block_at_work(teacher, adapts)),
        "head's gradient": (4 + 2) * student.head,
        "loss: a tile each, eight blocks": 2 * 2 * TILE + 8 * 4 * BLOCK,
    }


def main() -> None:
    """Print the table."""
    pairs = {"1B <- 8B": (LLAMA_1B, LLAMA_8B), "8B <- 70B": (LLAMA_8B, LLAMA_70B)}
    rows = {name: per_device(*pair, devices=8, tokens=8 * 1024) for name, pair in pairs.items()}
    print("| GiB per device, 8 devices | " + " | ".join(pairs) + " |")
    print("|---|" + "---|" * len(pairs))
    for what in next(iter(rows.values())):
        print(f"| {what} | " + " | ".join(f"{r[what] / GIB:.1f}" for r in rows.values()) + " |")
    totals = (sum(row.values()) / GIB for row in rows.values())
    print("| **a step** | " + " | ".join(f"{total:.1f}" for total in totals) + " |")
    phases = {
        "+ while gradients accumulate": lambda s: 4 * s.parameters * 7 / 8,
        "+ rollouts: the gathered student": lambda s: 2 * s.parameters,
        "+ rollouts: keys and values, 32 rows of 2,048": lambda s: (
            2 * 2 * s.layers * s.key_value * 32 * 2048
        ),
    }
    for what, size in phases.items():
        print(f"| {what} | " + " | ".join(f"{size(s) / GIB:.1f}" for s, _ in pairs.values()) + " |")


if __name__ == "__main__":
    main()
