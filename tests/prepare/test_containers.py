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
from pipelines.prepare.formats.rows import Bad, Draft
from pipelines.prepare.ingest import prepare_data, source_uri
from tests.prepare.builders import a_picture, a_recipe, a_source, write_lines
from tests.prepare.test_text_formats import SHEEP, SWIFT, folder, good, rows_of, said
from tests.prepare.through import made, trained
from trainer.data.shards import ShardReader, Source
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


def test_webdataset_as_img2dataset_writes_it(folder: Path):
    """Its KEY.json numbers the row in a field `key`, which is no answer key."""
    facts = {"caption": "a blue field", "url": "https://example.org/1.jpg", "key": "000000000", "status": "success"}
    facts |= {"error_message": None, "width": 100, "height": 200, "exif": "{}", "sha256": "0" * 64, "uid": "x"}
    jpg = (folder / "blue.jpg").read_bytes()
    files = {"000000000.jpg": jpg, "000000000.txt": b"a blue field", "000000000.json": json.dumps(facts).encode()}
    path = a_tar(folder / "00000.tar", files)
    [found] = [good(item)[0] for item in made(rows_of("webdataset", path, "caption", "document"), "caption")]
    assert (said(found), found.key) == ([("document", [("image", 0), "a blue field"])], None)


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


@pytest.mark.parametrize("cut", ["a damaged header", "two archives"])
def test_webdataset_what_lies_behind_a_damaged_header_or_an_end_is_told(cut: str, folder: Path):
    png = (folder / "red.png").read_bytes()
    files = {f"{number}.{ending}": png if ending == "png" else b"x" for number in range(5) for ending in ("png", "txt")}
    path = a_tar(folder / "000.tar", files)
    whole = path.read_bytes()
    assert not any(isinstance(row, Bad) for row in rows_of("webdataset", path, "caption", "document"))
    if cut == "two archives":
        path.write_bytes(whole * 2)
        want, kept = "another archive", 5
    else:
        with tarfile.open(path) as archive:
            at = archive.getmember("2.png").offset
        path.write_bytes(whole[:at] + b"\xff" * 512 + whole[at + 512 :])
        want, kept = f"a damaged header or another archive behind byte {at}", 2
    *rows, last = rows_of("webdataset", path, "caption", "document")
    assert len(rows) == kept and not any(isinstance(row, Bad) for row in rows)
    assert isinstance(last, Bad) and last.reason == "damaged-tar" and want in last.got


def test_webdataset_pictures_go_by_their_numbers_and_only_those_of_the_sample_count(folder: Path):
    colours = {number: a_picture(colour=f"#0000{number:02x}") for number in (0, 1, 2, 10)}
    files = {f"k.{number}.png": colours[number] for number in (0, 1, 10, 2)}
    files |= {"k.depth.png": a_picture(), "k.mask.png": a_picture(), "k.txt": b"four"}
    [(sample, data)] = map(good, made(rows_of("webdataset", a_tar(folder / "0.tar", files), "caption"), "caption"))
    assert data == [colours[number] for number in (0, 1, 2, 10)]
    assert sum(part.part == "image" for message in sample.messages for part in message.parts) == 4


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_webdataset_a_link_in_the_place_of_a_picture_makes_the_row_bad(kind: bytes, folder: Path):
    path = a_tar(folder / "0.tar", {"0.png": a_picture(), "0.txt": b"x", "1.txt": b"y"})
    with tarfile.open(path, "a") as archive:
        for name in ("1.png", "1.cls"):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.png"
            archive.addfile(info)
    first, second = rows_of("webdataset", path, "caption", "document")
    assert isinstance(first, Draft)
    assert isinstance(second, Bad) and second.reason == "not-a-file" and "1.png" in second.expected


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
    found = made(drafts, "instruction", media_root=str(folder))
    assert isinstance(found[3], Bad) and found[3].reason == "placeholder-without-media"
    assert found[3].where == f"{path}, row 3"
    sample, files = good(found[4])
    assert files == [png, jpg] and sample.id == "r4"
    assert said(sample) == [("user", [("image", 0), ("image", 1), "which?"]), ("assistant", ["the first"])]
    assert trained(sample, files, folder)[0].targets == "the first\n"


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


def test_parquet_columns_of_bytes_are_text_or_the_row_is_bad(folder: Path):
    table = pa.table({"id": ["a", "b"], "text": pa.array(["größer".encode(), b"\xff\xfe"], pa.binary())})
    pq.write_table(table, folder / "text.parquet")
    first, second = made(rows_of("parquet", folder / "text.parquet", "text", "document"), "text")
    assert said(good(first)[0]) == [("document", ["größer"])]
    assert isinstance(second, Bad) and second.reason == "not-utf8" and "column text" in second.expected


def test_parquet_pictures_beside_the_table_are_those_of_its_own_folder(folder: Path):
    """Two folders with a table each: cells without bytes, with them, and a list of both; wherever the data lie."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("images", pa.list_(image)), ("caption", pa.string())])
    digests = []
    for place in ("here", "there"):
        for name in ("blue", "green"):
            inside = folder / place / name
            inside.mkdir(parents=True)
            (inside / "x.png").write_bytes(a_picture(colour=name))
            outside, within = {"bytes": None, "path": "x.png"}, {"bytes": a_picture(colour="red"), "path": "x.png"}
            rows = [{"id": f"{name}{n}", "images": shown, "caption": "c"}
                    for n, shown in enumerate(([outside], [within], [outside, within]))]  # fmt: skip
            pq.write_table(pa.Table.from_pylist(rows, schema), inside / "t.parquet")
        out = str(folder / f"out-{place}")
        tables = a_source("parquet", folder / place / "*" / "t.parquet", kind="caption", rendering="document")
        prepare_data(a_recipe(tables, "model.tokenizer=nowhere"), out)
        digests.append(Source.open(source_uri(out, "mine", "train")).digest)
    source = Source.open(source_uri(out, "mine", "train"))
    reader = ShardReader(source)
    red, blue, green = (a_picture(colour=name) for name in ("red", "blue", "green"))
    assert [reader.media(0, row) for row in range(6)] == [[blue], [red], [blue, red], [green], [red], [green, red]]
    assert [source.sample(0, row).media[0].origin for row in (0, 3)] == ["blue/x.png", "green/x.png"]
    assert digests[0] == digests[1]
