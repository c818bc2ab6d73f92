"""Semantics frozen here: chats become the ids of their rendering with every kind of tokenizer.

Opening, turns and what stands between them decode to the rendering, begin with one bos, and are
marked to the token; what a template writes after a turn is the same whether a row of the data set
or a rollout with tools has it. Held for templates with an end that is the eos, one that is another
special token, none at all, and tokens that include the line break after them.
"""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from okd_lightning.data.chat_ids import encode_chats, encode_turns
from okd_lightning.data.templates import ChatRenderer
from okd_lightning.models.text_ids import TextEncoder

SPECIALS = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
CHAT = [
    {"role": "user", "content": "  Hi there\n"},
    {"role": "assistant", "content": "\nHello. "},
    {"role": "user", "content": "<s>And"},
    {"role": "assistant", "content": " bye"},
]
TEMPLATES = {
    # name -> (template, what ends a turn)
    "eos": (
        "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "</s>",
    ),
    "Llama 2": (
        "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        "</s>",
    ),
    "another token, line breaks": (
        "<s>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|end|>",
    ),
    "none": (
        "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "",
    ),
}
TOKENIZERS = {
    "byte-level": None,
    "metaspace first": "first",
    "metaspace always": "always",
    "no space added": "never",
}


def make(scheme: str | None, *, rstrip: bool = False) -> PreTrainedTokenizerBase:
    """Return a tokenizer of one id per byte or character, with a bos before plain texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if scheme is not None:
        alphabet = ["▁", "\n", *(chr(i) for i in range(33, 127))]
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if scheme is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    added = [AddedToken(t, special=True, normalized=False, rstrip=rstrip) for t in SPECIALS]
    backend.add_special_tokens(added)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def rendered_ids(tokenizer, messages):
    """The rendering, its ids by the tokenizer itself, and ours as (ids, learned) spans."""
    renderer = ChatRenderer(tokenizer, where="rows")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chat = renderer.render(messages, None, "row 1", turns)
    assert not chat.unplaced
    encoder = TextEncoder(tokenizer)
    (found,) = encode_chats(encoder, [chat], [tokenizer.eos_token_id])
    spans = [(found.opening, False)]
    for turn in found.turns:
        spans += [(turn.ids, True), (turn.after_ids, False)]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text, tokenizer(text, add_special_tokens=False).input_ids, spans, found


@pytest.mark.parametrize("scheme", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_the_ids_of_its_rendering(name, scheme):
    template, end = TEMPLATES[name]
    tokenizer = make(scheme)
    tokenizer.chat_template = template
    _, whole, spans, found = rendered_ids(tokenizer, CHAT)
    assert [i for ids, _ in spans for i in ids] == whole
    learned = [tokenizer.decode(ids) for ids, is_learned in spans if is_learned]
    own = [text.replace(" ", "").strip() for text in learned]  # blanks are the tokenizer's own
    assert own == [f"Hello.{end}", f"bye{end}"]
    assert [turn.end_id for turn in found.turns] == [
        tokenizer.convert_tokens_to_ids(end) if end else None
    ] * 2
    assert whole[0] == 1
    assert found.opening[:2] != [1, 1]


def test_tokens_that_swallow_a_line_break_do_so_between_turns():
    tokenizer = make("first", rstrip=True)
    tokenizer.chat_template = TEMPLATES["another token, line breaks"][0]
    _, whole, spans, found = rendered_ids(tokenizer, CHAT)
    line_break = tokenizer.convert_tokens_to_ids("\n")
    assert found.opening[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert [i for ids, _ in spans for i in ids] == whole
    assert found.turns[0].after_ids[0] != line_break


def test_content_that_brings_its_end_ends_once():
    tokenizer = make(None)
    tokenizer.chat_template = TEMPLATES["another token, line breaks"][0]
    messages = [CHAT[0], {"role": "assistant", "content": "Hello.<|end|>"}]
    _, _, _, found = rendered_ids(tokenizer, messages)
    assert tokenizer.decode(found.turns[0].ids) == "Hello.<|end|>"
    assert found.turns[0].text == "Hello."


@pytest.mark.parametrize("scheme", TOKENIZERS.values(), ids=TOKENIZERS)
def test_what_follows_a_turn_does_not_depend_on_the_turn(scheme):
    """A rollout with tools appends it to ids that the model generated."""
    tokenizer = make(scheme)
    tokenizer.chat_template = TEMPLATES["another token, line breaks"][0]
    renderer, encoder = ChatRenderer(tokenizer, where="rows"), TextEncoder(tokenizer)
    follow = set()
    for answer in ("Hello.", "", "other words\n"):
        messages = [CHAT[0], {"role": "assistant", "content": answer}, CHAT[2]]
        chat = renderer.render(messages, None, "row 1", [1])
        (turn,) = encode_turns(encoder, [chat.opening], chat.turns, [2])
        follow.add(tuple(turn.after_ids))
    assert len(follow) == 1
