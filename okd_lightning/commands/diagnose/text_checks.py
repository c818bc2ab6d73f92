"""Checks of tokenizer, template and data for faults that would silently degrade a run."""

from __future__ import annotations

from collections.abc import Sequence

from okd_lightning.commands.diagnose.findings import Check, Verdict
from okd_lightning.commands.diagnose.responses import Responses
from okd_lightning.data import RolloutDataModule, load_rows
from okd_lightning.data.examples import ExampleSet
from okd_lightning.data.layouts import choose_layout
from okd_lightning.data.row_report import MANY_CUT, PLAIN_PROMPTS, cut_advice
from okd_lightning.data.row_templates import with_prompts
from okd_lightning.data.sources import describe_source
from okd_lightning.data.template_process import TemplateProcess
from okd_lightning.models.text_ids import TextEncoder
from okd_lightning.records.batches import Example
from okd_lightning.training.module import DistillationModule

_MANY_SKIPPED = 0.05
_FEW_END = 0.5


def text_checks(
    module: DistillationModule,
    data: RolloutDataModule,
    part: str,
    found: ExampleSet,
    examples: Sequence[Example],
) -> list[Check]:
    """Return all checks that need no model.

    Args:
        module: A module with its tokenizer.
        data: A data module inside a Trainer.
        part: "train" or "val".
        found: All examples of that part.
        examples: The examples that are checked.
    """
    return [
        _given_ends(data, found),  # first: where most are cut, no other number means much
        _vocabulary(module),
        _round_trip(module, examples),
        _template(module, data, part),
        _lengths(data, found),
    ]


def writing_checks(own: Responses, teachers: Responses, limit: int) -> list[Check]:
    """Check whether both models stop by themselves.

    Args:
        own: The student's responses.
        teachers: The teacher's responses to the same prompts.
        limit: Longest response, in tokens.
    """
    found = []
    for who, responses in (("student", own), ("teacher", teachers)):
        share = sum(responses.ended) / len(responses.ended)
        mean = sum(responses.lengths) / len(responses.lengths)
        verdict: Verdict = "good" if share >= _FEW_END else "look"
        text = (
            f"{share:.0%} of its responses end by themselves within {limit} tokens; "
            f"their mean length is {mean:.0f}"
        )
        if verdict == "look":
            text += (
                "; raise --data.max_response_length, or check that its eos is the one of its "
                "training"
            )
        found.append(Check(f"the {who} stops", verdict, text))
    return found


def _vocabulary(module: DistillationModule) -> Check:
    """Report padding ids; student and teacher with different vocabularies were refused before."""
    size = module.vocabulary.size
    tables = [
        ("student" if model is module.student else "teacher", model.config.get_text_config())
        for model in module.pair.models
    ]
    padded = ", ".join(
        f"{name} {config.vocab_size - size}" for name, config in tables if config.vocab_size > size
    )
    text = f"student and teacher agree on {size:,} ids"
    if padded:
        text += f"; rows after them ({padded}) are masked on both sides"
    if module.vocabulary.invalid_ids:
        text += f"; {len(module.vocabulary.invalid_ids)} ids below have no token and are masked"
    return Check("vocabulary", "good", text)


def _round_trip(module: DistillationModule, examples: Sequence[Example]) -> Check:
    """Check that text → ids → text gives the same text."""
    tokenizer = module.tokenizer
    texts = [text for e in examples for text in (e.prompt, e.response) if text]
    broken = []
    for text, ids in zip(texts, TextEncoder(tokenizer).plain(texts), strict=True):
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if str(back).strip() != text.strip():
            broken.append(text)
    if not broken:
        return Check(
            "round trip", "good", f"{len(texts)} texts are unchanged by encoding and decoding"
        )
    share = len(broken) / len(texts)
    sample = " ".join(broken[0].split())[:40]
    return Check(
        "round trip",
        "bad" if share > _MANY_SKIPPED else "look",
        f"{share:.0%} of {len(texts)} texts do not are unchanged by encoding and decoding (such as "
        f"{sample!r}): "
        "the tokenizer has no tokens for some characters, or normalises text",
    )


def _template(module: DistillationModule, data: RolloutDataModule, part: str) -> Check:
    """Check that a chat's prompt ends where the assistant's turn begins."""
    source = data.sources[part]
    assert source is not None
    rows = load_rows(source, split=data.splits[part], subset=data.subset)
    where = describe_source(source)
    asked, columns = with_prompts(rows, data.columns, needs_response=False, where=where)
    if choose_layout(asked, columns, needs_response=False, where=where) == "text":
        template = getattr(module.tokenizer, "chat_template", None)
        if template is None:
            return Check(
                "template", "good", "plain prompts, and a tokenizer without a chat template"
            )
        return Check("template", "look", PLAIN_PROMPTS)
    messages = [{"role": "user", "content": "x"}]
    process, told = TemplateProcess(module.tokenizer), columns.chat_template_kwargs
    wanted = [(messages, {**told, "add_generation_prompt": on}) for on in (False, True)]
    without, with_prompt = process.render(wanted, "the chat template")
    added = with_prompt[len(without) :]
    if not added:
        return Check(
            "template",
            "look",
            "the chat template has no generation prompt: a response begins directly after the "
            "user's turn",
        )
    return Check("template", "good", f"chats; the generation prompt is {added!r}")


def _lengths(data: RolloutDataModule, found: ExampleSet) -> Check:
    total = len(found) + found.num_skipped
    share = found.num_skipped / total
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.skipped.items())
    if not found.num_skipped:
        return Check("overlong rows", "good", f"none of {total:,} rows is left out")
    return Check(
        "overlong rows",
        "look" if share > _MANY_SKIPPED else "good",
        f"{share:.1%} of {total:,} rows are left out ({reasons}) at "
        f"--data.max_prompt_length {data.max_prompt_length}",
    )


def _given_ends(data: RolloutDataModule, found: ExampleSet) -> Check:
    given = sum(bool(example.response_ids) for example in found.examples)
    if not given:
        return Check("dataset responses", "look", "there are none: on-policy methods only")
    if found.share_cut >= MANY_CUT:
        return Check("dataset responses", "bad", cut_advice(found, data.max_response_length))
    return Check(
        "dataset responses",
        "good",
        f"{found.share_cut:.1%} of {given:,} are cut at --data.max_response_length "
        f"{data.max_response_length} and get no eos",
    )
