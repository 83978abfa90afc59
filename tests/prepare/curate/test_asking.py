"""What every judge shares: an endpoint that is gone for a while, answers of brackets inside brackets, open shards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.prepare.curate import asking, judge
from pipelines.prepare.curate.step import curate
from tests.prepare.curate.builders import a_recipe
from tests.prepare.curate.test_scores import (
    GOOD,
    Server,
    judged,
    server,
    some_documents,
    still_open,
    tries_wait,
)
from trainer import storage
from trainer.after import completions
from trainer.errors import DataError

__all__ = ["server"]  # the fixture


def test_an_endpoint_that_is_gone_for_a_while_is_waited_for_and_told(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Longer than the tries of one request; what was answered is recorded before, and a refusal is not waited for."""
    waits: list[float] = []
    tries_wait(monkeypatch)
    monkeypatch.setattr(asking, "PAUSES_S", (7.0, 8.0))
    monkeypatch.setattr(asking, "time", SimpleNamespace(sleep=waits.append))  # of nobody else
    some_documents(tmp_path, 3)
    gone = ["number 1", "number 2"]
    server.script = lambda body, number: (
        (400, "refused") if gone[1] in json.dumps(body) else
        (503, "down") if gone[0] in json.dumps(body) and len(waits) < 2 else (200, json.dumps(GOOD))
    )  # fmt: skip
    found = curate(judged(server, allowed=0.5), str(tmp_path))["web"]
    assert found["judge"] == {"asked": 3, "recorded": 0, "malformed": 0, "failed": 1, "unanswered": 1}
    assert waits == [7.0, 8.0] and len(server.asked()) == 1 + 1 + 2 * completions.NUM_TRIES + 1
    told = [line for line in capsys.readouterr().out.splitlines() if "made again" in line]
    assert len(told) == 2 and "curate.score.judge: 1 requests without an answer (Refused: " in told[0]
    gone[:] = ["number 1", "number 9"]
    monkeypatch.setattr(asking, "PAUSES_S", (7.0,))
    storage.remove_tree(str(tmp_path / "data" / "answers"))
    storage.remove_tree(str(tmp_path / "data" / "sources"))
    some_documents(tmp_path, 3)
    waits.clear()
    with pytest.raises(DataError, match="too many samples without a valid answer"):  # bounded
        curate(judged(server), str(tmp_path))
    assert waits == [7.0]


@pytest.mark.parametrize(
    "asked",
    [
        "score: {{scorer: judge, judge: {{url: '{url}', model: m}}}}",
        "instructions: {{classify: judge, judge: {{url: '{url}', model: m}}}}",
    ],
)
def test_a_judge_leaves_no_shard_open_whether_it_answers_or_not(asked: str, tmp_path: Path, server: Server):
    open_then: list[list[str]] = []

    def answers(body: dict[str, Any], number: int) -> tuple[int, str]:
        open_then.append(still_open(tmp_path))
        return 200, "I like it."

    server.script = answers
    some_documents(tmp_path, 2)
    for _ in range(2):  # the second time from the record
        with pytest.raises(DataError, match="without a valid answer"):
            curate(a_recipe(f"{{{asked.format(url=server.url)}}}"), str(tmp_path))
        assert not still_open(tmp_path)
    assert any(open_then), "negative control: it is open while the pictures are shown"


def looked_at(monkeypatch: pytest.MonkeyPatch, text: str) -> int:
    """Characters that the decoder goes through for one answer."""
    total = 0

    class Decoder(json.JSONDecoder):
        def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
            nonlocal total
            try:
                found, stop = super().raw_decode(s, idx)
            except json.JSONDecodeError as error:
                total += error.pos - idx
                raise
            except RecursionError:
                total += len(s) - idx
                raise
            total += stop - idx
            return found, stop

    with monkeypatch.context() as patch:
        patch.setattr(asking.json, "JSONDecoder", Decoder)
        assert judge.parse(text) is None
    return total


@pytest.mark.parametrize("unit", ['{"a":', '{"a":[', '{"a":{"b":1},"c":'])
@pytest.mark.parametrize("closed", [False, True])
def test_an_answer_of_brackets_inside_brackets_takes_time_in_proportion_to_its_length(
    unit: str, closed: bool, monkeypatch: pytest.MonkeyPatch
):
    def nested(depth: int) -> str:
        ends = "".join({"{": "}", "[": "]"}[char] for char in reversed(unit) if char in "{[")
        return unit * depth + ("1" + (ends if "b" not in unit else "}") * depth if closed else "")

    for depth in (400, 800, 5000):
        text = nested(depth)
        assert looked_at(monkeypatch, text) <= (asking.LOOKED + 1) * len(text)


def test_an_object_inside_of_others_is_found():
    inside = json.dumps(GOOD)
    for depth in (1, 20):
        for text in ('{"a": ' * depth + inside + "}" * depth, '{"a": ' * depth + inside, "{" * 500 + inside):
            assert judge.parse(text) is not None, text
