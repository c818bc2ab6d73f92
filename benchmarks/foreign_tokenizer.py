"""Teachers with another tokenizer: nats per byte from the teacher, against SFT on its texts.

The teacher stories260K (512 tokens) teaches two students: ``bpe``, a small model with a 1,000-token
byte-level BPE, both made here and warmed by SFT, and ``babyllama``, a model of characters. The
forward KL to the teacher is estimated on texts that the teacher generates from held-out prompts:
the mean of log q - log p of the teacher's own tokens and of the student's, in nats per byte. Every
method trains for equal CPU seconds on texts of the teacher; OPD+ and GKD generate their own.
Finished runs are kept in the JSON file and not repeated; do not run two at once.

    python benchmarks/foreign_tokenizer.py --shared FOLDER --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from okd_lightning import DistillationModule
from okd_lightning.callbacks import GKD, KD, OKD, SFT, DistillationCallback, OPDPlus
from okd_lightning.data import RolloutDataModule
from okd_lightning.divergences import ReverseKL
from okd_lightning.models import Vocabulary
from okd_lightning.models.retokenization import Retokenizer
from okd_lightning.models.token_bytes import TokenBytes
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.requests import PromptBatch, Request
from okd_lightning.rollouts import NoiseStream, Sampling, TransformersEngine
from okd_lightning.teachers import ForeignTeacher

RESULTS = Path(__file__).parent / "results" / "foreign_tokenizer.json"
NUM_TRAIN, NUM_TEST, LONGEST, ROWS = 1500, 64, 48, 16
SECONDS, WARM_SECONDS = 10.0, 20.0
LEARNING_RATES = {"bpe": 1e-3, "babyllama": 1e-4}
METHODS = {
    "SFT": (SFT, "chunk"),
    "KD, chunk": (KD, "chunk"),
    "KD, text": (KD, "text"),
    "KD, next_byte": (KD, "next_byte"),
    "KD, text, 0.5 CE": (lambda: KD(cross_entropy_weight=0.5), "text"),
    "OKD, chunk": (OKD, "chunk"),
    "OPD+, reverse KL": (OPDPlus, "chunk"),
    "GKD, reverse KL, text": (lambda: GKD(divergence=ReverseKL(), on_policy_fraction=1.0), "text"),
}


class Clock(Callback):
    """End the run after some CPU seconds of training, setup excluded."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.steps, self.start = seconds, 0, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin."""
        self.start = time.process_time()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Stop where the time is over."""
        self.steps = trainer.global_step
        trainer.should_stop = time.process_time() - self.start > self.seconds


def byte_level_tokenizer(texts: list[str], size: int = 1000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


class Bench:
    """The models, the teacher's texts, and runs of both students.

    Args:
        shared: Folder with models/ and datasets/.
        root: Folder for the students and the Trainer.
    """

    def __init__(self, shared: Path, root: Path) -> None:
        self.root, self.path = root, shared / "models" / "stories260K"
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.teacher = AutoModelForCausalLM.from_pretrained(self.path).eval()
        rows = {part: self._rows(shared, part) for part in ("train", "val")}
        self.train = self._answers([row["prompt"] for row in rows["train"]][:NUM_TRAIN], 1)
        self.test = self._answers([row["prompt"] for row in rows["val"]][:NUM_TEST], 2)
        texts = [row["prompt"] + row["response"] for row in rows["train"]]
        self.students = {"bpe": self._fresh(texts), "babyllama": self._characters(shared)}

    @staticmethod
    def _rows(shared: Path, part: str) -> list[dict[str, str]]:
        lines = (shared / "datasets" / "tinystories" / f"{part}.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _answers(self, prompts: list[str], seed: int) -> list[dict[str, str]]:
        """Return the teacher's responses as rows; its line breaks are kept."""
        ids = [tuple(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        engine = TransformersEngine(self.teacher, Vocabulary.of(self.tokenizer), (1, 2))
        asked = PromptBatch(ids, range(len(ids)), [0] * len(ids))
        request = Request(asked, Sampling(), NoiseStream(seed, 0), LONGEST)
        with torch.no_grad():
            found = engine.respond(request)
        texts = [_bytes(self.tokenizer, one.ids).decode(errors="ignore") for one in found]
        return [
            {"prompt": prompt, "response": text}
            for prompt, text in zip(prompts, texts, strict=True)
            if text.strip()
        ]

    def _fresh(self, texts: list[str]) -> str:
        tokenizer = byte_level_tokenizer(texts)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        return self._saved("bpe", LlamaForCausalLM(config), tokenizer)

    def _characters(self, shared: Path) -> str:
        return str(shared / "models" / "babyllama-tok105")

    def _saved(self, name: str, model: Any, tokenizer: Any) -> str:
        folder = self.root / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def warmed(self, name: str) -> str:
        """Return a student after SFT on the dataset-like texts of the teacher, made once."""
        folder = self.root / f"{name} warm"
        if name == "bpe" and not folder.exists():
            module, _ = self.run(self.students[name], SFT(), None, 0, WARM_SECONDS, 3e-3)
            module.student.save_pretrained(folder)
            module.tokenizer.save_pretrained(folder)
        return str(folder) if folder.exists() else self.students[name]

    def run(
        self,
        student: str,
        method: DistillationCallback,
        loss: str | None,
        seed: int,
        seconds: float,
        learning_rate: float = 1e-3,
    ) -> tuple[DistillationModule, int]:
        """Train for some seconds; return the module and its steps."""
        lightning.seed_everything(seed, verbose=False)
        teacher = None if loss is None else ForeignTeacher(str(self.path), loss=loss)
        module = DistillationModule(student, teacher, learning_rate=learning_rate)
        clock = Clock(seconds)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1000,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            default_root_dir=self.root,
            callbacks=[method, clock],
        )
        data = RolloutDataModule(
            self.train,
            batch_size=ROWS,
            max_prompt_length=110,
            max_response_length=144 if "baby" in student else LONGEST,
            seed=seed,
        )
        trainer.fit(module, data)
        return module, clock.steps

    def nats_per_byte(self, student: Any, tokenizer: Any) -> float:
        """Estimate KL(teacher‖student) on the teacher's held-out texts, in nats per byte."""
        own_end = tokenizer.eos_token_id
        made = Retokenizer(self.tokenizer, tokenizer, own_end, len(tokenizer), 512)
        total, num_bytes = 0.0, 0
        for row in self.test:
            prompt = tuple(self.tokenizer(row["prompt"])["input_ids"])
            both = self.tokenizer(row["prompt"] + row["response"])["input_ids"]
            ids = tuple(both[len(prompt) :])
            own_prompt = tuple(tokenizer(row["prompt"])["input_ids"])
            mask = (False,) * len(prompt) + (True,) * len(ids)
            given = TrainingRow(
                0, "dataset", prompt + ids, mask, len(prompt), teacher_prompt_ids=own_prompt
            )
            found = made.row(given, (1, 2))
            spans = found.aligned.spans
            teacher = _logprobs(self.teacher, prompt + ids, len(prompt))
            other = _logprobs(student, own_prompt + found.aligned.teacher_ids, len(own_prompt))
            for span in spans:
                total += float(teacher[slice(*span.student)].sum())
                total -= float(other[slice(*span.teacher)].sum())
                num_bytes += len(_bytes(self.tokenizer, ids[slice(*span.student)]))
        return total / num_bytes


def _bytes(tokenizer: Any, ids: Any) -> bytes:
    pieces = TokenBytes(tokenizer, "--model.teacher").pieces
    return b"".join(pieces[i] or b"" for i in ids)


@torch.no_grad()
def _logprobs(model: Any, ids: tuple[int, ...], start: int) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--students", nargs="+", default=["bpe", "babyllama"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seconds", type=float, default=SECONDS)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    known["environment"] = {
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.shared, Path(folder))
        for seed in options.seeds:
            for name in options.students:
                start = bench.warmed(name)
                for label in ("before", *options.methods):
                    key = f"{name}/{label}/{seed if label != 'before' else 0}"
                    if key in known["runs"]:
                        continue
                    steps = 0
                    tokenizer = AutoTokenizer.from_pretrained(start)
                    if label == "before":
                        model = AutoModelForCausalLM.from_pretrained(start)
                    else:
                        make, loss = METHODS[label]
                        own = None if label == "SFT" else loss
                        rate = LEARNING_RATES[name]
                        module, steps = bench.run(start, make(), own, seed, options.seconds, rate)
                        model = module.student
                    kl = bench.nats_per_byte(model.eval(), tokenizer)
                    own = {"steps": steps, "seconds": options.seconds if steps else 0}
                    known["runs"][key] = {"nats_per_byte": round(kl, 5), **own}
                    print(key, known["runs"][key], flush=True)
                    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    table = Table("student", "method", "nats per byte (seeds)", "steps")
    for name in options.students:
        for label in ("before", *METHODS):
            runs = [run for key, run in known["runs"].items() if key.startswith(f"{name}/{label}/")]
            if runs:
                kls = " ".join(f"{run['nats_per_byte']:.4f}" for run in runs)
                table.add_row(name, label, kls, str(runs[0]["steps"]))
    Console().print(table)


if __name__ == "__main__":
    main()
