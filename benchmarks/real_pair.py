"""A real pair for the step benchmarks: folders of student and teacher, and GSM8K's chats as ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

BATCH = 4


@dataclass(frozen=True)
class RealPair:
    """Folders of models with one tokenizer and a chat template, and of the dataset.

    Attributes:
        student: Folder of the student.
        teacher: Folder of the teacher.
        shared: Folder that holds data/datasets/gsm8k.
    """

    student: str
    teacher: str
    shared: str

    def model(self, role: str) -> PreTrainedModel:
        """Return student or teacher in float32."""
        folder = self.student if role == "student" else self.teacher
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer."""
        return AutoTokenizer.from_pretrained(self.teacher)

    def rows(self) -> list[dict[str, str]]:
        """Return the questions and answers of one batch: all contenders have the same in a step."""
        path = Path(self.shared) / "data/datasets/gsm8k/train.jsonl"
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()[:BATCH]]

    def token_rows(self) -> list[dict[str, Any]]:
        """Return the chats as ids with the length of their prompts, for a loop that reads ids."""
        tokenizer, found = self.tokenizer, []
        for row in self.rows():
            chat = [{"role": "user", "content": row["question"]}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            prompt, answer = (
                tokenizer(part, add_special_tokens=False).input_ids
                for part in (text, row["answer"])
            )
            ids = [*prompt, *answer, tokenizer.eos_token_id]
            found.append({"input_ids": ids, "prompt_length": len(prompt)})
        return found
