"""The record itself: what JSON allows and no sample can hold is one clear error."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data.builders import a_caption
from trainer.data.sample import from_json, to_json
from trainer.errors import DataError

SAMPLE, _ = a_caption(0)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def test_a_sample_is_read_back_as_it_was_written() -> None:
    assert from_json(to_json(SAMPLE)) == SAMPLE


@pytest.mark.parametrize(
    "meta", [{"from": "half \ud83d"}, {"deep": nested(100_000)}], ids=["a lone surrogate", "endless nesting"]
)
def test_what_cannot_be_written_names_the_sample(meta: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot be written as JSON") as told:
        to_json(SAMPLE.model_copy(update={"meta": meta}))
    assert f"{SAMPLE.source}/{SAMPLE.id}" in str(told.value)
    str(told.value).encode()  # the message itself can be shown


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (to_json(SAMPLE)[:-1] + ', "meta": {"a": "\\ud83d"}}', "hex escape"),
        (to_json(SAMPLE)[:-1] + ', "meta": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}", "recursion"),
        ("half \ud83d", "unicode"),
        (to_json(SAMPLE).replace('"caption"', '"captoin"', 1), "kind"),
        ("{", "EOF"),
    ],
    ids=["a lone surrogate", "endless nesting", "text without UTF-8", "another field", "cut off"],
)
def test_what_cannot_be_read_names_the_place(text: str, want: str) -> None:
    with pytest.raises(DataError, match="not a sample of this format") as told:
        from_json(text, where="shard 3, row 7")
    assert "shard 3, row 7" in str(told.value) and want in str(told.value)
    str(told.value).encode()
