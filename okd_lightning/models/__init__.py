"""Models: loading, vocabulary agreement, and a causal LM as (hidden states, head).

* ``loading``: folders, hub ids, configs and adapters become models, with readable errors.
* ``vocabulary``: tokenizers are compared by content; ids outside the tokenizer are masked.
* ``causality``: whether a model looks at later tokens.
* ``pair``: the tokenizer that a student and its teacher share.
* ``online_module``: a small trainable part on a frozen teacher.
* ``merging``: adapters folded into the layers under them.
* ``recompute``: gradient checkpointing, also of a teacher in eval mode.
* ``self_teacher``: the student as its own teacher.
* ``causal_lm``: hidden states at the head's input, and the head as a function of positions.
"""

from okd_lightning.models.causal_lm import LMHead, head_inputs, max_positions
from okd_lightning.models.causality import check_causal
from okd_lightning.models.lengths import check_lengths
from okd_lightning.models.loading import (
    DTypeName,
    ModelArgument,
    ModelSource,
    add_adapter,
    eos_token_ids,
    load_causal_lm,
    load_model_config,
    load_tokenizer,
)
from okd_lightning.models.merging import merge_adapters
from okd_lightning.models.online_module import (
    OnlineModuleSettings,
    WithinContext,
    attach_online_module,
    base_teacher,
)
from okd_lightning.models.pair import check_pair, find_tokenizer
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
from okd_lightning.models.vocabulary import Vocabulary, check_vocabulary_agreement

__all__ = [
    "DEFAULT_EMA_DECAY",
    "DTypeName",
    "LMHead",
    "ModelArgument",
    "ModelSource",
    "OnlineModuleSettings",
    "SelfTeacher",
    "Vocabulary",
    "WithinContext",
    "add_adapter",
    "attach_online_module",
    "base_teacher",
    "check_causal",
    "check_lengths",
    "check_pair",
    "check_self_teacher",
    "check_vocabulary_agreement",
    "detached",
    "eos_token_ids",
    "find_tokenizer",
    "follow",
    "head_inputs",
    "in_eval_mode",
    "load_causal_lm",
    "load_model_config",
    "load_tokenizer",
    "max_positions",
    "merge_adapters",
    "recompute_activations",
    "teacher_copy",
]
