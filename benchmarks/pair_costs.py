"""Memory and time of a distillation step, computed from sizes by formula, not measured.

Sizes are counted on architectures that are built without weights. docs/recipes.md lists the
assumptions of the formulas; recipe_tables.py applies them to the configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from shard_memory import per_device
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from okd_lightning.engines import TransformersEngine
from okd_lightning.models.blocks import decoder_blocks
from okd_lightning.models.multimodal import auto_class, language_model, vision_parts

# One H100 (80 GB, SXM), from its data sheet, and the share of it that is assumed to be reached.
PEAK_FLOPS, PEAK_SHARE = 989e12, 0.4
MEMORY_BANDWIDTH, BANDWIDTH_SHARE = 3.35e12, 0.6
LINKS = {"in a node": 450e9, "between nodes": 50e9}  # bytes per second and GPU, each direction
BLOCK_LAUNCHES = 2.5e-4  # least seconds per block and token: 25 kernels of 10 us

ADAPTER_RANK, ADAPTER_BYTES = 32, 16  # OKD's default module: float32, gradient, two moments


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model for the formulas; counts are of parameters.

    Attributes:
        parameters: All parameters.
        block: Parameters of one block.
        head: Parameters of the head; the input embedding has as many.
        layers: Number of blocks.
        hidden: Width.
        intermediate: Width of the feed-forward part.
        query: Width of all queries of a token.
        key_value: Width of its keys, and of its values.
        heads: Number of query heads.
        vocab: Rows of the head.
        adapter: Parameters of LoRA with OKD's default rank on PEFT's default layers.
        is_eager: Whether attention stores its matrices (no fused kernel soft-caps).
        tower: Parameters of a frozen vision tower, which are not among the other counts.
        tower_operations: Floating-point operations of the tower for one image token of a prompt.
        tower_bytes: Bytes of one of its blocks at work, for one image token.
    """

    parameters: int
    block: int
    head: int
    layers: int
    hidden: int
    intermediate: int
    query: int
    key_value: int
    heads: int
    vocab: int
    adapter: int
    is_eager: bool
    tower: int = 0
    tower_operations: int = 0
    tower_bytes: int = 0

    @property
    def body(self) -> int:
        """Parameters that every token is multiplied with: the blocks."""
        return self.layers * self.block


