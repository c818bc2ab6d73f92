"""Hidden states of a micro-batch: from packed rows if the model supports them, else right-padded.

A packed row holds several of the batch's rows. transformers' masks (and flash attention's lengths)
find their starts from position ids that restart at 0, if neither a cache nor an attention mask is
passed. In a model with a recurrent state (Mamba) or without position ids, rows would silently leak
into each other, so every model is tested once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

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
from okd_lightning.models.causality import attention_of_any_device, embedding_gradient
from okd_lightning.models.grouping import row_groups, say_row_groups
from okd_lightning.models.multimodal import (
    image_arguments,
    reads_images,
    unused_without_images,
)
from okd_lightning.models.taps import Taps
from okd_lightning.models.vocabulary import Vocabulary
from okd_lightning.records.sequences import Sequences

_TRIAL_LENGTHS = (5, 4, 3, 2)
_TOLERANCE = 0.1
"""Allowed distance relative to the norm: above the rounding of deep models in 16 bits."""


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
        hidden = _hidden_of_pass(model, read, packs, taps)
        return hidden if idle_vision is None else hidden + idle_vision
    passes = groups.split(read.row_lengths)
    first = max(read.row_lengths[row] for row in passes[0])
    num_passes = len(passes) + groups.follows_a_short_row(first)
    idle = _idle_passes(model, read, _most_of_all_ranks(model, num_passes) - len(passes))
    parts = [_hidden_of_pass(model, read.of_rows(rows), packs, taps, rows) for rows in passes]
    order = [torch.isin(read.places.row, read.places.row.new_tensor(rows)) for rows in passes]
    places = torch.cat([part.nonzero().squeeze(-1) for part in order]).argsort()
    if taps is not None:
        taps.reorder(places)
    return torch.cat(parts)[places] + (idle if idle_vision is None else idle + idle_vision)


def _hidden_of_pass(
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
            hidden = _packed_states(model, read)
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


def _packed_states(model: PreTrainedModel, read: Sequences) -> Tensor:
    """Return [packed_batch, packed_seq, hidden]; one single packed row for flash attention."""
    packing = read.packing
    ids, positions = read.input_ids[packing.row, packing.column], packing.position_ids
    if _is_flash(model):
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    return head_inputs(model, ids, None, positions)


def reads_packed_rows(model: PreTrainedModel) -> bool:
    """Return whether a model gives the same result for packed rows as for separate rows.

    Tested with four short rows in two packed ones, on the device of the weights. A row's result
    must not depend on the row packed before it (exactly, by the gradient), and must equal that of
    the row alone (within rounding, which tests the positions). A model on the meta device cannot be
    tested and does not pack.

    Args:
        model: Its weights and mode are not changed. Prompt learning never packs: it prepends its
            virtual tokens to the first row of a packed row only.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return False
    device = next(model.parameters()).device
    if device.type == "meta":
        return False
    if "position_ids" not in named_arguments(model):
        return False
    read = _trial_rows(model).to(device)
    return not _leaks(model, read) and _is_same(model, read)


def packs_rows(model: PreTrainedModel, is_wanted: bool, role: str) -> bool:
    """Return whether a model of a run gets packed rows; log if it does not support them.

    Args:
        model: The student or the teacher.
        is_wanted: Whether the run packs.
        role: Its role, for the message.
    """
    packs = is_wanted and reads_packed_rows(model)
    if is_wanted and not packs:
        rank_zero_info(
            f"{role}: rows are padded, sorted by length, and not packed: {type(model).__name__} "
            "does not keep packed rows apart"
        )
    return packs


def _trial_rows(model: PreTrainedModel) -> Sequences:
    """Return rows of different ids with loss on all tokens."""
    lengths = torch.tensor(_TRIAL_LENGTHS)
    shape = len(lengths), int(lengths.max())
    num_ids = model.config.get_text_config().vocab_size
    ids = (torch.arange(shape[0] * shape[1]) * 7 % num_ids).reshape(shape)
    return Sequences(ids, lengths, torch.arange(shape[1]) < lengths[:, None])


def _leaks(model: PreTrainedModel, read: Sequences) -> bool:
    """Return whether the last row of a packed row depends on the other rows in it."""
    is_last = read.packing.row == read.packing.row.max(dim=1, keepdim=True).values
    packed = embedding_gradient(model, lambda: _packed_states(model, read)[is_last])
    return bool((packed[~is_last] != 0).any())


def _is_same(model: PreTrainedModel, read: Sequences) -> bool:
    was_training = model.training
    model.eval()
    with torch.no_grad(), attention_of_any_device(model):
        alone, packed = (_hidden_of_pass(model, read, packs).double() for packs in (False, True))
    model.train(was_training)
    return bool((packed - alone).norm() < _TOLERANCE * alone.norm())


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


def tried(model: PreTrainedModel, packing: bool) -> bool:
    """Test how a teacher reads rows, and report slow fallbacks; return whether it packs them.

    Args:
        model: A model on its device, or on meta, where nothing can be tested yet.
        packing: Whether the run packs rows.
    """
    packs = packs_rows(model, packing, "teacher")
    say_row_groups(model, "teacher")
    return packs
