"""Rows and media in object storage: a real S3 server, through the same readers, whole files and parts of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.cli.main import main
from pipelines.prepare.formats import format_of
from tests.prepare.builders import a_picture, write_lines
from tests.prepare.test_containers import a_tar
from tests.state.weed import BUCKET, program, s3_server
from trainer import storage
from trainer.data.shards import ShardReader, Source

pytestmark = pytest.mark.skipif(program() is None, reason="the dev extra carries SeaweedFS")
RED, BLUE = a_picture(), a_picture(100, 200, "blue", "JPEG")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """s3://.../data with pictures, a tar and a table of them."""
    folder = tmp_path_factory.mktemp("files")
    root = f"s3://{BUCKET}/data"
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    shown = pa.array([{"bytes": RED, "path": None}, {"bytes": None, "path": "blue.jpg"}], image)
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": shown, "caption": ["red", "blue"]}), sink)
    tar = a_tar(folder / "a.tar", {"1.png": RED, "1.txt": b"red", "2.jpg": BLUE, "2.txt": b"blue"})
    with s3_server(tmp_path_factory.mktemp("weed")):
        files = {"red.png": RED, "blue.jpg": BLUE, "tar/a.tar": tar.read_bytes(), "table/t.parquet": sink.getvalue()}
        for name, data in files.items():
            storage.write_bytes(f"{root}/{name}", data)
        yield root


def ingest(*words: object) -> int:
    return main(["data", "ingest", *map(str, words)])


def media(uri: str) -> list[list[bytes]]:
    source = Source.open(uri)
    return [ShardReader(source).media(0, row) for row in range(source.num_samples)]


def test_openai_messages_take_s3_data_and_relative_addresses(bucket: str, tmp_path: Path):
    inline = f"data:image/png;base64,{base64.b64encode(RED).decode()}"
    shown = [{"type": "image_url", "image_url": {"url": url}} for url in (f"{bucket}/blue.jpg", inline, "red.png")]
    answer = {"role": "assistant", "content": "three"}
    row = {"messages": [{"role": "user", "content": [*shown, {"type": "text", "text": "how many?"}]}, answer]}
    path = write_lines(tmp_path / "rows.jsonl", [row])
    assert ingest(path, "--out", tmp_path / "out", "--media", bucket) == 0
    assert media(str(tmp_path / "out")) == [[BLUE, RED, RED]]
    [blue, _, red] = Source.open(str(tmp_path / "out")).sample(0, 0).media
    assert (blue.width, blue.height) == (100, 200) and blue.origin == "blue.jpg" and red.origin == "red.png"


@pytest.mark.parametrize(("folder", "format"), [("tar/a.tar", "webdataset"), ("table/t.parquet", "parquet")])
def test_parts_of_a_remote_file_are_read_where_they_lie(folder: str, format: str, bucket: str, tmp_path: Path):
    assert format_of("auto", f"{bucket}/{folder}") == format
    out = f"{bucket}-out/{format}"
    words = ["--out", out, "--media", bucket, "--kind", "caption", "--rendering", "document"]
    assert ingest(f"{bucket}/{folder.split('/')[0]}", *words) == 0
    assert media(out) == [[RED], [BLUE]]
    assert main(["data", "check", out]) == 0
    assert main(["data", "preview", out, "--html", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().count("<svg") == 2


def test_what_is_not_there_is_one_bad_row(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = write_lines(tmp_path / "rows.jsonl", [{"image": f"{bucket}/gone.png", "caption": "x"}])
    assert ingest(path, "--out", tmp_path / "out") == 64
    assert "1 missing-media" in capsys.readouterr().err
    assert ingest(f"{bucket}/gone.jsonl", "--out", tmp_path / "out") == 64
    assert "no such annotation file" in capsys.readouterr().err
