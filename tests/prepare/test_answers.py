"""Places in answers, as Qwen2.5-VL writes them: geometry, refused, or counted as text; never text without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.formats.rows import Bad, Draft
from pipelines.prepare.ingest import prepare_data
from tests.prepare.builders import a_recipe, a_source, write_lines
from tests.prepare.test_formats import read
from tests.prepare.test_ingest import NO_TOKENIZER
from tests.prepare.test_text_formats import folder
from trainer import storage
from trainer.errors import DataError

__all__ = ["folder"]  # the fixture

FACE = {"bbox_2d": [6, 8, 30, 20], "label": "face"}
HAND = {"point_2d": [7, 9.5], "label": "hand"}
LISTED = json.dumps([FACE, HAND])
ONE = [("face", [6, 8, 30, 20])]
BOTH = [*ONE, ("hand", [7, 9.5])]


def places(parts: list[dict]) -> list[Any]:
    """Words, and the (label, numbers) of each part with objects."""
    return [
        part["text"]
        if part["part"] == "text"
        else [(thing["label"], thing["at"].get("xyxy") or thing["at"]["xy"]) for thing in part["objects"]]
        for part in parts
    ]


def row_of(format: str, answer: str, *, pictures: int = 1) -> dict:
    """One question and answer in a format's own form."""
    asked, names = "<image>" * pictures + "Where?", ["red.png"] * pictures
    if format == "llava":
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        return {"id": "1", "images": names, "conversations": turns}
    if format == "llama_factory":
        return {"id": "1", "instruction": asked, "output": answer, "images": names}
    said: Any = [{"type": "text", "text": answer}] if format == "openai" else answer
    if format == "preference":
        return {"id": "1", "prompt": asked, "chosen": answer, "rejected": "no", "images": names}
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"id": "1", "messages": messages, "images": names}


def drafted(folder: Path, row: dict, format: str = "llava") -> Draft | Bad:
    kind = "preference" if format == "preference" else "instruction"
    [found] = read(format, write_lines(folder / "rows.jsonl", [row]), kind=kind, rendering="chat")
    return found


READ = {
    "compact": ('[{"bbox_2d":[6,8,30,20],"label":"face"}]', [ONE]),
    "a space before the first": ('[ {"bbox_2d": [6, 8, 30, 20], "label": "face"}]', [ONE]),
    "pretty-printed": (json.dumps([FACE, HAND], indent=2), [BOTH]),
    "label first": ('[{"label": "face", "bbox_2d": [6, 8, 30, 20]}]', [ONE]),
    "fenced": (f"```json\n{LISTED}\n```", [BOTH]),
    "fenced with tabs": ('```json\n[\n\t{"bbox_2d": [6, 8, 30, 20], "label": "face"}\n]\n```', [ONE]),
    "fenced without a language": (f"```\n{LISTED}\n```\n", [BOTH]),
    "a single object": (json.dumps(FACE), [ONE]),
    "an object a line": (f"{json.dumps(FACE)}\n{json.dumps(HAND)}", [BOTH]),
    "words before": (f"Here it is:\n{LISTED}", ["Here it is:\n", BOTH]),
    "words around a fence": (f"Two:\n```json\n{LISTED}\n```\nDone.", ["Two:\n", BOTH, "\nDone."]),
    "other JSON before": (f'{{"n": 2}} [1] {json.dumps([FACE])}', ['{"n": 2} [1] ', ONE]),
    "no label": ('[{"bbox_2d": [6, 8, 30, 20], "label": null}]', [[("", [6, 8, 30, 20])]]),
    "words about the form": ("Use [{bbox_2d: [x1, y1, x2, y2]}].", ["Use [{bbox_2d: [x1, y1, x2, y2]}]."]),
    "no place": ('[{"bbox_2d": [], "label": "face"}]', ['[{"bbox_2d": [], "label": "face"}]']),
}


@pytest.mark.parametrize("name", READ)
def test_places_are_read_however_they_are_written(name: str, folder: Path):
    answer, want = READ[name]
    found = drafted(folder, row_of("llava", answer))
    assert isinstance(found, Draft), found
    assert places(found.messages[-1]["parts"]) == want


