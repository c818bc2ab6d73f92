"""Models: loading, vocabulary agreement, and a causal LM as (hidden states, head).

* ``loading``: models from folders, hub ids, configs and adapters, with one-line errors.
* ``sources``: a folder, a hub id with or without a revision, or a GGUF file.
* ``weight_files``, ``weight_checks``: complete safetensors, and models with all their weights.
* ``adapter_folders``, ``adapters``: PEFT on disk and in memory.
* ``gguf_files``: models in llama.cpp's format.
* ``multimodal``, ``processors``, ``image_files``: vision-language models and their images.
* ``lengths``: a model's context length.
* ``text_ids``: texts to ids.
* ``vocabulary``: comparison of tokenizers by content; ids outside the tokenizer are masked.
* ``end_tokens``: ids that end a response, and those that are one outcome.
* ``causality``: check that a model does not attend to later tokens.
* ``taps``, ``routers``: states of layers and router logits, taken in a forward pass.
* ``projectors``: maps from the student's hidden states to the teacher's.
* ``reading``: hidden states at loss positions, from packed or padded rows. ``grouping`` measures
  which rows may share a pass, ``packing`` whether packed rows are kept apart.
* ``pair``: the tokenizer that a student and its teacher share; ``pair_images``: their processors.
* ``merging``: adapters merged into their base layers.
* ``recompute``: gradient checkpointing, also of a teacher in eval mode.
* ``shrinking``: a student that is a part of its teacher.
* ``blocks``: the layers that a model repeats; torch.compile on them.
* ``causal_lm``: hidden states at the head's input, and the head as a function of positions.
"""

from okd_lightning.models.adapters import GivenPair, add_adapter
from okd_lightning.models.blocks import compile_blocks
from okd_lightning.models.causal_lm import LMHead, head_inputs
from okd_lightning.models.causality import check_causal
from okd_lightning.models.end_tokens import (
    EndTokens,
    EndTokensArgument,
    eos_token_ids,
    find_end_tokens,
)
from okd_lightning.models.grouping import forget_lengths
from okd_lightning.models.lengths import check_lengths, max_positions
from okd_lightning.models.loading import (
    DTypeName,
    check_precision,
    dtype_of,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
)
from okd_lightning.models.merging import merge_adapters, merged_copy
from okd_lightning.models.multimodal import freeze_vision, reads_images
from okd_lightning.models.packing import packs_rows, reads_packed_rows
from okd_lightning.models.pair import (
    check_pair,
    find_tokenizer,
    load_checked,
    vocabulary_of,
)
from okd_lightning.models.pair_images import PairImages, find_images
from okd_lightning.models.projectors import (
    LayerPair,
    Projectors,
    check_layers,
    projectors_for,
)
from okd_lightning.models.reading import hidden_at_loss, row_groups, say_row_groups
from okd_lightning.models.recompute import recompute_activations
from okd_lightning.models.sources import ModelArgument, ModelSource
from okd_lightning.models.vocabulary import (
    Vocabulary,
    check_vocabulary_agreement,
    probe_texts,
)

__all__ = [
    "DTypeName",
    "EndTokens",
    "EndTokensArgument",
    "GivenPair",
    "LMHead",
    "LayerPair",
    "ModelArgument",
    "ModelSource",
    "PairImages",
    "Projectors",
    "Vocabulary",
    "add_adapter",
    "check_causal",
    "check_layers",
    "check_lengths",
    "check_pair",
    "check_precision",
    "check_vocabulary_agreement",
    "compile_blocks",
    "dtype_of",
    "eos_token_ids",
    "find_end_tokens",
    "find_images",
    "find_tokenizer",
    "forget_lengths",
    "freeze_vision",
    "head_inputs",
    "hidden_at_loss",
    "load_causal_lm",
    "load_checked",
    "load_model_config",
    "load_tokenizer",
    "max_positions",
    "merge_adapters",
    "merged_copy",
    "packs_rows",
    "probe_texts",
    "projectors_for",
    "reads_images",
    "reads_packed_rows",
    "recompute_activations",
    "row_groups",
    "say_row_groups",
    "vocabulary_of",
]
