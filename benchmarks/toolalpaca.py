"""Convert ToolAlpaca's files to rows that okd-lightning reads; imports nothing of it.

A row has messages (the instruction), tools (the API's functions as JSON schemas) and response (the
golden calls, or those of the training data's instance, as Qwen and Hermes generate them).
Instructions whose golden arguments are not JSON, because they refer to the result of an earlier
call, are left out; so are instances without calls. Questions to the user (getDetails) are not
calls.

    python benchmarks/toolalpaca.py eval_simulated.json OUT.jsonl
    python benchmarks/toolalpaca.py train_data.json OUT.jsonl
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

TYPES = ("string", "integer", "number", "boolean", "array", "object")


def schema_of(name: str, text: str) -> dict[str, Any]:
    """Return a function's JSON schema, from "what it does / Parameters: {...} / Output: ..."."""
    described = re.match(r"(.*?)\nParameters: (\{.*?\})\n(?:Output|$)", text + "\n", re.DOTALL)
    description, parameters = described.groups() if described else (text, "{}")
    properties, required = {}, []
    for argument, said in json.loads(parameters).items():
        words = said.removeprefix("Required. ")
        kind = next((k for k in TYPES if words.lower().startswith(k)), "string")
        properties[argument] = {"type": kind, "description": words}
        if words != said:
            required.append(argument)
    object_schema = {"type": "object", "properties": properties, "required": required}
    function = {"name": name, "description": description.strip(), "parameters": object_schema}
    return {"type": "function", "function": function}


def golden_response(calls: list[dict[str, str]]) -> str | None:
    """Return calls as a model would generate them; None where an argument refers to a result."""
    written = []
    for call in calls:
        try:
            arguments = json.loads(call["Action_Input"])
        except json.JSONDecodeError:
            return None
        body = json.dumps({"name": call["Action"], "arguments": arguments}, ensure_ascii=False)
        written.append(f"<tool_call>\n{body}\n</tool_call>")
    return "\n".join(written)


def asked_of(api: dict[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return instructions with their calls, of an evaluation file or of the training data."""
    if "Golden_Answers" in api:
        return list(zip(api["Instructions"], api["Golden_Answers"], strict=True))
    found = []
    for instance in api.get("Instances", []):
        steps = [step[0] for step in instance.get("intermediate_steps") or []]
        calls = [{"Action": s[0], "Action_Input": s[1]} for s in steps if s[0] != "getDetails"]
        known = all(call["Action"] in api["Function_Projection"] for call in calls)
        if known:
            found.append((instance["input"].rsplit("\nHint: ", 1)[0], calls))
    return found


def rows_of(apis: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per instruction that has calls."""
    rows = []
    for api in apis:
        described = api.get("Function_Description")
        if described is None:
            continue
        tools = [schema_of(name, described[name]) for name in api["Function_Projection"]]
        for instruction, calls in asked_of(api):
            response = golden_response(calls)
            if response:
                messages = [{"role": "user", "content": instruction}]
                rows.append({"messages": messages, "tools": tools, "response": response})
    return rows


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows = rows_of(json.loads(options.source.read_text(encoding="utf-8")))
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    options.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} rows written to {options.out}")


if __name__ == "__main__":
    main()
