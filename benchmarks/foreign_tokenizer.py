"""Teachers with another tokenizer: nats per byte from the teacher, against SFT, ULD and GOLD.

The forward KL to the teacher is estimated on texts that the teacher generates from held-out
prompts: the mean of log q - log p of the teacher's own tokens and of the student's, in nats per
byte. Every method trains for equal CPU seconds on texts of the teacher. The pairs:

* ``bpe``: stories260K (512 tokens) teaches a small model with a 1,000-token byte-level BPE, both
  made here and warmed by SFT;
* ``babyllama``: stories260K teaches a model of characters;
* ``smollm2``, ``gemma``: Gemma 3 270M teaches SmolLM2-135M-Instruct, and the reverse; they need
  ``--real FOLDER`` with both.

Finished runs are kept in the JSON file and not repeated; do not run two at once.

    python benchmarks/foreign_tokenizer.py --shared FOLDER --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from foreign_contenders import Contender
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
from okd_lightning.callbacks import KD, OKD, SFT, DistillationCallback, OPDPlus
from okd_lightning.data import RolloutDataModule
from okd_lightning.models import Vocabulary, find_end_tokens
from okd_lightning.models.retokenization import Retokenizer, TextLoss
from okd_lightning.models.token_bytes import TokenBytes
from okd_lightning.records.batches import TrainingRow
from okd_lightning.records.requests import PromptBatch, Request
from okd_lightning.rollouts import NoiseStream, Sampling, TransformersEngine
from okd_lightning.teachers import ForeignTeacher

RESULTS = Path(__file__).parent / "results" / "foreign_tokenizer.json"
WARM_UP = 10
"""Optimizer steps of rising learning rate."""


@dataclass(frozen=True)
class Pair:
    """A student and its teacher.

    Attributes:
        teacher: Folder.
        student: Folder; empty for the model with a tokenizer made here.
        learning_rate: Of AdamW, constant.
        seconds: CPU seconds of a run.
        rows: Responses per optimizer step.
        response: Longest response, in tokens of the student.
        text: Longest text of the teacher, in its tokens; the student's responses are shorter.
        num_train: Texts to train on.
        num_test: Texts to measure on.
        warm_steps: Optimizer steps of SFT before all runs, so that every machine has one start.
    """

    teacher: str
    student: str
    learning_rate: float
    seconds: float
    rows: int
    response: int
    text: int
    num_train: int
    num_test: int
    warm_steps: int = 0


def pairs(shared: Path, real: Path) -> dict[str, Pair]:
    """Return all pairs by name."""
    stories, letters = str(shared / "models/stories260K"), str(shared / "models/babyllama-tok105")
    smollm2, gemma = str(real / "smollm2-135m-instruct"), str(real / "gemma-3-270m")
    return {
        "bpe": Pair(stories, "", 1e-3, 8.0, 16, 40, 64, 1500, 64, 275),
        "babyllama": Pair(stories, letters, 1e-5, 12.0, 8, 110, 64, 1500, 64),
        "smollm2": Pair(gemma, smollm2, 1e-5, 40.0, 4, 24, 32, 40, 12),
        "gemma": Pair(smollm2, gemma, 1e-5, 60.0, 4, 24, 32, 40, 12),
    }


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        make: Makes the method; None for a loss of TRL.
        loss: The ForeignTeacher's loss; None for a run without it.
        trl: Name of TRL's loss, and weights of the cross-entropy and of the loss.
    """

    make: Callable[[], DistillationCallback] = KD
    loss: TextLoss | None = "chunk"
    trl: tuple[str, float, float] | None = None


def half() -> KD:
    """Return KD with as much cross-entropy."""
    return KD(cross_entropy_weight=0.5)


