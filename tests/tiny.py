"""Models, tokenizers and data that are small enough for every test; spawned ones import it too.

Both tiny models have more embedding rows than the tokenizer has ids, and different numbers of them,
so that every test of the core runs over vocabulary padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from okd_lightning.callbacks import DistillationCallback
from okd_lightning.data import RolloutDataModule
from okd_lightning.records.batches import SOURCES, DistillBatch
from okd_lightning.training.module import DistillationModule

PAD, EOS, BOS = 0, 1, 2
LETTERS = "abcdefghijklmnop"
NUM_IDS = 3 + len(LETTERS)
STUDENT_ROWS, TEACHER_ROWS = NUM_IDS + 3, NUM_IDS + 8


def make_tokenizer(letters: str = LETTERS, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one id per letter, after <pad>, <eos> and <bos>."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<eos>" if pad_is_eos else "<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )


def make_llama(seed: int, rows: int = STUDENT_ROWS, **overrides: Any) -> PreTrainedModel:
    """Return a Llama of two layers and width 32, with garbage rows beyond the tokenizer."""
    fields = {
        "vocab_size": rows,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**fields, **overrides}))
        _spoil_padding(model)
    return model.eval()


def make_gpt2(seed: int, rows: int = STUDENT_ROWS, **overrides: Any) -> PreTrainedModel:
    """GPT-2 with dropout, tied embeddings and learned positions."""
    fields = {
        "vocab_size": rows,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**{**fields, **overrides}))
        _spoil_padding(model)
    return model.eval()


def _spoil_padding(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[NUM_IDS:] = 3 * torch.randn_like(module.weight[NUM_IDS:])


def make_rows(num: int, seed: int = 0, longest: int = 6) -> list[dict[str, str]]:
    """Prompts of 1 to ``longest`` letters with responses of 1 to ``longest``."""
    generator = torch.Generator().manual_seed(seed)

    def text() -> str:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return "".join(
            LETTERS[i] for i in torch.randint(len(LETTERS), (length,), generator=generator)
        )

    return [{"prompt": text(), "response": text()} for _ in range(num)]


def make_trainer(root: Path, callbacks: Sequence[Callback] = (), **settings: Any):
    """A quiet CPU Trainer."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": root,
        "max_epochs": 1,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


class Recorder(Callback):
    """Callback that records a run: batches by optimizer step, losses, gradients, sources."""

    def __init__(self) -> None:
        self.steps: list[list[DistillBatch]] = []
        self.losses: list[dict[str, float]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.steps.append([])
        self.steps[-1].append(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            logged = trainer.callback_metrics
            self.losses.append({n: float(v) for n, v in logged.items() if n.startswith("train/")})

    def rows(self, step: int) -> list[tuple[list[int], list[bool], int]]:
        """(ids, mask, source) of every row of an optimizer step, without padding."""
        found = []
        for batch in self.steps[step]:
            for i, length in enumerate(batch.lengths.tolist()):
                ids, mask = batch.input_ids[i, :length], batch.mask[i, :length]
                found.append((ids.tolist(), mask.tolist(), int(batch.source[i])))
        return found

    def token_share(self, step: int, source: int = 1) -> float:
        """Tokens of a source in a step over what their sum is divided by (1 but for samples)."""
        batch = self.steps[step][0]
        if SOURCES[source] != "student" or not batch.sampled.rollouts:
            return 1.0
        return batch.step_counts[source] / (batch.sampled.rollouts * batch.sampled.mean_tokens)

    def sources(self) -> list[set[int]]:
        """The sources of each optimizer step's rows that carry loss."""
        return [
            {source for _, mask, source in self.rows(i) if any(mask)}
            for i in range(len(self.steps))
        ]


def fit(
    root: Path,
    module: DistillationModule,
    methods: Sequence[DistillationCallback],
    rows: list[dict[str, str]],
    *,
    val: list[dict[str, str]] | None = None,
    callbacks: Sequence[Callback] = (),
    data: dict[str, Any] | None = None,
    ckpt_path: Any = None,
    **settings: Any,
) -> Recorder:
    """Train and return what was recorded."""
    recorder = Recorder()
    trainer = make_trainer(root, [*methods, *callbacks, recorder], **settings)
    options = {
        "batch_size": 4,
        "max_prompt_length": 16,
        "max_response_length": 8,
        "seed": 7,
        "val_rollouts": 0,
        **(data or {}),
    }
    trainer.fit(module, RolloutDataModule(rows, val, **options), ckpt_path=ckpt_path)
    return recorder


def weights(module: DistillationModule) -> dict[str, torch.Tensor]:
    """A copy of all weights of the student."""
    return {n: p.detach().clone() for n, p in module.student.named_parameters()}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of ``b``; NaN where either is NaN."""
    assert a.keys() == b.keys()
    difference = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    return (difference / sum(float(b[n].double().square().sum()) for n in b)) ** 0.5
