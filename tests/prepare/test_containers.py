"""Readers of containers on files as people have them: WebDataset tars, this project's shards, Parquet tables."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.prepare import embedded
from pipelines.prepare.describe import draft_to_json, inspect
from pipelines.prepare.formats.rows import Bad, Draft
from pipelines.prepare.ingest import prepare_data, source_uri
from tests.prepare.builders import a_recipe, a_source, write_lines
from tests.prepare.test_text_formats import SHEEP, SWIFT, folder, good, rows_of, said
from tests.prepare.through import Made, made, trained
from trainer.data.sample import from_json
from trainer.data.shards import Source
from trainer.errors import DataError

__all__ = ["folder"]  # the fixture

# ---------------------------------------------------------------- WebDataset


def a_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_webdataset_pictures_with_texts_and_objects(folder: Path):
    png, jpg = (folder / "red.png").read_bytes(), (folder / "blue.jpg").read_bytes()
    talk = {
        "conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "both"}],
        "image": "lost.jpg",
    }
    files = {
        "a/0001.jpg": jpg, "a/0001.txt": b"a blue field", "a/0001.cls": b"3",
        "a/0002.0.png": png, "a/0002.1.jpg": jpg, "a/0002.json": json.dumps(talk).encode(),
        "a/0003.png": png, "a/0003.json": b'{"caption": "from json", "url": "x"}',
        "a/0004.mp4": (folder / "clip.mp4").read_bytes(), "a/0004.txt": b"a clip",
    }  # fmt: skip
    path = a_tar(folder / "000.tar", files)
    found = [good(item)[0] for item in made(rows_of("webdataset", path, "caption", "document"), "caption")]
    assert [sample.id for sample in found] == ["a/0001", "a/0002", "a/0003", "a/0004"]
    assert said(found[0]) == [("document", [("image", 0), "a blue field"])]
    assert said(found[1]) == [("document", [("image", 0), ("image", 1), "?", "both"])]
    assert said(found[2]) == [("document", [("image", 0), "from json"])]
    assert said(found[3]) == [("document", [("video", 0), "a clip"])]
    sample, data = good(made(rows_of("webdataset", path, "caption", "document"), "caption")[1])
    assert data == [png, jpg]
    assert "both" in trained(sample, data, folder, "document")[0].targets


def test_webdataset_faults_cost_their_sample_and_a_cut_tar_is_told(folder: Path):
    png = (folder / "red.png").read_bytes()
    files = {
        "1.png": png, "1.json": b"{", "2.png": png, "3.txt": b"words", "4.png": b"no", "4.txt": b"x",
        "5.png": png, "5.txt": b"\xff", "6.png": png, "6.txt": b"good",
    }  # fmt: skip
    path = a_tar(folder / "000.tar", files)
    found = made(rows_of("webdataset", path, "caption", "document"), "caption")
    reasons = [item.reason if isinstance(item, Bad) else "" for item in found]
    assert reasons == ["bad-json", "wrong-form", "wrong-form", "damaged-media", "not-utf8", ""]
    assert found[0].where == f"{path}, 1"  # type: ignore[union-attr]
    data = path.read_bytes()
    for length, got in ((512 + 30, "unexpected end"), (512 * 4, "no end mark")):
        path.write_bytes(data[:length])
        last = rows_of("webdataset", path, "caption", "document")[-1]
        assert isinstance(last, Bad) and last.reason == "damaged-tar" and got in last.got, last
    with pytest.raises(DataError, match="compressed tar"):
        rows_of("webdataset", folder / "000.tar.gz", "caption", "document")


def test_our_own_shards_are_read_back_as_they_were(folder: Path):
    rows = [{**SWIFT, "id": "swift"}, {**SHEEP, "id": "sheep"}]
    path = write_lines(folder / "rows.jsonl", rows)
    first, second = str(folder / "one"), str(folder / "two")
    prepare_data(
        a_recipe(a_source("ms_swift", path, kind="grounding", rendering="chat"), "model.tokenizer=nowhere"), first
    )
    shards = source_uri(first, "mine", "train")
    again = a_source("auto", shards, kind="grounding", rendering="chat")
    prepare_data(a_recipe(again, "model.tokenizer=nowhere"), second)
    before, after = Source.open(shards), Source.open(source_uri(second, "mine", "train"))
    assert [before.sample(0, row).messages for row in range(2)] == [after.sample(0, row).messages for row in range(2)]
    assert [m.digest for m in before.sample(0, 1).media] == [m.digest for m in after.sample(0, 1).media]


# ---------------------------------------------------------------- Parquet


def test_parquet_of_a_hub_with_pictures_in_its_columns(folder: Path):
    png, jpg = (folder / "red.png").read_bytes(), (folder / "blue.jpg").read_bytes()
    turns = [{"from": "human", "value": "<image>\n<image>which?"}, {"from": "gpt", "value": "the first"}]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("images", pa.list_(image)),
            ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
            ("score", pa.float64()),
        ]
    )
    shown = [{"bytes": png, "path": None}, {"bytes": None, "path": "blue.jpg"}]
    rows = [{"id": f"r{number}", "images": shown, "conversations": turns, "score": None} for number in range(5)]
    rows[3]["images"] = shown[:1]
    path = folder / "train.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=2)
    drafts = rows_of("parquet", path)
    found = _with_root(drafts, str(folder))
    assert isinstance(found[3], Bad) and found[3].reason == "placeholder-without-media"
    assert found[3].where == f"{path}, row 3"
    sample, files = good(found[4])
    assert files == [png, jpg] and sample.id == "r4"
    assert said(sample) == [("user", [("image", 0), ("image", 1), "which?"]), ("assistant", ["the first"])]
    assert trained(sample, files, folder)[0].targets == "the first\n"


def _with_root(drafts: list[Draft | Bad], root: str) -> list[Made | Bad]:
    found: list[Made | Bad] = []
    for row in drafts:
        if isinstance(row, Bad):
            found.append(row)
            continue
        text, files = inspect(draft_to_json(row, source="mine", kind="instruction", split="train", media_root=root))
        answer = json.loads(text)
        found.append(Bad(**answer["bad"]) if "bad" in answer else (from_json(answer["sample"]), list(files)))
    return found


def test_parquet_columns_of_bytes_of_one_picture_and_of_text(folder: Path):
    png = (folder / "red.png").read_bytes()
    table = pa.table({"image": [png, b"", None], "question": ["what?"] * 3, "answer": ["red"] * 3})
    pq.write_table(table, folder / "vqa.parquet")
    first, second, third = made(rows_of("parquet", folder / "vqa.parquet"), "instruction")
    assert said(good(first)[0]) == [("user", [("image", 0), "what?"]), ("assistant", ["red"])]
    assert isinstance(second, Bad) and second.reason == "damaged-media"
    assert isinstance(third, Bad) and third.reason == "wrong-form"
    pq.write_table(pa.table({"text": ["one", "two"]}), folder / "text.parquet")
    texts = made(rows_of("parquet", folder / "text.parquet", "text", "document"), "text")
    assert [said(good(item)[0]) for item in texts] == [[("document", ["one"])], [("document", ["two"])]]


def test_parquet_reads_each_row_group_once_and_a_damaged_file_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    png = (folder / "red.png").read_bytes()
    table = pa.table({"image": [png] * 8, "caption": ["x"] * 8})
    path = folder / "c.parquet"
    pq.write_table(table, path, row_group_size=4, write_page_checksum=True)
    embedded._column.cache_clear()
    made(rows_of("parquet", path, "caption", "document"), "caption")
    assert embedded._column.cache_info().misses == 2
    path.write_bytes(b"PAR1" + path.read_bytes()[4:100])
    with pytest.raises(DataError, match="not a Parquet file"):
        rows_of("parquet", path, "caption", "document")
    pq.write_table(pa.table({"image": [png]}), path)
    with pytest.raises(DataError, match="without words"):
        rows_of("parquet", path, "caption", "document")
