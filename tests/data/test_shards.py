"""Shards: every byte is verified, plain tools read them, and writing twice gives the same files."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile

import pyarrow as pa
import pytest

from tests.data.builders import a_caption, a_clip, a_source, a_text
from trainer import cache, storage
from trainer.data.sample import from_json
from trainer.data.shards import MANIFEST, ShardReader, ShardWriter, Source, read_column, write_column
from trainer.errors import ShardError

SAMPLES = [a_caption(0), a_text(0), a_caption(1), a_clip(0, 6), a_caption(2)]


def files_of(folder) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(os.listdir(folder))}


def test_what_was_written_is_read_back(tmp_path):
    source = a_source(str(tmp_path), SAMPLES, shard_bytes=8192)
    assert source.num_shards > 1 and source.num_samples == 5
    reader = ShardReader(source)
    found = []
    for shard in range(source.num_shards):
        for row in range(source.index(shard).num_rows):
            found.append((source.sample(shard, row), reader.media(shard, row)))
    reader.close()
    assert found == SAMPLES


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in "ab":
        a_source(str(tmp_path / name), SAMPLES, shard_bytes=8192)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    a_source(str(tmp_path / "c"), SAMPLES[::-1], shard_bytes=8192)  # negative control
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_plain_tarfile_groups_members_by_key_as_webdataset_does(tmp_path):
    a_source(str(tmp_path), SAMPLES)
    groups: dict[str, dict[str, bytes]] = {}
    with tarfile.open(tmp_path / "00000.tar") as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None and member.mtime == 0
            groups.setdefault(key, {})[ending] = file.read()
    assert [from_json(group["json"]) for group in groups.values()] == [sample for sample, _ in SAMPLES]
    first = next(iter(groups.values()))
    assert first["0.png"] == SAMPLES[0][1][0]


def test_one_flipped_bit_in_any_byte_of_a_row_is_an_error_with_shard_and_row(tmp_path):
    source = a_source(str(tmp_path), SAMPLES)
    place = {name: source.index(0)[name][2].as_py() for name in ("offset", "size")}
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    for offset in (0, 100, place["size"] // 2, place["size"] - 1):
        damaged = bytearray(whole)
        damaged[place["offset"] + offset] ^= 1
        path.write_bytes(damaged)
        reader = ShardReader(source)
        with pytest.raises(ShardError, match="not what was written") as told:
            reader.media(0, 2)
        assert "shard 0, row 2, sample caption-1" in str(told.value) and told.value.code == 66
        assert reader.media(0, 0) == SAMPLES[0][1]  # other rows are whole
    path.write_bytes(whole)
    assert ShardReader(source).media(0, 2) == SAMPLES[2][1]  # negative control


def test_a_truncated_or_missing_shard_is_an_error(tmp_path):
    source = a_source(str(tmp_path), SAMPLES)
    path = tmp_path / "00000.tar"
    os.truncate(path, 1000)
    with pytest.raises(ShardError, match="row 4"):
        ShardReader(source).media(0, 4)
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        ShardReader(source).media(0, 4)


def test_a_damaged_index_or_manifest_is_an_error(tmp_path):
    a_source(str(tmp_path), SAMPLES)
    index = tmp_path / "00000.index.parquet"
    whole = index.read_bytes()
    index.write_bytes(whole[:-10] + bytes([whole[-10] ^ 1]) + whole[-9:])
    with pytest.raises(ShardError, match="index is not what was written"):
        Source.open(str(tmp_path)).index(0)
    index.unlink()
    with pytest.raises(ShardError, match="missing"):
        Source.open(str(tmp_path)).index(0)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "num_samples": 6}))
    with pytest.raises(ShardError, match="manifest was changed"):
        Source.open(str(tmp_path))
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ShardError, match="another format"):
        Source.open(str(tmp_path))


def test_a_source_without_a_manifest_is_not_finished(tmp_path):
    writer = ShardWriter(str(tmp_path), shard_bytes=4096)
    writer.add(*SAMPLES[0])
    writer.abort()
    with pytest.raises(ShardError, match="not finished"):
        Source.open(str(tmp_path))


def test_media_that_are_not_the_samples_are_refused(tmp_path):
    writer = ShardWriter(str(tmp_path), shard_bytes=4096)
    sample, _ = SAMPLES[0]
    with pytest.raises(ShardError, match="not what the sample names"):
        writer.add(sample, [b"other"])
    with pytest.raises(ShardError, match="not complete"):
        writer.add(sample, [])
    writer.abort()


def test_a_source_elsewhere_is_fetched_shard_by_shard_into_a_bounded_cache(tmp_path):
    source = a_source("memory://bucket/source", SAMPLES, shard_bytes=4096)
    assert source.num_shards > 2
    cache = tmp_path / "cache"
    reader = ShardReader(source, cache_dir=str(cache), cache_bytes=1)
    places = [(shard, row) for shard in range(source.num_shards) for row in range(source.index(shard).num_rows)]
    for _ in range(2):
        assert [reader.media(*place) for place in places] == [files for _, files in SAMPLES]
        assert len(os.listdir(cache)) == 1  # the cap holds, and the shard in use stays
    reader.close()
    with pytest.raises(ShardError, match="not finished"):
        Source.open("memory://bucket/nothing")


def test_ranks_share_the_bounded_node_cache_and_fetch_again_what_was_dropped(tmp_path, monkeypatch):
    source = a_source("memory://bucket/shared", SAMPLES, shard_bytes=4096)
    monkeypatch.setenv(cache.DIR, str(tmp_path))
    monkeypatch.setenv(cache.BYTES, "8192")
    monkeypatch.setattr(cache, "YOUNG_S", 0.0)
    readers = [ShardReader(source, cache_bytes=1) for _ in range(2)]
    places = [(shard, row) for shard in range(source.num_shards) for row in range(source.index(shard).num_rows)]
    downloads: list[str] = []
    real = storage.download_file
    monkeypatch.setattr(storage, "download_file", lambda uri, path: downloads.append(uri) or real(uri, path))
    for place, (_, files) in zip(places, SAMPLES, strict=True):
        assert [reader.media(*place) for reader in readers] == [files, files]
        assert sum(path.stat().st_size for path in (tmp_path / "shards").iterdir()) <= 8192 + 4096
    assert len(downloads) == source.num_shards, "the second rank finds what the first one fetched"
    assert readers[0].media(*places[0]) == SAMPLES[0][1] and len(downloads) == source.num_shards + 1
    for reader in readers:
        reader.close()
    left = list((tmp_path / "shards").iterdir())
    assert left, "it outlives its readers"
    gone = os.unlink
    real_fetch, turns = cache.fetch, []

    def dropped(uri, path, *, size_bytes):
        real_fetch(uri, path, size_bytes=size_bytes)
        if not turns:
            gone(path)
        turns.append(path)

    monkeypatch.setattr(cache, "fetch", dropped)
    reader = ShardReader(source)
    assert reader.media(*places[0]) == SAMPLES[0][1] and len(turns) == 2
    reader.close()


def test_what_lies_damaged_in_the_cache_is_fetched_again_and_damage_at_its_origin_is_an_error(tmp_path):
    source = a_source("memory://bucket/damaged", SAMPLES)
    ShardReader(source, cache_dir=str(tmp_path)).media(0, 0)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[600] ^= 1
    file.write_bytes(data)
    assert ShardReader(source, cache_dir=str(tmp_path)).media(0, 0) == SAMPLES[0][1]
    storage.write_bytes("memory://bucket/damaged/00000.tar", bytes(data))
    file.write_bytes(data)
    with pytest.raises(ShardError, match="row 0"):
        ShardReader(source, cache_dir=str(tmp_path)).media(0, 0)


def test_a_column_is_read_only_with_its_key_and_its_number_of_rows(tmp_path):
    source = a_source(str(tmp_path), SAMPLES)
    table = pa.table({"tokens": [1, 2, 3, 4, 5]})
    write_column(source.uri, 0, "counts", table, key="k1")
    assert read_column(source.uri, 0, "counts", "k1", num_rows=5) == table
    assert read_column(source.uri, 0, "counts", "k2") is None
    assert read_column(source.uri, 0, "scores", "k1") is None
    with pytest.raises(ShardError, match="not aligned"):
        read_column(source.uri, 0, "counts", "k1", num_rows=6)
    path = tmp_path / "00000.counts.parquet"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="cannot be read"):
        read_column(source.uri, 0, "counts", "k1")


def test_who_goes_in_order_keeps_two_indexes_and_others_keep_all(tmp_path):
    written = a_source(str(tmp_path), SAMPLES, shard_bytes=4096)
    count = written.num_shards
    assert count > 2
    bounded, whole = Source.open(str(tmp_path), keep_indexes=2), Source.open(str(tmp_path))
    for source, kept in ((bounded, [0, count - 1]), (whole, list(range(count)))):
        rows = [source.sample(shard, row) for shard in range(count) for row in range(source.index(shard).num_rows)]
        assert rows == [sample for sample, _ in SAMPLES]
        assert source.index(0).equals(whole.index(0))
        assert sorted(source._indexes) == kept
