"""Exports as models of lm-evaluation-harness, read as in training: ``--model okd_lightning``.

A plain export also works with the harness's own ``--model hf``. Differences here: prompt and answer
are tokenized as in training (no token crosses the boundary between them); ids that the tokenizer
does not know get no probability, because training ignores them; and an adapter's folder can be
given directly. Log-likelihoods are then those that training and ``okd-lightning test`` measure.
Extra: ``lm-eval``. The harness has no plug-ins, so its command line is started from here:

    python -m okd_lightning.commands.lm_eval_adapter run --model okd_lightning \
        --model_args pretrained=student --tasks gsm8k
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from okd_lightning.bounded_files import read_json_object
from okd_lightning.data.template_process import TemplateProcess
from okd_lightning.errors import DataError, ModelError
from okd_lightning.models import Vocabulary
from okd_lightning.models.text_ids import TextEncoder


def _base_of(folder: str) -> str | None:
    """Return the base model of an adapter's folder; None for a folder that holds a whole model."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    config = read_json_object(path, ModelError, f"{path}: cannot be read")
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"{folder} holds an adapter and does not name its base model; export it merged "
            "(okd-lightning export --adapter merged)"
        )
    return str(base)


@register_model("okd_lightning")
class ExportedLM(HFLM):
    """A student's export (or an adapter's folder) as a model of lm-evaluation-harness.

    Args:
        pretrained: Folder that ``okd-lightning export`` has written.
        **settings: HFLM's, such as dtype, device and batch_size.

    Raises:
        ModelError: An adapter that does not name its base model.
    """

    def __init__(self, pretrained: str, **settings: Any) -> None:
        base = _base_of(pretrained)
        if base is not None:
            settings = {"peft": pretrained, "tokenizer": pretrained, **settings}
        self._reads_chats = False
        self._templates: TemplateProcess | None = None
        super().__init__(base or pretrained, backend="causal", **settings)
        self._vocabulary = Vocabulary.of(self.tokenizer)
        self._encoder = TextEncoder(self.tokenizer)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat as the harness does, with training's limits of time and memory.

        If the template refuses the chat, it is rendered again without its system prompt. From then
        on the template adds the bos.

        Raises:
            DataError: The template refuses the chat, loops, or needs too much memory.
        """
        self._reads_chats = True
        settings = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            **self.chat_template_args,
        }
        if self._templates is None:
            self._templates = TemplateProcess(self.tokenizer)
        what = "the chat template"
        try:
            return self._templates.render([(chat_history, settings)], what)[0]
        except DataError:
            plain = [message for message in chat_history if message["role"] != "system"]
            if len(plain) == len(chat_history):
                raise
        return self._templates.render([(plain, settings)], what)[0]

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **settings: Any,
    ) -> list[int]:
        """Return a prompt's ids: a plain prompt with the tokenizer's bos, and no closing id."""
        if add_special_tokens is not None or self.add_bos_token is not None:
            limit = left_truncate_len
            return list(super().tok_encode(string, add_special_tokens, limit, **settings))
        (ids,) = self._encoder.prompts([string], is_rendered=self._reads_chats)
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return [batch, seq] ids and attention mask of prompts."""
        del truncation  # left_truncate_len is below the model's length
        ids = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
        padded = self.tokenizer.pad(
            {"input_ids": ids}, padding_side=padding_side, return_tensors="pt"
        )
        return padded["input_ids"], padded["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode prompt and answer as training rows; spaces at the boundary are kept."""
        (answer,) = self._encoder.continuations([context], [continuation])
        return self.tok_encode(context), answer

    def _model_call(self, inps: Tensor, *args: Any, **settings: Any) -> Tensor:
        """Return the logits of the ids that the tokenizer knows: [batch, seq, vocab]."""
        return self._vocabulary.cut(super()._model_call(inps, *args, **settings))

    def _model_generate(self, *args: Any, **settings: Any) -> Tensor:
        """Generate as the harness does, without ids that the tokenizer does not know."""
        rows = self.model.get_output_embeddings().weight.shape[0]
        unknown = [*self._vocabulary.invalid_ids, *range(self._vocabulary.size, rows)]
        if unknown:
            settings["suppress_tokens"] = unknown
        return super()._model_generate(*args, **settings)


if __name__ == "__main__":
    cli_evaluate()