def build(fields: Mapping[str, Any]) -> PreTrainedModel:
    """Return a model without weights, from its config's fields."""
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class(config).from_config(config)
        return model


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Count the sizes of a model."""
    config: PretrainedConfig = model.config.get_text_config()
    decoder, (_, blocks) = language_model(model), decoder_blocks(model)
    tower = vision_sizes(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()) - tower.get("tower", 0),
        block=sum(p.numel() for p in blocks[0].parameters()),
        head=model.get_output_embeddings().weight.numel(),
        layers=len(blocks),
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        query=config.num_attention_heads * head_dim,
        key_value=groups * head_dim,
        heads=config.num_attention_heads,
        vocab=config.vocab_size,
        adapter=sum(
            ADAPTER_RANK * sum(module.weight.shape)
            for name, module in decoder.named_modules()
            if name.rsplit(".", 1)[-1] in ("q_proj", "v_proj", "c_attn")
        ),
        is_eager=config._attn_implementation == "eager",
        **tower,
    )


def vision_sizes(model: PreTrainedModel) -> dict[str, int]:
    """Count the sizes of a vision tower whose patches are merged into image tokens (SmolVLM)."""
    parts = vision_parts(model)
    if not parts:
        return {}
    (tower,), config = parts, model.config.vision_config
    parameters = sum(p.numel() for p in tower.parameters())
    patches = model.config.scale_factor**2  # of an image token
    attention = 4 * config.num_hidden_layers * config.hidden_size
    attention *= (config.image_size // config.patch_size) ** 2  # patches of a crop
    width = 8 * config.hidden_size + 3 * config.intermediate_size
    return {
        "tower": parameters,
        "tower_operations": patches * (2 * parameters + attention),
        "tower_bytes": patches * 2 * width,
    }


@dataclass(frozen=True)
class Recipe:
    """A pair with its task: the settings that decide the cost of a step.

    Attributes:
        name: As in ``--config pairs/NAME``.
        task: As in ``--config tasks/TASK``; None where the pair has its own.
        method: The method's class.
        student: Trained.
        teacher: Frozen, except for OKD's module.
        micro_rows: Rows of a micro-batch on one device.
        rows: Rows of an optimizer step.
        prompt: Most tokens of a prompt.
        response: Most tokens of a response.
        written: Share of the steps whose responses the student generates.
    """

    name: str
    task: str | None
    method: str
    student: Sizes
    teacher: Sizes
    micro_rows: int
    rows: int
    prompt: int
    response: int
    written: float

    @property
    def length(self) -> int:
        """Most tokens of a row."""
        return self.prompt + self.response

    @property
    def adapts(self) -> bool:
        """True where the teacher has a trained module."""
        return self.method == "OKD"


@dataclass(frozen=True)
class Hardware:
    """Devices and the models' placement on them.

    Attributes:
        name: Name in tables.
        overlay: The config that requests it; None for one device.
        devices: Number of devices on all nodes.
        nodes: Number of machines.
        is_sharded: Whether each device holds a part (FSDP2), or everything (DDP).
    """

    name: str
    overlay: str | None
    devices: int
    nodes: int = 1
    is_sharded: bool = False


HARDWARE = (
    Hardware("1 GPU", None, 1),
    Hardware("8 GPUs", "overlays/ddp", 8),
    Hardware("8 GPUs", "overlays/fsdp2", 8, is_sharded=True),
    Hardware("2 x 8 GPUs", "overlays/slurm", 16, nodes=2, is_sharded=True),
)


def kept(recipe: Recipe, hardware: Hardware) -> dict[str, float]:
    """Return the bytes that a device holds from the first optimizer step on, by purpose."""
    parts = hardware.devices if hardware.is_sharded else 1
    whole = per_device(recipe.student, recipe.teacher, parts, tokens=0)
    names = ("student's weights", "gradients", "AdamW", "teacher's weights")
    found = {name: whole[name] for name in names}
    if recipe.adapts:
        found["online module"] = ADAPTER_BYTES * recipe.teacher.adapter / parts
    if hardware.devices > 1 and not hardware.is_sharded:
        found["DDP's buckets"] = 4 * recipe.student.parameters
    if recipe.student.tower:
        found["vision towers"] = (4 * recipe.student.tower + 2 * recipe.teacher.tower) / parts
    return found


def passing(recipe: Recipe, hardware: Hardware) -> dict[str, float]:
    """Return the temporary bytes of a micro-batch, by purpose."""
    student, teacher = recipe.student, recipe.teacher
    tokens = recipe.micro_rows * recipe.length
    found = per_device(student, teacher, hardware.devices, tokens, recipe.adapts)
    for name in kept(recipe, hardware):
        found.pop(name, None)
    if not hardware.is_sharded:
        found["student's block inputs"] *= 2  # autocast keeps the sums in float32
        del found["gathered: heads, two blocks"]
        found["student in bfloat16"] = 2 * student.parameters  # autocast's copies
    elif recipe.rows > recipe.micro_rows * hardware.devices:
        found["gradients that accumulate"] = 4 * student.parameters * (1 - 1 / hardware.devices)
    if recipe.adapts:
        found["teacher's block inputs"] = 2 * tokens * teacher.layers * teacher.hidden
    if student.tower:
        at_work = max(student.tower_bytes, teacher.tower_bytes)
        found["a block of a tower at work"] = recipe.micro_rows * recipe.prompt * at_work
    if teacher.is_eager:  # scores in bfloat16, softmax in float32; packed rows are twice as long
        found["attention's matrix"] = 6 * teacher.heads * tokens * 2 * recipe.length
    return found


def writing(recipe: Recipe, hardware: Hardware) -> float:
    """Return the temporary bytes of generation: the student's copy, keys and values, logits."""
    if not recipe.written:
        return 0.0
    student, rows = recipe.student, written_at_once(recipe, hardware)
    cache = 4 * student.layers * student.key_value * rows * recipe.length
    return 2 * student.parameters + cache + 3 * 4 * rows * student.vocab


