"""Chats with tools that are small enough for every test: tokenizer, template, engine, model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from okd_lightning.data.tool_turns import ToolTurns
from okd_lightning.engines import NoiseStream, Sampling
from okd_lightning.engines.tool_rollouts import ToolEngine, ToolRounds
from okd_lightning.records import Chat, Prompt, Request, Response, Rollout
from okd_lightning.tools import Calculator, Tool, Toolbox

SPECIALS = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>"]
PAD, EOS, START, END = range(4)

TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:"
    "{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def call_of(expression: str, name: str = "calculator") -> str:
    """A call as the template writes it."""
    arguments = f'{{"expression": "{expression}"}}'
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


CALLS = [call_of("1+1"), call_of("1/0"), call_of("2", name="oracle")]
"""Each is one token of ``make_tokenizer``: a sum, an error, and a tool that does not exist."""


class Shouting(Tool):
    """Tool that raises its argument."""

    name = "shout"
    description = "Raises."
    parameters = {"type": "object", "properties": {"text": {"type": "string"}}}

    def __call__(self, text: str) -> str:
        raise KeyError(text)


class Echo(Tool):
    """Tool that returns its argument twice."""

    name = "echo"
    description = "Repeats."
    parameters = {
        "type": "object",
        "properties": {"text": {"type": "string"}},
        "required": ["text"],
    }

    def __call__(self, text: str) -> str:
        return text * 2


def make_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one id per byte, special token and entry of ``CALLS``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(SPECIALS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens([AddedToken(call, normalized=False) for call in CALLS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


def make_caller(
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
    bias: float = 8.0,
    width: int = 32,
) -> LlamaForCausalLM:
    """Return a tiny Llama that often generates ``CALLS`` and ends of turns."""
    tokenizer = tokenizer or make_tokenizer()
    often = tokenizer.convert_tokens_to_ids(["<|im_end|>", *CALLS])
    rows = len(tokenizer)
    config = LlamaConfig(
        vocab_size=rows + 5,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        model.get_input_embeddings().weight[:, 0] = 6.0  # a constant part of every hidden state
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[often, 0] = bias / 5
    return model.eval()


class ScriptedEngine:
    """Engine that returns given texts turn by turn; log-probs are minus the noise of each position.

    Attributes:
        seen: The contexts of each call of ``generate``, as text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, script: Mapping[int, Sequence[str]]
    ) -> None:
        self._tokenizer = tokenizer
        self._script = {index: list(texts) for index, texts in script.items()}
        self._ends = set(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])) - {None}
        self.seen: list[dict[int, str]] = []

    def respond(self, request):
        prompts = request.prompts
        contexts = {prompt.index: self._tokenizer.decode(prompt.ids) for prompt in prompts}
        self.seen.append(contexts)
        keys = [prompt.index for prompt in prompts], [prompt.sample for prompt in prompts]
        noise = request.noise.uniform(*keys, request.max_new_tokens).tolist()
        found = []
        for prompt, limit, row in zip(prompts, request.limits, noise, strict=True):
            text = self._script[prompt.index].pop(0)
            ids = tuple(self._tokenizer(text, add_special_tokens=False).input_ids)[:limit]
            reason = "eos" if ids and ids[-1] in self._ends else "length"
            found.append(Response(ids, tuple(-u for u in row[: len(ids)]), reason))
        return Rollout(tuple(found))


def rounds_of(tokenizer, max_turns: int = 4, tools: Sequence[Tool] | None = None) -> ToolRounds:
    """Return tool settings with all tools of this module, on a tokenizer's template."""
    toolbox = Toolbox([Calculator(), Echo(), Shouting()] if tools is None else tools)
    turns = ToolTurns(tokenizer, eos_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
    turns.check(toolbox.schemas)
    return ToolRounds(toolbox, turns, max_turns)


def prompts_of(tokenizer, questions: Mapping[int, str], samples: int = 1) -> tuple[Prompt, ...]:
    """Return one chat per question, keyed by its index, without declared tools."""
    rows = [(i, text, k) for i, text in questions.items() for k in range(samples)]
    chats = [Chat(({"role": "user", "content": text},)) for _, text, _ in rows]
    return tuple(
        Prompt(
            tuple(tokenizer(render(tokenizer, chat.messages), add_special_tokens=False).input_ids),
            index,
            sample,
            chat,
        )
        for chat, (index, _, sample) in zip(chats, rows, strict=True)
    )


def render(tokenizer, messages, *, prompt: bool = True, tools=None) -> str:
    """The template's text."""
    return tokenizer.apply_chat_template(
        list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt
    )


def run(
    tokenizer,
    script: Mapping[int, Sequence[str]],
    *,
    limit: int = 4000,
    max_turns: int = 4,
    order: Sequence[int] | None = None,
    progress=None,
) -> tuple[Rollout, ScriptedEngine]:
    """Generate a script's rows, each to the question "Q<index>"."""
    engine = ScriptedEngine(tokenizer, script)
    questions = {index: f"Q{index}" for index in order or script}
    rollout = ToolEngine(engine, rounds_of(tokenizer, max_turns)).respond(
        Request(
            prompts_of(tokenizer, questions),
            Sampling(),
            NoiseStream(3, 1),
            limit,
            progress=progress,
        )
    )
    return rollout, engine
