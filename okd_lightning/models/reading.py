"""Hidden states of a micro-batch: from packed rows if the model supports them, else right-padded.

A packed row holds several of the batch's rows. transformers' masks (and flash attention's lengths)
find their starts from position ids that restart at 0, if neither a cache nor an attention mask is
passed. In a model with a recurrent state (Mamba) or without position ids, rows would silently leak
into each other, so every model is tested once (``packing``). Rows that must not share a pass
(``grouping``) are read in several.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from okd_lightning.errors import ConfigError
from okd_lightning.losses.closed_form import ModelRole
from okd_lightning.losses.cpu_linear import fast_linears, has_fast_linear
from okd_lightning.losses.projection import Side
from okd_lightning.losses.quantities import Quantity
from okd_lightning.losses.states import layers_read, routers_read
from okd_lightning.models.causal_lm import LMHead, head_inputs, named_arguments
from okd_lightning.models.grouping import measured_groups, switches
from okd_lightning.models.multimodal import (
    image_arguments,
    reads_images,
    unused_without_images,
)
from okd_lightning.models.taps import Taps
from okd_lightning.models.vocabulary import Vocabulary
from okd_lightning.records.sequences import Sequences


@dataclass(frozen=True)
class RowGroups:
    """Groups of rows that a model may read in one pass.

    Attributes:
        switch: Rows of more tokens are read separately from the others; None if any rows may share
            a pass.
        by_length: Rows above the switch share a pass only with rows of the same length, and follow
            a short row, which resets the model's remembered length.
        virtual_tokens: Tokens that prompt learning prepends to a row (it does not always).
    """

    switch: int | None = None
    by_length: bool = False
    virtual_tokens: int = 0

    def group(self, length: int) -> int:
        """Return a number that is equal for rows that may share a pass; grows with the length."""
        if self.switch is None or length + self.virtual_tokens <= self.switch:
            return 0
        return length if self.by_length else 1 + (length > self.switch)

    def split(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the row numbers of each pass, short rows first."""
        groups: dict[int, list[int]] = {}
        for number, length in enumerate(lengths):
            groups.setdefault(self.group(length), []).append(number)
        return [groups[key] for key in sorted(groups)]

    def follows_a_short_row(self, length: int) -> bool:
        """Return whether a first pass of rows up to ``length`` tokens needs a short row before."""
        if self.switch is None or not self.by_length:
            return False
        return length + self.virtual_tokens >= self.switch


ANY_ROWS = RowGroups()


def row_groups(model: PreTrainedModel) -> RowGroups:
    """Return the rows that ``model`` may read in one pass; measured once and kept on the model.

    Skipped for a config without a scaled rotary embedding. On the meta device it is postponed
    until the weights are loaded.

    Args:
        model: A causal LM, wrapped or not; its weights and mode are not changed.

    Raises:
        ModelError: A row's result depends on rows of earlier passes.
    """
    if isinstance(model, PeftModel):
        own = row_groups(model.get_base_model())
        virtual = getattr(model.active_peft_config, "num_virtual_tokens", None)
        return replace(own, virtual_tokens=virtual or 0)
    known: RowGroups | None = getattr(model, "_okd_row_groups", None)
    if known is None:
        if not switches(model.config) or "position_ids" not in named_arguments(model):
            known = ANY_ROWS
        elif next(model.parameters()).device.type == "meta":
            return ANY_ROWS
        else:
            known = RowGroups(*measured_groups(model))
        object.__setattr__(model, "_okd_row_groups", known)
    return known


def say_row_groups(model: PreTrainedModel, role: str) -> None:
    """Log if some rows need separate passes.

    Args:
        model: The student or the teacher.
        role: Its role, for the message.
    """
    groups = row_groups(model)
    if groups.switch is not None:
        apart = "by length" if groups.by_length else "apart"
        rank_zero_info(
            f"{role}: rows of more than {groups.switch} tokens are read {apart}, because the "
            f"rotary embedding of {type(model).__name__} depends on the longest row of a pass"
        )


def hidden_at_loss(
    model: PreTrainedModel, read: Sequences, packs: bool, taps: Taps | None = None
) -> Tensor:
    """Run ``model`` over a micro-batch and return its head's inputs at the loss positions.

    Rows that may not share a pass (``row_groups``) are read in several passes.

    Args:
        model: A causal LM, wrapped or not.
        read: The rows.
        packs: Whether the model gets packed rows (``reads_packed_rows``).
        taps: Takes states and routings of the passes; None for nothing.

    Returns:
        [positions, hidden] at the position before each loss token, row by row; gradient flows to
        the model's parameters.
    """
    groups = row_groups(model)
    idle_vision = _idle_vision(model, read)
    if groups.switch is None:
        hidden = hidden_of_pass(model, read, packs, taps)
        return hidden if idle_vision is None else hidden + idle_vision
    passes = groups.split(read.row_lengths)
    first = max(read.row_lengths[row] for row in passes[0])
    num_passes = len(passes) + groups.follows_a_short_row(first)
    idle = _idle_passes(model, read, _most_of_all_ranks(model, num_passes) - len(passes))
    parts = [hidden_of_pass(model, read.of_rows(rows), packs, taps, rows) for rows in passes]
    order = [torch.isin(read.places.row, read.places.row.new_tensor(rows)) for rows in passes]
    places = torch.cat([part.nonzero().squeeze(-1) for part in order]).argsort()
    if taps is not None:
        taps.reorder(places)
    return torch.cat(parts)[places] + (idle if idle_vision is None else idle + idle_vision)


