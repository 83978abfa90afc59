"""`format: auto` knows every format by its first rows, and says what it looked at when it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare.annotations import annotation_files, annotations_among
from pipelines.prepare.formats import FORMATS, format_of, usual
from pipelines.prepare.ingest import prepare_data, source_uri
from tests.prepare.builders import a_caption, a_picture, a_recipe, a_source, write_lines
from tests.prepare.test_containers import a_tar
from tests.prepare.test_formats import GOOD, coco
from tests.prepare.test_text_formats import ALPACA, INSTANCES, MMC4, QWEN_VL, REF, SHAREGPT, SHEEP, SWIFT
from trainer.data.shards import Source
from trainer.errors import DataError

TRL = {"prompt": [{"role": "user", "content": "?"}], "chosen": "a", "rejected": "b"}
ROWS: list[tuple[str, Any]] = [
    *((name, GOOD[name]) for name in ("llava", "openai", "interleaved", "layout", "agent", "text")),
    ("llama_factory", GOOD["preference"]),
    ("llama_factory", ALPACA),
    ("llama_factory", SHAREGPT),
    ("ms_swift", SWIFT),
    ("ms_swift", SHEEP),
    ("ms_swift", {"messages": SHEEP["messages"], "rejected_response": "x"}),
    ("ms_swift", {"query": "?", "response": "x"}),
    ("qwen_vl", QWEN_VL),
    ("captions", {"image": "red.png", "caption": "x"}),
    ("captions", {"image": "red.png", "question": "?", "answer": "x"}),
    ("points", {"image": "red.png", "label": "x", "points": [{"x": 1, "y": 2}]}),
    ("mmc4", MMC4),
    ("preference", TRL),
    ("refcoco", REF),
]


@pytest.mark.parametrize(("format", "row"), ROWS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(ROWS)])
@pytest.mark.parametrize("form", ["lines", "list", "after a broken line"])
def test_rows_are_recognised(format: str, row: Any, form: str, tmp_path: Path):
    path = tmp_path / "rows.json"
    lines = f"{json.dumps(row)}\n" * 3
    path.write_text(
        {"lines": lines, "list": json.dumps([row, row], indent=1), "after a broken line": '{"id": \n' + lines}[form]
    )
    assert format_of("auto", str(path)) == format
    assert format_of("text", str(path)) == "text", "a format that is named is not questioned"


def test_files_of_other_kinds_are_recognised(tmp_path: Path):
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    (tmp_path / "coco.json").write_text(json.dumps(coco(), indent=1))
    told = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}
    (tmp_path / "captions.json").write_text(json.dumps(told))
    (tmp_path / "notes.md").write_text("# words")
    (tmp_path / "refs.p").write_bytes(b"\x80")
    a_tar(tmp_path / "0.tar", {"1.png": a_picture(), "1.txt": b"x"})
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "t.parquet")
    want = {"instances.json": "coco", "coco.json": "coco", "notes.md": "text", "refs.p": "refcoco"}
    want |= {"captions.json": "coco_captions", "0.tar": "webdataset", "t.parquet": "parquet"}
    assert {name: format_of("auto", str(tmp_path / name)) for name in want} == want


UNKNOWN = [
    ({"foo": 1, "bar": 2}, "not recognised", ["fields bar, foo", "llava", "--format NAME"]),
    ({**GOOD["llava"], "messages": GOOD["openai"]["messages"]}, "ambiguous", ["llava (", "openai (", "--format"]),
]


@pytest.mark.parametrize(("row", "what", "told"), UNKNOWN)
def test_what_is_not_recognised_says_what_was_looked_at(row: dict, what: str, told: list[str], tmp_path: Path):
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=what) as error:
        format_of("auto", str(path))
    assert all(word in str(error.value) for word in [*told, str(path)]), error.value


def test_an_empty_or_damaged_file_is_told(tmp_path: Path):
    for content, got in (("", "an empty file"), ('[{"id":', "no whole object"), ("[]", "no whole object")):
        (tmp_path / "rows.json").write_text(content)
        with pytest.raises(DataError, match=f"tells its format(.|\n)*{got}(.|\n)*--format NAME"):
            format_of("auto", str(tmp_path / "rows.json"))
    for name in ("a.tar", "a.parquet"):
        (tmp_path / name).write_bytes(b"no")
        with pytest.raises(DataError, match=r"not a (tar|Parquet) file"):
            format_of("auto", str(tmp_path / name))


def test_every_format_has_a_usual_kind_and_rendering():
    assert {name: usual(name)[1] for name in FORMATS}.items() >= {"llava": "chat", "mmc4": "document"}.items()
    assert usual("points")[0] == "grounding" and usual("android_control")[0] == "agent"


def test_files_that_other_readers_read_are_no_sources_of_their_own():
    assert annotations_among(["dataset_info.json", "a.json", "x.png"]) == ["a.json"]
    assert annotations_among(["instances.json", "refs.json"]) == ["refs.json"]
    assert annotations_among(["instances.json", "1.jpg"]) == ["instances.json"]
    assert annotations_among(["source.json", "input.json", "00000.tar", "00000.index.parquet"]) == ["00000.tar"]


ABOUT = ("README.md", "LICENSE", "dataset_infos.json", ".gitattributes", "._a.json", "LICENSE.txt")


def a_download(folder: Path, *names: str) -> Path:
    """A folder as a hub gives it, with these files beside those about the data."""
    for name in (*ABOUT, *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{json.dumps(GOOD['llava'])}\n")
    return folder


def test_a_folder_gives_its_annotation_files_and_says_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    names = ("a.json", "b.JSONL", "dataset_info.json", "photo.JPG", "table.csv", "images/1.jpg", "sub/c.jsonl")
    folder = a_download(tmp_path / "data", *names)
    found = annotation_files(str(folder), where="SOURCE")
    assert found == [str(folder / "a.json"), str(folder / "b.JSONL")]
    assert [format_of("auto", file) for file in found] == ["llava", "llava"]
    first, second = capsys.readouterr().out.splitlines()
    assert "left out: 7 files (._a.json, .gitattributes, LICENSE, LICENSE.txt and 3 more)" in first
    assert "not looked into: 2 folders (images, sub)" in second and f"{folder}/*/*.jsonl" in second
    named = annotation_files(str(folder / "*.csv"), where="SOURCE")
    assert (named, capsys.readouterr().out) == ([str(folder / "table.csv")], ""), "what is named is read"


def test_what_is_about_the_data_is_read_only_where_there_is_nothing_else(tmp_path: Path):
    folder = a_download(tmp_path / "data")
    want = ["LICENSE.txt", "README.md", "dataset_infos.json"]
    assert [Path(file).name for file in annotation_files(str(folder), where="SOURCE")] == want
    a_download(folder, "data/train.parquet")
    with pytest.raises(DataError, match=r"it has the folders data(.|\n)*name the folder, or a glob: .*/data/data"):
        annotation_files(str(folder), where="SOURCE")


def test_endings_may_be_in_capitals(tmp_path: Path):
    a_tar(tmp_path / "0.TAR", {"1.png": a_picture(), "1.txt": b"x"})
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "t.PARQUET")
    (tmp_path / "R.PDF").write_bytes(b"%PDF-")
    want = {"0.TAR": "webdataset", "t.PARQUET": "parquet", "R.PDF": "pdf"}
    assert {name: format_of("auto", str(tmp_path / name)) for name in annotations_among(want)} == want


def test_a_recipe_may_say_auto_for_a_folder_of_several_formats(media: Path):
    write_lines(media / "data" / "a.jsonl", [a_caption(1, image=str(media / "red.png"))])
    (media / "data" / "red.png").write_bytes(a_picture())
    a_tar(media / "data" / "c.tar", {"t.png": a_picture(), "t.txt": b"x"})
    write_lines(media / "data" / "b.jsonl", [SWIFT])
    source = a_source("auto", media / "data", kind="instruction", rendering="document")
    prepare_data(a_recipe(source, "model.tokenizer=nowhere"), str(media / "out"))
    assert [Source.open(source_uri(str(media / "out"), "mine", "train")).sample(0, n).id for n in range(3)] == [
        "c1",
        "b.jsonl#1",
        "c.tar/t",
    ]
