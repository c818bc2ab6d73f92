"""End-of-response ids of a dataset, and ids that only hand over to a tool or another turn.

An id after which a response goes on hands over to a tool or another turn (Llama 3's
``<|eom_id|>``, GLM-4's ``<|observation|>``). Generation stops there, but it is another outcome than
the end of a response.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from okd_lightning.data.distilled_module import DistilledPair
from okd_lightning.data.examples import ExampleSet
from okd_lightning.data.template_process import TemplateProcess
from okd_lightning.errors import DataError
from okd_lightning.records.batches import Example

_ANSWER, _NEXT = "okd answer", "okd question"
"""Texts of a probe chat: its one complete response, and the message after it."""


def handed_over(examples: Iterable[Example], end_ids: Collection[int]) -> list[int]:
    """Return the end ids that occur in a row's learned tokens before another end id closes them.

    Earlier assistant turns count too: they hand over to tools or users. An id that also ends the
    response is not returned.

    Args:
        examples: Tokenized rows.
        end_ids: Ids that would be one outcome; with a single one nothing is looked for.
    """
    ends, found = set(end_ids), set[int]()
    if len(ends) < 2:
        return []
    for example in examples:
        last = example.response_ids[-1] if example.response_ids else None
        if last not in ends:
            continue
        held = ends.intersection(example.response_ids[:-1])
        if any(example.prompt_mask):
            learned = zip(example.prompt_ids, example.prompt_mask, strict=True)
            held |= ends.intersection(token for token, carries_loss in learned if carries_loss)
        found |= held - {last}
    return sorted(found)


def written_elsewhere(
    tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int], settings: Mapping[str, Any]
) -> list[int]:
    """Return the end ids that the chat template writes, but not after a plain response.

    Args:
        tokenizer: The run's.
        end_ids: Ids that would be one outcome; with a single one nothing is looked for.
        settings: Further arguments of the template.
    """
    template = str(getattr(tokenizer, "chat_template", None) or "")
    texts = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in end_ids}
    named = [i for i, text in texts.items() if text in template]
    if len(end_ids) < 2 or not named:
        return []
    asked = {"role": "user", "content": "x"}
    answered = [asked, {"role": "assistant", "content": _ANSWER}]
    chats = [answered, [*answered, {"role": "user", "content": _NEXT}]]
    process = TemplateProcess(tokenizer)
    try:
        rendered = process.render([(chat, settings) for chat in chats], "the chat template")
    except DataError:  # it renders other chats only; the data's rows show what it writes
        return []
    finally:
        process.close()
    behind = [text.rpartition(_ANSWER)[2].partition(_NEXT)[0] for text in rendered]
    return [i for i in named if not any(texts[i] in text for text in behind)]


def adopt_ends(pair: DistilledPair, found: ExampleSet, settings: Mapping[str, Any]) -> None:
    """Set a pair's end ids to those that end the responses of a dataset.

    Generation also stops where the dataset's turns end. Ids that a response holds before another
    end, or that the chat template writes elsewhere, are no longer ends of a response.

    Args:
        pair: The models, which are changed.
        found: The tokenized rows.
        settings: Further arguments of the chat template.
    """
    pair.add_eos_ids(found.ends_of_turn(pair.tokenizer))
    ends = pair.vocabulary.end_ids
    pair.keep_apart(
        [*written_elsewhere(pair.tokenizer, ends, settings), *handed_over(found.examples, ends)]
    )