def hidden_of_pass(
    model: PreTrainedModel,
    read: Sequences,
    packs: bool,
    taps: Taps | None = None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """Return the head's inputs of one pass; ``rows`` are its rows' numbers in the batch."""
    places = read.places
    packs = packs and read.images is None  # images are put in the places of padded rows
    with _fast_layers(model, read.input_ids.device), taps.listening() if taps else nullcontext():
        if packs:
            hidden = packed_states(model, read)
            starts = read.packing.start
        else:
            has_none = read.images is None
            images = None if has_none else image_arguments(model, read.input_ids, read.images)
            hidden = head_inputs(model, read.input_ids, read.attention_mask, images=images)
            starts = torch.arange(len(read.lengths), device=hidden.device) * hidden.shape[1]
    before = starts[places.row] + places.column - 1
    if taps is not None:
        row, column = read.attention_mask.nonzero(as_tuple=True)
        own = row if rows is None else row.new_tensor(rows)[row]
        taps.gather(hidden, before, starts[row] + column, own)
    return hidden.flatten(0, 1).index_select(0, before)


def _idle_passes(model: PreTrainedModel, read: Sequences, num_passes: int) -> Tensor:
    """Run passes over one token, which reset the model like a short row, and return zero."""
    idle = torch.zeros((), device=read.input_ids.device)
    for _ in range(num_passes):
        ids = read.input_ids[:1, :1]
        idle = idle + 0.0 * head_inputs(model, ids, torch.ones_like(ids)).sum()
    return idle


def _idle_vision(model: PreTrainedModel, read: Sequences) -> Tensor | None:
    """Return zero, with the parameters that a pass without images leaves out, if ranks need them.

    DDP waits for the gradient of every trained parameter. None where nothing is to be added.

    Raises:
        ConfigError: The model is sharded, and some ranks have rows with images and others have not:
            the passes of its vision tower are collective.
    """
    if not torch.distributed.is_initialized() or not reads_images(model.config):
        return None
    has_images = read.images is not None and bool(read.images.arguments)
    if isinstance(model, FSDPModule):
        found = torch.tensor([has_images, not has_images], dtype=torch.int64)
        found = found.to(next(model.parameters()).device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        if bool(found.all()):
            raise ConfigError(
                "with --trainer.strategy fsdp2 every micro-batch of every rank needs an image, or "
                "none: leave the rows without images out, or use --trainer.strategy ddp"
            )
        return None
    outside = [p for p in unused_without_images(model) if p.requires_grad]
    if has_images or not outside or not torch.is_grad_enabled():
        return None
    return 0.0 * torch.stack([parameter.sum() for parameter in outside]).sum()


def _most_of_all_ranks(model: PreTrainedModel, num_passes: int) -> int:
    """Return the most passes of any rank: a sharded model's passes are collective."""
    if not isinstance(model, FSDPModule):
        return num_passes
    most = torch.tensor(num_passes, device=next(model.parameters()).device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most)


def _fast_layers(model: PreTrainedModel, read_on: torch.device) -> AbstractContextManager[None]:
    """Use oneDNN products on CPUs, unless the model is compiled or transformers recomputes it."""
    if not has_fast_linear() or read_on.type != "cpu":
        return nullcontext()
    has_other_ways = any(
        module._compiled_call_impl is not None or getattr(module, "gradient_checkpointing", False)
        for module in model.modules()
    )
    return nullcontext() if has_other_ways else fast_linears(model, learns=True)


def packed_states(model: PreTrainedModel, read: Sequences) -> Tensor:
    """Return [packed_batch, packed_seq, hidden]; one single packed row for flash attention."""
    packing = read.packing
    ids, positions = read.input_ids[packing.row, packing.column], packing.position_ids
    if _is_flash(model):
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    return head_inputs(model, ids, None, positions)


def _is_flash(model: PreTrainedModel) -> bool:
    return "flash" in (model.config._attn_implementation or "")


def model_side(
    model: PreTrainedModel,
    reads: Sequences,
    packs: bool,
    vocabulary: Vocabulary,
    quantities: Sequence[Quantity] = (),
    role: ModelRole = "teacher",
) -> Side:
    """Return one model's hidden states at unmasked positions, with its head.

    Args:
        model: In the mode and with the gradients of the caller.
        reads: The rows.
        packs: Whether it gets packed rows.
        vocabulary: Ids to which the head is cut.
        quantities: What will be measured; states of layers and routers are taken for it.
        role: Which of the two models it is.
    """
    taps = None
    if any(quantity.reads_states for quantity in quantities):
        layers, has_routers = layers_read(quantities, role), routers_read(quantities, role)
        taps = Taps(model, len(reads.lengths), layers, has_routers)
    hidden = hidden_at_loss(model, reads, packs, taps)
    states = None if taps is None else taps.states()
    head = LMHead.of(model, vocabulary)
    return Side(hidden, head, vocabulary.end_ids, vocabulary.size, states)