REFUSED = {
    "a comma missing": ('[{"bbox_2d": [6, 8, 30, 20]} {"bbox_2d": [1, 2, 3, 4]}]', "unread-places"),
    "cut": ('[{"bbox_2d": [6, 8, 30, 20]}, {"bbox_2d": [1, 2', "unread-places"),
    "a single one cut": ('{"bbox_2d": [6, 8, 30', "unread-places"),
    "Python": ("[{'bbox_2d': [6, 8, 30, 20], 'label': 'face'}]", "unread-places"),
    "in another object": (json.dumps({"objects": [FACE]}), "unread-places"),
    "in the arguments of a tool": (
        f'<tool_call>\n{{"name": "zoom", "arguments": {json.dumps(FACE)}}}',
        "unread-places",
    ),
    "JSON in JSON": (json.dumps({"answer": LISTED}), "unread-places"),
    "beside an object without a place": (json.dumps([FACE, {"label": "none"}]), "unread-places"),
    "three numbers": ('[{"bbox_2d": [6, 8, 30], "label": "face"}]', "unread-places"),
    "boxes in a box": ('[{"bbox_2d": [[6, 8, 30, 20]]}]', "unread-places"),
    "numbers by name": ('[{"bbox_2d": {"x1": 6, "y1": 8, "x2": 30, "y2": 20}}]', "unread-places"),
    "no number": ('[{"bbox_2d": [6, 8, 30, NaN]}]', "unread-places"),
    "deep": ("[{" + '"a":[{' * 3000 + '"bbox_2d": [1, 2, 3, 4]', "unread-places"),
    "another field": (json.dumps([{**FACE, "score": 0.5}]), "unsupported"),
    "a box and a point": (json.dumps([{**FACE, **HAND}]), "unsupported"),
    "a key in words": ("It is at bbox_2d: [6, 8, 30, 20].", "unread-places"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_places_that_cannot_be_read_are_refused(name: str, folder: Path):
    answer, reason = REFUSED[name]
    found = drafted(folder, row_of("llava", answer))
    assert isinstance(found, Bad) and found.reason == reason and found.got, found


@pytest.mark.parametrize("format", ["llava", "openai", "llama_factory", "ms_swift", "preference"])
def test_every_reader_of_answers_reads_their_places(format: str, folder: Path):
    found = drafted(folder, row_of(format, f"```json\n{LISTED}\n```"), format)
    assert isinstance(found, Draft), found
    [said] = [item for item in [*found.messages, *found.chosen] if item["role"] == "assistant"]
    assert places(said["parts"]) == [BOTH]
    several = drafted(folder, row_of(format, LISTED, pictures=2), format)
    assert isinstance(several, Bad) and (several.reason, several.got) == ("which-picture", "2 of them"), several


@pytest.mark.parametrize("rendering", ["chat", "document"])
def test_places_in_the_answer_of_a_table_are_read(rendering: str, folder: Path):
    row = {"image": "red.png", "question": "Where?", "answer": f"```json\n{LISTED}\n```", "coordinates": "thousand"}
    [found] = read("captions", write_lines(folder / "rows.jsonl", [row]), kind="caption", rendering=rendering)
    assert isinstance(found, Draft), found
    assert (places(found.messages[-1]["parts"][-1:]), found.units) == ([BOTH], "thousand")


def test_the_picture_meant_is_the_only_one_shown_before(folder: Path):
    turns = ["<image>Where?", LISTED, "<image>And here?", "Nowhere."]
    row = row_of("llava", "", pictures=2)
    row["conversations"] = [{"from": ("human", "gpt")[at % 2], "value": value} for at, value in enumerate(turns)]
    found = drafted(folder, row)
    assert isinstance(found, Draft), found
    [part] = found.messages[1]["parts"]
    assert (part["media"], places([part])) == (0, [BOTH])


def test_places_without_a_picture_and_in_questions_stay_text_and_are_counted(folder: Path):
    rows = [row_of("llava", LISTED, pictures=0), row_of("llava", "Words."), row_of("llava", LISTED)]
    rows[1]["conversations"][0]["value"] += f" Like {LISTED}?"
    path = write_lines(folder / "rows.jsonl", [{**row, "id": str(at)} for at, row in enumerate(rows)])
    source = a_source("llava", path, kind="instruction", rendering="chat")
    prepare_data(a_recipe(source, NO_TOKENIZER), str(folder / "out"))
    funnel = storage.read_json(storage.join(str(folder / "out"), "data", "funnel.json"))["mine"]["train"]
    assert (funnel["kept"], funnel["bad"], funnel["noted"]) == (3, {}, {"places-as-text": 2})


def test_a_fenced_box_beyond_the_picture_is_refused(folder: Path):
    answer = '```json\n[{"bbox_2d": [6, 8, 3000, 20], "label": "face"}]\n```'
    path = write_lines(folder / "rows.jsonl", [row_of("llava", answer)])
    with pytest.raises(DataError, match="outside-picture"):
        prepare_data(a_recipe(a_source("llava", path, kind="instruction", rendering="chat")), str(folder / "out"))
