"""Models: loading, vocabulary agreement, and a causal LM as (hidden states, head).

* ``loading``: folders, hub ids, configs and adapters become models, with readable errors.
* ``sources``: a folder, a hub id with or without a revision, or a GGUF file.
* ``weight_files``, ``weight_checks``: safetensors that are whole, and models that have them all.
* ``adapter_folders``, ``adapters``: PEFT on disk and in memory.
* ``gguf_files``: models that llama.cpp's format holds.
* ``lengths``: the positions that a model was made for.
* ``vocabulary``: tokenizers are compared by content; ids outside the tokenizer are masked.
* ``causality``: whether a model looks at later tokens.
* ``forward_arguments``: what a forward pass names, and what it would swallow.
* ``grouping``: which rows may share a forward pass.
* ``reading``: hidden states where loss lies, from packed rows or padded ones.
* ``pair``: the tokenizer that a student and its teacher share.
* ``online_module``: a small trainable part on a frozen teacher.
* ``merging``: adapters folded into the layers under them.
* ``recompute``: gradient checkpointing, also of a teacher in eval mode.
* ``teacher_base``: the model that a teacher was trained from.
* ``self_teacher``: the student as its own teacher.
* ``compilation``: torch.compile on a model's blocks.
* ``causal_lm``: hidden states at the head's input, and the head as a function of positions.
"""

from okd_lightning.models.adapters import GivenPair, add_adapter
from okd_lightning.models.causal_lm import LMHead, head_inputs
from okd_lightning.models.causality import check_causal
from okd_lightning.models.compilation import compile_blocks
from okd_lightning.models.grouping import forget_lengths, row_groups, say_row_groups
from okd_lightning.models.lengths import check_lengths, max_positions
from okd_lightning.models.loading import (
    DTypeName,
    ModelArgument,
    ModelSource,
    check_precision,
    dtype_of,
    eos_token_ids,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
)
from okd_lightning.models.merging import merge_adapters, merged_copy
from okd_lightning.models.online_module import (
    OnlineModuleSettings,
    WithinContext,
    attach_online_module,
    base_teacher,
    check_online_module,
)
from okd_lightning.models.pair import check_pair, find_tokenizer, load_checked
from okd_lightning.models.reading import hidden_at_loss, packs_rows, reads_packed_rows
from okd_lightning.models.recompute import recompute_activations
from okd_lightning.models.self_teacher import (
    DEFAULT_EMA_DECAY,
    SelfTeacher,
    check_self_teacher,
    detached,
    follow,
    in_eval_mode,
    teacher_copy,
)
from okd_lightning.models.teacher_base import TeacherBase
from okd_lightning.models.vocabulary import (
    Vocabulary,
    check_vocabulary_agreement,
    probe_texts,
)

__all__ = [
    "DEFAULT_EMA_DECAY",
    "DTypeName",
    "GivenPair",
    "LMHead",
    "ModelArgument",
    "ModelSource",
    "OnlineModuleSettings",
    "SelfTeacher",
    "TeacherBase",
    "Vocabulary",
    "WithinContext",
    "add_adapter",
    "attach_online_module",
    "base_teacher",
    "check_causal",
    "check_lengths",
    "check_online_module",
    "check_pair",
    "check_precision",
    "check_self_teacher",
    "check_vocabulary_agreement",
    "compile_blocks",
    "detached",
    "dtype_of",
    "eos_token_ids",
    "find_tokenizer",
    "follow",
    "forget_lengths",
    "head_inputs",
    "hidden_at_loss",
    "in_eval_mode",
    "load_causal_lm",
    "load_checked",
    "load_model_config",
    "load_tokenizer",
    "max_positions",
    "merge_adapters",
    "merged_copy",
    "packs_rows",
    "probe_texts",
    "reads_packed_rows",
    "recompute_activations",
    "row_groups",
    "say_row_groups",
    "teacher_copy",
]
