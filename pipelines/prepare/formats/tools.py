"""Functions that a chat may call: their signatures and calls in the words of Qwen's released chat template, shared by
the formats whose rows carry them."""

from __future__ import annotations

import json

from pipelines.prepare.formats.rows import BadRow, message, text
from trainer.data.render import TOOLS_TEXT


def check_learnt(item: dict) -> None:
    """Every answer of a sample is learnt: a row that excepts one (OpenAI's `weight`, ms-swift's `loss`) is refused.

    Raises:
        BadRow
    """
    for name in ("weight", "loss"):
        if item.get(name) is not None and not item[name]:
            raise BadRow("unsupported", f"messages that are learnt, without {name} {item[name]}", item.get("role"))


def with_tools(system: str, tools: object) -> str:
    """The system message with the signatures after it. `tools`: a list of functions, or its JSON.

    Raises:
        BadRow
    """
    listed = _parsed(tools) if isinstance(tools, str) and tools.strip() else tools
    if not listed:
        return system
    if not isinstance(listed, list) or not all(isinstance(tool, dict) for tool in listed):
        raise BadRow("wrong-form", "tools: a list of functions", type(listed).__name__)
    whole = [tool if "function" in tool else {"type": "function", "function": tool} for tool in listed]
    written = TOOLS_TEXT.replace("[SCHEMA]", "\n".join(json.dumps(tool, ensure_ascii=False) for tool in whole))
    return f"{system}\n\n{written}" if system else written


def call(value: str) -> dict:
    """A call of one function (or of several, as a list) that stands as JSON in a turn: the assistant's message."""
    found = _parsed(value)
    calls = found if isinstance(found, list) else [found]
    written = []
    for item in calls:
        if not isinstance(item, dict) or "name" not in item:
            raise BadRow("wrong-form", "a call: {name, arguments}", value)
        arguments = item.get("arguments", {})
        arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
        content = json.dumps({"name": item["name"], "arguments": arguments}, ensure_ascii=False)
        written.append(f"<tool_call>\n{content}\n</tool_call>")
    return message("assistant", text("\n".join(written)))


def calls_of(calls: object) -> dict:
    """OpenAI's tool_calls, a list of {"type": "function", "function": {name, arguments}}: the assistant's message."""
    if not isinstance(calls, list) or not all(isinstance(item, dict) for item in calls):
        raise BadRow("wrong-form", "tool_calls: a list of calls", calls)
    return call(json.dumps([item.get("function", item) for item in calls]))


def joined(messages: list[dict]) -> list[dict]:
    """Words and calls that an assistant says in one go, in one message."""
    found: list[dict] = []
    for item in messages:
        if found and item["role"] == found[-1]["role"] == "assistant" and _is_call(item):
            found[-1] = message("assistant", *found[-1]["parts"], text("\n"), *item["parts"])
        else:
            found.append(item)
    return found


def _is_call(item: dict) -> bool:
    return item["parts"][0].get("text", "").startswith("<tool_call>\n")


def _parsed(value: str) -> object:
    try:
        return json.loads(value)
    except ValueError as error:
        raise BadRow("wrong-form", "JSON", f"{error}: {value[:60]!r}") from None
