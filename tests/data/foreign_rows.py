"""Rows in the formats of TRL, OpenAI, Axolotl, LLaMA-Factory and well-known datasets.

Each set has two rows. All words of their prompts and responses must be in the trained text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Foreign:
    """A shape of rows.

    Attributes:
        rows: Two of them.
        options: What the error advises; none where the rows are read as they are.
        prompts: Words of each row that have to be read as the prompt.
        responses: Words of each row that have to carry loss.
        methods: "SFT" learns from responses, "on-policy" needs prompts alone.
    """

    rows: list[dict[str, Any]]
    options: str = ""
    prompts: tuple[tuple[str, ...], ...] = (("one",), ("two",))
    responses: tuple[tuple[str, ...], ...] = (("uno",), ("dos",))
    method: str = "SFT"


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def bot(text: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


def said(sender: str, value: str, **others: Any) -> dict[str, Any]:
    return {"from": sender, "value": value, **others}


def pairs(prompt: str, response: str, **others: tuple[Any, Any]) -> list[dict[str, Any]]:
    """Rows of two columns of texts, and others."""
    texts = (("one", "uno"), ("two", "dos"))
    return [
        {prompt: p, **{name: cells[i] for name, cells in others.items()}, response: r}
        for i, (p, r) in enumerate(texts)
    ]


PAIR = ("prompt", "response")
CHATS = [[user("one"), bot("uno")], [user("two"), bot("dos")]]
SHARE_GPT = [[said("human", "one"), said("gpt", "uno")], [said("human", "two"), said("gpt", "dos")]]
ALPACA = """--data.prompt_template '["{instruction}\\n\\n{input}","{instruction}"]'"""
DOLLY = """--data.prompt_template '["{instruction}\\n\\n{context}","{instruction}"]'"""
ORCA = """--data.prompt_template '["{system_prompt}\\n\\n{question}","{question}"]'"""
CALL = '{"name": "add", "arguments": {"a": 1}}'
TOOLS = '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'

FOREIGN = {
    # TRL
    "trl prompt-completion": Foreign(
        pairs("prompt", "completion"), "--data.response_column completion"
    ),
    "trl conversational prompt-completion": Foreign(
        [{"prompt": c[:1], "completion": c[1:]} for c in CHATS],
        "--data.response_column completion",
    ),
    "trl conversational": Foreign([{"messages": c} for c in CHATS]),
    "trl text": Foreign(
        [{"text": "one uno"}, {"text": "two dos"}],
        "--data.prompt_column null --data.response_column text",
        prompts=((), ()),
        responses=(("ne uno",), ("wo dos",)),
    ),
    "trl prompt-only": Foreign(
        [{"prompt": "one"}, {"prompt": "two"}], responses=((), ()), method="on-policy"
    ),
    "trl conversational prompt-only": Foreign(
        [{"prompt": c[:1]} for c in CHATS], responses=((), ()), method="on-policy"
    ),
    "trl preference": Foreign(
        pairs("prompt", "chosen", rejected=("x", "y")), "--data.response_column chosen"
    ),
    "trl conversational preference": Foreign(
        [{"prompt": c[:1], "chosen": c[1:], "rejected": [bot("x")]} for c in CHATS],
        "--data.response_column chosen",
    ),
    "trl implicit preference": Foreign(
        [{"chosen": c, "rejected": [c[0], bot("x")]} for c in CHATS],
        "--data.messages_column chosen",
    ),
    "trl implicit preference of texts": Foreign(
        [{"chosen": "one uno", "rejected": "x"}, {"chosen": "two dos", "rejected": "y"}],
        "--data.prompt_column null --data.response_column chosen",
        prompts=((), ()),
        responses=(("ne uno",), ("wo dos",)),
    ),
    "ultrafeedback": Foreign(
        [{"prompt": c[0]["content"], "chosen": c, "rejected": [c[0], bot("x")]} for c in CHATS],
        "--data.messages_column chosen --data.prompt_column null",
    ),
    "trl tools as text": Foreign(
        [{"messages": c, "tools": TOOLS} for c in CHATS],
    ),
    "roles in capitals, as NeMo writes them": Foreign(
        [
            {"conversations": [said("User", "one"), said("Assistant", "uno")]},
            {"conversations": [said("User", "two"), said("Assistant", "dos")]},
        ],
        "--data.messages_column conversations",
    ),
    "roles of LangChain": Foreign(
        [{"messages": [said("human", "one"), said("ai", "uno")]}, {"messages": CHATS[1]}]
    ),
    "messages as indented JSON text": Foreign(
        [{name: json.dumps(c[i : i + 1], indent=1) for i, name in enumerate(PAIR)} for c in CHATS]
    ),
    "a table whose names have blanks": Foreign(
        pairs("User prompt", " Answer"),
        "--data.prompt_column 'User prompt' --data.response_column ' Answer'",
    ),
    # hub data sets
    "alpaca": Foreign(
        [
            {"instruction": "one", "input": "", "output": "uno"},
            {"instruction": "two", "input": "stone", "output": "dos"},
        ],
        f"{ALPACA} --data.response_column output",
        prompts=(("one",), ("two", "stone")),
    ),
    "alpaca whose first rows have no input": Foreign(
        [
            {"instruction": "one", "output": "uno"},
            {"instruction": "two", "input": "stone", "output": "dos"},
        ],
        f"{ALPACA} --data.response_column output",
        prompts=(("one",), ("two", "stone")),
    ),
    "alpaca without any input": Foreign(
        pairs("instruction", "output", input=("", "")),
        "--data.prompt_column instruction --data.response_column output",
    ),
    "alpaca with prompts as well": Foreign(
        pairs("instruction", "output", input=("a", "b"), text=("one a uno", "two b dos")),
        f"{ALPACA} --data.response_column output",
        prompts=(("one", "a"), ("two", "b")),
    ),
    "gpteacher": Foreign(
        pairs("instruction", "response", input=("a", "b")),
        ALPACA,
        prompts=(("one", "a"), ("two", "b")),
    ),
    "dolly": Foreign(
        pairs("instruction", "response", context=("", "stone"), category=("qa", "qa")),
        DOLLY,
        prompts=(("one",), ("two", "stone")),
    ),
    "open-orca": Foreign(
        pairs("question", "response", id=("1", "2"), system_prompt=("be brief", "")),
        ORCA,
        prompts=(("be brief", "one"), ("two",)),
    ),
    "slim-orca": Foreign(
        [{"conversations": [said("system", "be brief", weight=None), *chat]} for chat in SHARE_GPT],
        "--data.messages_column conversations",
        prompts=(("be brief", "one"), ("be brief", "two")),
    ),
    "open-hermes": Foreign(
        [
            {
                "conversations": [{**turn, "weight": None} for turn in chat],
                "system_prompt": None,
                "source": "x",
                "title": None,
            }
            for chat in SHARE_GPT
        ],
        "--data.messages_column conversations",
    ),
    "share-gpt": Foreign(
        [{"id": str(i), "conversations": chat} for i, chat in enumerate(SHARE_GPT)],
        "--data.messages_column conversations",
    ),
    "share-gpt as llama-factory has it": Foreign(
        [
            {
                "conversations": [
                    said("human", p),
                    said("function_call", CALL),
                    said("observation", "three"),
                    said("gpt", r),
                ],
                "system": "be brief",
                "tools": TOOLS,
            }
            for p, r in (("one", "uno"), ("two", "dos"))
        ],
        "--data.messages_column conversations",
        prompts=(("be brief", "one", "three"), ("be brief", "two", "three")),
    ),
    "conversations with roles": Foreign(
        [{"conversations": c} for c in CHATS], "--data.messages_column conversations"
    ),
    "ultra-chat": Foreign(
        [{"prompt": c[0]["content"], "prompt_id": "1", "messages": c} for c in CHATS],
        "--data.prompt_column null",
    ),
    "tulu": Foreign([{"id": "1", "messages": c, "source": "x"} for c in CHATS]),
    "gsm8k": Foreign(
        pairs("question", "answer"), "--data.prompt_column question --data.response_column answer"
    ),
    "meta-math": Foreign(
        pairs("query", "response", type=("a", "b"), original_question=("c", "d")),
        "--data.prompt_column query",
    ),
    "numina": Foreign(
        pairs("problem", "solution", source=("a", "b")),
        "--data.prompt_column problem --data.response_column solution",
    ),
    "capitals": Foreign(
        pairs("INSTRUCTION", "RESPONSE"),
        "--data.prompt_column INSTRUCTION --data.response_column RESPONSE",
    ),
    "input and output": Foreign(
        pairs("input", "output"), "--data.prompt_column input --data.response_column output"
    ),
    "capybara": Foreign(
        [
            {"source": "x", "conversation": [{"input": "one", "output": "uno"}]},
            {"source": "x", "conversation": [{"input": "two", "output": "dos"}]},
        ],
        "--data.messages_column conversation",
    ),
    "mbpp": Foreign(
        pairs("text", "code", test_list=(["x"], ["y"])),
        "--data.prompt_column text --data.response_column code",
    ),
    "lists of messages under other names": Foreign(
        [{"input": c[:1], "output": c[1:]} for c in CHATS],
        "--data.prompt_column input --data.response_column output",
    ),
    # APIs
    "openai with parts": Foreign(
        [{"messages": [user([{"type": "text", "text": c[0]["content"]}]), c[1]]} for c in CHATS]
    ),
    "gemma's roles": Foreign(
        [{"messages": [c[0], {"role": "model", "content": c[1]["content"]}]} for c in CHATS]
    ),
    "chats as text": Foreign(
        [
            {
                "messages": '[{"role": "user", "content": "one"}, '
                '{"role": "assistant", "content": "uno"}]'
            },
            {
                "messages": '[{"role": "user", "content": "two"}, '
                '{"role": "assistant", "content": "dos"}]'
            },
        ]
    ),
    "chats column by column": Foreign(
        [
            {"messages": {"role": ["user", "assistant"], "content": ["one", "uno"]}},
            {"messages": {"role": ["user", "assistant"], "content": ["two", "dos"]}},
        ]
    ),
}