WAYS = {
    "SFT": Way(SFT, None),
    "chunk": Way(KD, "chunk"),
    "text": Way(KD, "text"),
    "next_byte": Way(KD, "next_byte"),
    "shared_tokens": Way(KD, "shared_tokens"),
    "chunk, 0.5 CE": Way(half, "chunk"),
    "text, 0.5 CE": Way(half, "text"),
    "next_byte, 0.5 CE": Way(half, "next_byte"),
    "shared_tokens, 0.5 CE": Way(half, "shared_tokens"),
    "ULD": Way(trl=("ULD", 0.0, 1.0)),
    "ULD 1.5, 1 CE": Way(trl=("ULD", 1.0, 1.5)),
    "GOLD": Way(trl=("GOLD", 0.0, 1.0)),
    "GOLD, 0.5 CE": Way(trl=("GOLD", 0.5, 0.5)),
    "GOLD, bayesian": Way(trl=("GOLD, bayesian", 0.0, 1.0)),
    "GOLD, bayesian, 0.5 CE": Way(trl=("GOLD, bayesian", 0.5, 0.5)),
    "OKD": Way(OKD, "chunk"),
    "OPD+": Way(OPDPlus, "chunk"),
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
    """One pair: its texts, and runs of its student.

    Args:
        name: The pair's name.
        pair: The pair.
        shared: Folder with datasets/.
        work: Folder for texts and students, which are kept.
    """

    def __init__(self, name: str, pair: Pair, shared: Path, work: Path) -> None:
        self.name, self.pair, self.work = name, pair, work
        self.tokenizer = AutoTokenizer.from_pretrained(pair.teacher)
        self.teacher = AutoModelForCausalLM.from_pretrained(pair.teacher, dtype="float32").eval()
        rows = {part: _rows(shared, part) for part in ("train", "val")}
        self.train = self._texts([row["prompt"] for row in rows["train"]][: pair.num_train], 1)
        self.test = self._texts([row["prompt"] for row in rows["val"]][: pair.num_test], 2)
        self._of_teacher: dict[int, torch.Tensor] = {}
        self.start = pair.student or self._made(
            [row["prompt"] + row["response"] for row in rows["train"]]
        )

    def _texts(self, prompts: list[str], seed: int) -> list[dict[str, Any]]:
        """Return the teacher's responses as rows with their ids, generated once."""
        stored = self.work / f"{Path(self.pair.teacher).name} {seed} {len(prompts)}.json"
        if stored.exists():
            return list(json.loads(stored.read_text()))
        ids = [tuple(self.tokenizer(prompt)["input_ids"]) for prompt in prompts]
        ends = find_end_tokens(self.pair.teacher, (), self.tokenizer, Vocabulary.of(self.tokenizer))
        engine = TransformersEngine(self.teacher, Vocabulary.of(self.tokenizer), ends.end_ids)
        asked = PromptBatch(ids, range(len(ids)), [0] * len(ids))
        with torch.no_grad():
            found = engine.respond(Request(asked, Sampling(), NoiseStream(seed, 0), self.pair.text))
        pieces = TokenBytes(self.tokenizer, "--model.teacher").pieces
        rows = [
            {
                "prompt": prompt,
                "response": b"".join(pieces[i] or b"" for i in one.ids).decode(errors="ignore"),
                "prompt_ids": own,
                "ids": one.ids,
                "ends": ends.end_ids,
            }
            for prompt, own, one in zip(prompts, ids, found, strict=True)
        ]
        stored.write_text(json.dumps([row for row in rows if str(row["response"]).strip()]))
        return self._texts(prompts, seed)

    def _made(self, texts: list[str]) -> str:
        """Return the folder of a small model with its own tokenizer, after SFT; made once."""
        folder = self.work / self.name
        if not folder.exists():
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
            fresh = self.work / f"{self.name} fresh"
            LlamaForCausalLM(config).save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            way = WAYS["SFT"]
            module, _ = self.run(str(fresh), way, 0, math.inf, 3e-3, self.pair.warm_steps)
            assert module.student is not None
            module.student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return str(folder)

    def run(
        self,
        student: str,
        way: Way,
        seed: int,
        seconds: float,
        learning_rate: float,
        max_steps: int = -1,
    ) -> tuple[DistillationModule, int]:
        """Train for some seconds, or some steps; return the module and its steps."""
        lightning.seed_everything(seed, verbose=False)
        teacher = None
        if way.loss is not None:
            teacher = ForeignTeacher(self.pair.teacher, loss=way.loss)
        make = DistillationModule if way.trl is None else Contender
        module = make(
            student, teacher, learning_rate=learning_rate, dtype="float32", warmup_steps=WARM_UP
        )
        if way.trl is not None:
            assert isinstance(module, Contender)
            module.use(*way.trl)
        clock = Clock(seconds)
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1000,
            max_steps=max_steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            default_root_dir=self.work,
            callbacks=[way.make(), clock],
        )
        data = RolloutDataModule(
            [{name: row[name] for name in ("prompt", "response")} for row in self.train],
            batch_size=self.pair.rows,
            max_prompt_length=110,
            max_response_length=self.pair.response,
            seed=seed,
        )
        trainer.fit(module, data)
        return module, clock.steps

    def nats_per_byte(self, student: Any, tokenizer: Any) -> float:
        """Estimate KL(teacher‖student) on the teacher's held-out texts, in nats per byte."""
        made = Retokenizer(self.tokenizer, tokenizer, tokenizer.eos_token_id, len(tokenizer), 512)
        pieces = TokenBytes(self.tokenizer, "--model.teacher").pieces
        total, num_bytes = 0.0, 0
        for number, row in enumerate(self.test):
            prompt, ids = tuple(row["prompt_ids"]), tuple(row["ids"])
            own_prompt = tuple(tokenizer(row["prompt"])["input_ids"])
            mask = (False,) * len(prompt) + (True,) * len(ids)
            given = TrainingRow(
                0, "dataset", prompt + ids, mask, len(prompt), teacher_prompt_ids=own_prompt
            )
            aligned = made.row(given, row["ends"]).aligned
            assert aligned is not None
            if number not in self._of_teacher:
                self._of_teacher[number] = _logprobs(self.teacher, prompt + ids, len(prompt))
            other = _logprobs(student, own_prompt + aligned.teacher_ids, len(own_prompt))
            for span in aligned.spans:
                total += float(self._of_teacher[number][slice(*span.student)].sum())
                total -= float(other[slice(*span.teacher)].sum())
                num_bytes += sum(len(pieces[i] or b"") for i in ids[slice(*span.student)])
        return total / num_bytes

    def result(self, label: str, seed: int) -> dict[str, float]:
        """Return the measure after a run, or before all."""
        tokenizer = AutoTokenizer.from_pretrained(self.start)
        if label == "before":
            model = AutoModelForCausalLM.from_pretrained(self.start, dtype="float32")
            return {"nats_per_byte": round(self.nats_per_byte(model.eval(), tokenizer), 5)}
        pair = self.pair
        module, steps = self.run(self.start, WAYS[label], seed, pair.seconds, pair.learning_rate)
        assert module.student is not None
        kl = self.nats_per_byte(module.student.eval(), tokenizer)
        return {"nats_per_byte": round(kl, 5), "steps": steps, "seconds": pair.seconds}


