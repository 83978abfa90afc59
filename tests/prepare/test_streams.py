"""JSON files as streams: the same values and errors, wherever what was read ends, and memory that does not grow."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.prepare.formats import streams
from pipelines.prepare.formats.coco_file import coco_file
from pipelines.prepare.formats.rows import Bad, json_document, json_entries
from pipelines.prepare.formats.streams import JsonStream, TooMuch
from trainer.errors import DataError


def stream_of(text: str | bytes) -> JsonStream:
    return JsonStream(io.BytesIO(text if isinstance(text, bytes) else text.encode()), "rows.json")


def some_value(draw: random.Random, depth: int = 0) -> Any:
    plain = [
        True,
        None,
        1,
        -12.5e-7,
        12345678901234567890,
        "",
        'a "quoted" \\ word',
        "häßlich 漢字 😀",
        "line\nfeed",
        "]}",
    ]
    if depth == 4 or draw.random() < 0.4:
        return draw.choice(plain)
    inside = [some_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return inside if draw.random() < 0.5 else {f"k{n}": value for n, value in enumerate(inside)}


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 1])
def test_values_are_those_of_json_loads_wherever_a_chunk_ends(
    chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "CHUNK", chunk)
    draw = random.Random(chunk)
    for escaped in (True, False):
        values = [some_value(draw) for _ in range(60)]
        text = json.dumps(values, indent=indent, ensure_ascii=escaped)
        stream = stream_of("\ufeff \n" + text + " \n")
        assert list(stream.entries()) == values
        stream.end()
        document = {"first": values, "second": 17, "third": {"x": values[:3]}}
        stream = stream_of(json.dumps(document, indent=indent, ensure_ascii=escaped))
        assert stream.beginning(5) == {**document, "first": values[:5]}
        stream.end()


BROKEN = {
    "a comma is missing": ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3, "Expecting ',' delimiter"),
    "a name without quotes": ('[{"a": 1},\n{a: 2}]', 2, "Expecting property name enclosed in double quotes"),
    "the end is cut": ('[{"a": 1},\n\n{"a": "tw', 3, "Unterminated string starting at"),
    "the list has no end": ('[{"a": 1},\n{"a": 2}\n', 3, "Expecting ',' delimiter"),
    "something follows": ('[{"a": 1}]\n\n[]', 3, "Extra data"),
    "a last comma": ('[{"a": 1},\n]', 2, "Expecting value"),
    "a line feed in a string": ('[{"a": 1},\n{"a": "x\ny"}]', 2, "Invalid control character at"),
}


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_told_with_its_line_as_json_loads_tells_it(
    what: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "CHUNK", chunk)
    text, line, said = BROKEN[what]
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError) as found:
        list(json_entries(str(tmp_path / "rows.json")))
    assert f"rows.json, line {line}" in str(found.value) and said in str(found.value)
    with pytest.raises(json.JSONDecodeError) as theirs:
        json.loads(text)
    assert theirs.value.msg == said and theirs.value.lineno == line


def test_bytes_that_are_no_text_are_told_with_their_place(tmp_path: Path):
    for data, place in ((b'["ok", "\xff"]', 8), ('["ok", "ä'.encode()[:-1], 8)):
        with pytest.raises(DataError, match=f"byte {place}"):
            list(stream_of(data).entries())


@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_an_entry_that_python_cannot_hold_costs_only_itself(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "CHUNK", chunk)
    deep = "[" * 100_000 + '"]\\""' + "]" * 100_000
    path = tmp_path / "rows.json"
    path.write_text(f'[{{"a": 1}},\n{deep},\n{{"n": {"9" * 5000}}},\n{{"a": 2}}]')
    found = list(json_entries(str(path)))
    assert [value for _, value in found if not isinstance(value, Bad)] == [{"a": 1}, {"a": 2}]
    bad = [value for _, value in found if isinstance(value, Bad)]
    assert [(one.reason, one.where.rpartition("/")[2]) for one in bad] == [
        ("too-deep", "rows.json, line 2, entry 1"),
        ("bad-json", "rows.json, line 3, entry 2"),
    ]
    assert isinstance(next(iter(stream_of(f"[{deep}]").entries())), TooMuch)


@pytest.mark.parametrize("cut", range(14))
def test_a_string_that_is_read_in_two_pieces_does_not_end_what_is_passed_over(
    cut: int, monkeypatch: pytest.MonkeyPatch
):
    begin = f'[{{"n": {"9" * 5000}, "t": "'
    monkeypatch.setattr(streams, "CHUNK", len(begin) + cut)
    found = list(stream_of(begin + r'a}, \\\"]]}, b"}, {"a": 1}]').entries())
    assert isinstance(found[0], TooMuch) and found[1:] == [{"a": 1}]


# ---------------------------------------------------------------- COCO


@pytest.mark.parametrize("order", [("images", "annotations", "categories"), ("categories", "annotations", "images")])
def test_what_belongs_to_an_image_is_found_wherever_it_stands(order: tuple[str, ...], tmp_path: Path):
    parts = {
        "images": [{"id": 1, "file_name": "a"}, {"id": "1", "file_name": "b"}, {"file_name": "c"}, {"id": 2}],
        "annotations": [{"id": 9, "image_id": 2}, {"id": 8, "image_id": 1}, {"id": 7, "image_id": 2}, 5,
                        {"id": 6, "image_id": 3}, {"id": 5, "image_id": "1"}, {"id": 4, "image_id": 1.0}],
        "categories": [{"id": 1, "name": "x"}, {"name": "y"}],
    }  # fmt: skip
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"info": {"year": 1}, **{name: parts[name] for name in order}, "licenses": []}))
    with coco_file(str(path)) as found:
        assert [image for _, image in found.images()] == parts["images"]
        assert [[one["id"] for one in found.annotations(of)] for of in (1, "1", 2, 3, None)] == [
            [8, 4],
            [5],
            [9, 7],
            [6],
            [],
        ]
        assert [bad.where.rpartition(", ")[2] for bad in found.strangers()] == ["annotations[3]", "annotations[4]"]
        assert found.names == {1: "x"} and [bad.reason for bad in found.faults] == ["wrong-form"]
        assert found.annotation(7) == {"id": 7, "image_id": 2} and found.annotation("7") is None
        assert found.annotation(7.0) == found.annotation(7) and found.image(1.0) == found.image(1)
        assert found.image("1") == {"id": "1", "file_name": "b"}


@pytest.mark.parametrize(("content", "told"), [("[1]", "list"), ('{"images": {}}', "images: a list"), ("{", "line 1")])
def test_another_form_is_one_error(content: str, told: str, tmp_path: Path):
    (tmp_path / "coco.json").write_text(content)
    with pytest.raises(DataError, match=told), coco_file(str(tmp_path / "coco.json")):
        pass


# ---------------------------------------------------------------- memory

PROGRAM = """
import sys
from pipelines.prepare.formats import recognise
from pipelines.prepare.formats.coco import read
from pipelines.prepare.formats.llava import read as rows
from tests.memory import peak_kb
from trainer.recipe import Source
mine = Source(format="coco", path=sys.argv[1], kind="grounding", rendering="chat")
base = peak_kb()
name, _ = recognise(sys.argv[1], ("coco", "llava", "text"))
count = sum(1 for _ in (read if name == "coco" else rows)(sys.argv[1], "media", mine))
print(name, count, peak_kb() - base)
"""


@pytest.mark.parametrize("name", ["coco", "llava"])
def test_files_of_many_megabytes_are_recognised_and_read_in_a_third_of_that(name: str, tmp_path: Path):
    path, num = tmp_path / "big.json", 15_000
    with path.open("w") as file:
        if name == "llava":
            turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a" * 4000}]
            file.write(f"[{', '.join(json.dumps({'id': n, 'conversations': turns}) for n in range(num))}]")
        else:
            ring = [float(n % 50) + 0.25 for n in range(400)]
            file.write('{"annotations": [')
            for number in range(num):
                thing = {"id": number, "image_id": number, "category_id": 1, "bbox": [1, 1, 9, 9]}
                file.write(f"{', ' if number else ''}{json.dumps({**thing, 'segmentation': [ring]})}")
            images = [{"id": n, "file_name": "x.png", "width": 60, "height": 60} for n in range(num)]
            file.write(f'], "images": {json.dumps(images)}, "categories": [{{"id": 1, "name": "x"}}]}}')
    assert path.stat().st_size > 30e6
    words = [sys.executable, "-c", PROGRAM, str(path)]
    found, count, grown_kb = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    assert (found, count) == (name, str(num)) and int(grown_kb) * 1024 < path.stat().st_size / 3, grown_kb


@pytest.mark.parametrize("before", ['[{"id": "é€"}, ', f'[{{"id": "{"é" * (3 << 19)}"}}, '])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_what_is_broken_on_one_long_line_is_told_with_its_byte(before: str, mark: str, tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_bytes((mark + before + '{"id": nothing}]').encode())
    with pytest.raises(DataError) as error:
        list(json_entries(str(path)))
    place = len((mark + before + '{"id": ').encode())
    assert f"rows.json, line 1, byte {place}\n" in str(error.value) and '{"id": nothing}]' in str(error.value)
    assert "do: mend the file there" in str(error.value)


def test_a_document_that_is_broken_is_told_with_its_column(tmp_path: Path):
    path = tmp_path / "refs.json"
    path.write_text('{"a": 1,\n "b": nothing}')
    with pytest.raises(DataError) as error:
        json_document(str(path))
    told = str(error.value)
    assert "refs.json, line 2, column 7\n" in told and '"b": nothing}' in told and "do: mend the file there" in told