def written_at_once(recipe: Recipe, hardware: Hardware) -> int:
    """Return the number of rows that a device generates at once."""
    rows = -(-recipe.rows // hardware.devices)
    return min(rows, TransformersEngine.token_budget // recipe.length)


def memory(recipe: Recipe, hardware: Hardware) -> float:
    """Return the peak bytes of a device: in a micro-batch, optimizer step or rollout."""
    parts = hardware.devices if hardware.is_sharded else 1
    step = 4 * recipe.student.parameters / parts  # AdamW's square roots
    worst = max(sum(passing(recipe, hardware).values()), step, writing(recipe, hardware))
    return sum(kept(recipe, hardware).values()) + worst


def operations(recipe: Recipe) -> float:
    """Return the floating-point operations of an optimizer step, all rows at their full length.

    A product costs 2 per parameter and token: 1 forward, 1 recomputed, 2 backward. The head reads
    responses only. A vision tower is frozen, and reads all tokens of the prompts.
    """
    student, teacher = recipe.student, recipe.teacher
    teacher_body, teacher_head = (3, 2) if recipe.adapts else (1, 1)  # for its inputs, not weights
    return _passes(student, recipe, body=4, head=3) + _passes(
        teacher, recipe, body=teacher_body, head=teacher_head
    )


def _passes(model: Sizes, recipe: Recipe, body: int, head: int) -> float:
    attention = 2 * model.layers * model.query * recipe.length  # causal: half of all pairs
    in_blocks = (2 * model.body + attention) * recipe.length
    in_tower = model.tower_operations * recipe.prompt
    return recipe.rows * (body * in_blocks + head * 2 * model.head * recipe.response + in_tower)


def sent(recipe: Recipe, hardware: Hardware) -> float:
    """Return the bytes that a device receives in an optimizer step."""
    if hardware.devices == 1:
        return 0.0
    student, teacher = recipe.student.parameters, recipe.teacher.parameters
    reduced = 4 * student * (1 if hardware.is_sharded else 2)
    if not hardware.is_sharded:
        return reduced
    micro_batches = -(-recipe.rows // (recipe.micro_rows * hardware.devices))
    gathered = 2 * (2 * student + (2 if recipe.adapts else 1) * teacher)
    gathered += 2 * (recipe.student.tower + recipe.teacher.tower)
    return reduced + micro_batches * gathered + recipe.written * 2 * student


def training_seconds(recipe: Recipe, hardware: Hardware) -> float:
    """Return the seconds of a step without rollouts: products or transfers, whichever is longer."""
    computed = operations(recipe) / (hardware.devices * PEAK_FLOPS * PEAK_SHARE)
    link = LINKS["in a node" if hardware.nodes == 1 else "between nodes"]
    return max(computed, sent(recipe, hardware) / link)


def writing_seconds(recipe: Recipe, hardware: Hardware) -> float:
    """Return the seconds of a step's rollouts, at full length, by the built-in engine."""
    student, at_once = recipe.student, written_at_once(recipe, hardware)
    batches = -(-recipe.rows // (hardware.devices * at_once))
    cache = 4 * student.layers * student.key_value * at_once * (recipe.length - recipe.response / 2)
    read = 2 * (student.body + student.head) + cache
    token = max(
        read / (MEMORY_BANDWIDTH * BANDWIDTH_SHARE),
        student.layers * BLOCK_LAUNCHES,
    )
    return batches * recipe.response * token


def seconds(recipe: Recipe, hardware: Hardware) -> float:
    """Return the seconds of an optimizer step, averaged over steps with and without rollouts."""
    rollouts = recipe.written * writing_seconds(recipe, hardware)
    return training_seconds(recipe, hardware) + rollouts
