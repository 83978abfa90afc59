"""Functions that a chat may call, and answers that are not to be learnt: OpenAI's and ms-swift's rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.formats.rows import Bad
from tests.prepare.test_text_formats import folder, good, one, said
from tests.prepare.through import trained

__all__ = ["folder"]  # the fixture

CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ADD = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("content", ["Let me see.", None, ""])
def test_openai_tools_and_their_calls_stand_in_the_words_of_the_template(content: str | None, folder: Path):
    spoken = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": content, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "assistant", "content": "2"},
    ]
    sample, files = good(one("openai", folder, {"messages": spoken, "tools": [ADD]}))
    (system, told), _, (_, called), *_ = said(sample)
    assert system == "system" and f"<tools>\n{json.dumps(ADD)}\n</tools>" in told[0]
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert "".join(called) == (f"{content}\n{written}" if content else written)
    assert written in trained(sample, files, folder)[0].targets
    first = {"role": "system", "content": "Be brief."}
    sample, _ = good(one("openai", folder, {"messages": [first, *spoken], "tools": [ADD]}))
    assert said(sample)[0][1][0].startswith("Be brief.\n\n")


@pytest.mark.parametrize(("format", "excepted"), [("openai", {"weight": 0}), ("ms_swift", {"loss": False})])
def test_an_answer_that_is_not_to_be_learnt_makes_the_row_bad(format: str, excepted: dict, folder: Path):
    def row(**facts: Any) -> dict:
        spoken = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no", **facts}]
        return {"messages": [*spoken, {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}

    found = one(format, folder, row(**excepted))
    assert isinstance(found, Bad) and found.reason == "unsupported" and next(iter(excepted)) in found.expected
    good(one(format, folder, row(**{next(iter(excepted)): 1})))