def _rows(shared: Path, part: str) -> list[dict[str, str]]:
    lines = (shared / "datasets" / "tinystories" / f"{part}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@torch.no_grad()
def _logprobs(model: Any, ids: tuple[int, ...], start: int) -> torch.Tensor:
    logits = model(torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
    return logits.gather(-1, torch.tensor(ids[start:])[:, None])[:, 0]


def shown(known: dict[str, Any]) -> Table:
    """Return the table of all runs."""
    table = Table("student", "method", "nats per byte (mean, seeds)", "steps")
    for name in dict.fromkeys(key.split("/")[0] for key in known["runs"]):
        for label in ("before", *WAYS):
            runs = [run for key, run in known["runs"].items() if key.startswith(f"{name}/{label}/")]
            if runs:
                kls = [run["nats_per_byte"] for run in runs]
                cell = f"{sum(kls) / len(kls):.4f}: " + " ".join(f"{kl:.4f}" for kl in kls)
                table.add_row(
                    name, label, cell, " ".join(str(run.get("steps", "")) for run in runs)
                )
    return table


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--real", type=Path, default=Path("real"))
    parser.add_argument("--work", type=Path, default=Path("build/foreign_tokenizer"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", nargs="+", default=["bpe", "babyllama"])
    parser.add_argument("--methods", nargs="+", default=list(WAYS))
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    known["environment"] = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl")},
    }
    made: dict[str, Bench] = {}
    for seed in options.seeds:
        for name in options.pairs:
            for label in ("before", *options.methods):
                key = f"{name}/{label}/{seed if label != 'before' else 0}"
                if key in known["runs"]:
                    continue
                if name not in made:
                    pair = pairs(options.shared, options.real)[name]
                    made[name] = Bench(name, pair, options.shared, options.work)
                known["runs"][key] = made[name].result(label, seed)
                print(key, known["runs"][key], flush=True)
                RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    Console().print(shown(known))


if __name__ == "__main__":
    main()
