"""Shards: tar files with media and the samples' JSON, an index and columns beside them. Writer and reader together.

    FOLDER/00000.tar               KEY.json, KEY.0.png, KEY.1.jpg, ... sample after sample: WebDataset reads it
    FOLDER/00000.index.parquet     one row a sample: place (offset, size, digest), text (id, sample_json), header facts
    FOLDER/00000.NAME.parquet      columns computed later, aligned with the rows, keyed by what they were computed from
    FOLDER/source.json             format version, shards with their digests, digest of the whole; written last

Bytes depend on the samples only (no times, no owners), so writing twice gives the same files. Every byte is verified
before it is used: the index against source.json, a row of the tar against the index. No pickle anywhere.

    writer = ShardWriter(uri, shard_bytes=256 * 2**20); writer.add(sample, [bytes]); manifest = writer.close()
    source = Source.open(uri); source.sample(shard, row)           # text only, the tar is not read
    reader = ShardReader(uri, cache_dir=..., cache_bytes=...); reader.media(shard, row)
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer import cache, resolve, storage
from trainer.data.sample import Sample, from_json, to_json
from trainer.errors import ShardError

FORMAT = 1
MANIFEST = "source.json"
BLOCK = 512
TAR_END = bytes(2 * BLOCK)
DEFAULT_CACHE_BYTES = 8 * 1024**3
OPEN_TRIES = 3

INDEX_SCHEMA = pa.schema(
    [
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("digest", pa.string()),
        ("id", pa.string()),
        ("sample_json", pa.large_string()),
        ("kind", pa.string()),
        ("num_images", pa.int32()),
        ("num_videos", pa.int32()),
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("num_frames", pa.list_(pa.int32())),
        ("media_bytes", pa.int64()),
    ]
)


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


def header_facts(sample: Sample) -> dict[str, Any]:
    """What the index says of a sample beside its place and text."""
    return {
        "id": sample.id,
        "kind": sample.kind,
        "num_images": sum(media.kind == "image" for media in sample.media),
        "num_videos": sum(media.kind == "video" for media in sample.media),
        "widths": [media.width for media in sample.media],
        "heights": [media.height for media in sample.media],
        "num_frames": [media.num_frames for media in sample.media],
        "media_bytes": sum(media.size_bytes for media in sample.media),
    }


# ---------------------------------------------------------------- writing


class ShardWriter:
    """Writes one source's shards in order. Nothing counts until close() writes source.json. `shards`: facts of those
    that are there already, after which it goes on."""

    def __init__(self, uri: str, *, shard_bytes: int, shards: Sequence[dict[str, Any]] = ()):
        self.uri, self.shard_bytes = uri, shard_bytes
        self.shards: list[dict[str, Any]] = list(shards)
        self.num_samples: int = sum(shard["num_samples"] for shard in self.shards)
        self._folder = storage.local_path(uri)
        self._open()

    def _open(self) -> None:
        """A shard of a folder is written there under another name, which it changes when it is whole."""
        if self._folder is not None:
            os.makedirs(self._folder, exist_ok=True)
        name = f"{storage.TEMPORARY}shard-{uuid.uuid4().hex[:12]}.tar"
        self._path = os.path.join(self._folder or tempfile.gettempdir(), name)
        self._file = open(self._path, "wb")  # noqa: SIM115
        self._hash = hashlib.sha256()
        self._rows: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
        self._size = 0

    def add(self, sample: Sample, media_bytes: Sequence[bytes]) -> None:
        """Raises ShardError when the files are not the sample's media."""
        self._check(sample, media_bytes)
        text = to_json(sample)
        files = [(media.suffix, data) for media, data in zip(sample.media, media_bytes, strict=True)]
        row = self._row(text, files)
        if self._rows["id"] and self._size + len(row) > self.shard_bytes:
            self._flush()
            row = self._row(text, files)  # the key names the shard
        digest = hashlib.sha256(row).hexdigest()
        place: dict[str, Any] = {"offset": self._size, "size": len(row), "digest": digest, "sample_json": text}
        for name, value in (place | header_facts(sample)).items():
            self._rows[name].append(value)
        self._write(row)
        self.num_samples += 1

    def _row(self, text: str, files: Sequence[tuple[str, bytes]]) -> bytes:
        key = f"{len(self.shards):05d}{len(self._rows['id']):07d}"
        members = [_member(f"{key}.json", text.encode())]
        members += [_member(f"{key}.{number}.{suffix}", data) for number, (suffix, data) in enumerate(files)]
        return b"".join(members)

    def _check(self, sample: Sample, media_bytes: Sequence[bytes]) -> None:
        if len(media_bytes) != len(sample.media):
            raise ShardError(
                "a sample's media are not complete",
                where=f"{sample.source}/{sample.id}",
                expected=f"{len(sample.media)} files",
                got=len(media_bytes),
            )
        for media, data in zip(sample.media, media_bytes, strict=True):
            if (found := hashlib.sha256(data).hexdigest()) != media.digest:
                raise ShardError(
                    "a medium's bytes are not what the sample names",
                    where=f"{sample.source}/{sample.id}: {media.origin}",
                    expected=media.digest,
                    got=found,
                )

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    def _flush(self) -> None:
        name = shard_name(len(self.shards))
        self._write(TAR_END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if self._folder is not None:
            storage.move(self._path, storage.join(self.uri, f"{name}.tar"))
        else:
            try:
                storage.upload_file(self._path, storage.join(self.uri, f"{name}.tar"))
            finally:
                os.unlink(self._path)
        index = _parquet(pa.table(self._rows, schema=INDEX_SCHEMA), {"format": str(FORMAT)})
        storage.write_bytes(storage.join(self.uri, f"{name}.index.parquet"), index)
        self.shards.append(
            {
                "name": name,
                "size_bytes": self._size,
                "sha256": self._hash.hexdigest(),
                "num_samples": len(self._rows["id"]),
                "index_sha256": hashlib.sha256(index).hexdigest(),
            }
        )
        self._open()

    def close(self, **facts: Any) -> dict[str, Any]:
        """Writes source.json (`facts` go in as they are) and returns its content. A source without samples has no
        shards."""
        if self._rows["id"]:
            self._flush()
        self.abort()
        content = {"format": FORMAT, "num_samples": self.num_samples, "shards": self.shards, **facts}
        content["digest"] = resolve.digest(content)
        storage.write_json(storage.join(self.uri, MANIFEST), content)
        return content

    def abort(self) -> None:
        """Removes the temporary file of the shard being written."""
        self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


def _member(name: str, data: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644  # mtime, uid, gid are 0: the bytes depend on the content only
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    return b"".join((header, data, bytes(-len(data) % BLOCK)))


def _parquet(table: pa.Table, metadata: dict[str, str]) -> bytes:
    table = table.replace_schema_metadata(dict(sorted(metadata.items())))
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


# ---------------------------------------------------------------- columns computed later


def write_column(uri: str, shard: int, name: str, table: pa.Table, key: str) -> None:
    """One table aligned with the shard's rows. `key` is a digest of everything it was computed from."""
    data = _parquet(table, {"format": str(FORMAT), "key": key})
    storage.write_bytes(storage.join(uri, f"{shard_name(shard)}.{name}.parquet"), data)


def read_column(uri: str, shard: int, name: str, key: str, *, num_rows: int | None = None) -> pa.Table | None:
    """None when it is missing or was computed from something else: compute it again. ShardError when it is damaged or
    has another number of rows than the shard."""
    where = storage.join(uri, f"{shard_name(shard)}.{name}.parquet")
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        return None
    table = _read_parquet(data, where)
    metadata = table.schema.metadata or {}
    if metadata.get(b"key") != key.encode() or metadata.get(b"format") != str(FORMAT).encode():
        return None
    if num_rows is not None and table.num_rows != num_rows:
        raise ShardError(
            "a column is not aligned with its shard", where=where, expected=f"{num_rows} rows", got=table.num_rows
        )
    return table


def _read_parquet(data: bytes, where: str) -> pa.Table:
    try:
        # Without Arrow's threads: a process that ended soon after they began was aborted (std::terminate) at its exit.
        return pq.read_table(io.BytesIO(data), page_checksum_verification=True, use_threads=False, pre_buffer=False)
    except (pa.ArrowInvalid, OSError) as error:
        do = "remove the file: it is computed again" if ".index." not in where else "prepare the source again"
        raise ShardError("a column file cannot be read", where=where, got=str(error), do=do) from error


# ---------------------------------------------------------------- reading


@dataclass
class Source:
    """A finished source: its manifest and, read on first use, the indexes of its shards. `keep_indexes`: of that many
    shards, those read last; who goes through the shards in order needs two, who draws from all of them needs all."""

    uri: str
    manifest: dict[str, Any]
    keep_indexes: int | None = None
    _indexes: dict[int, pa.Table] = field(default_factory=dict)

    @classmethod
    def open(cls, uri: str, *, keep_indexes: int | None = None) -> Source:
        """Raises ShardError: not finished, damaged, of another format, or edited."""
        where = storage.join(uri, MANIFEST)
        try:
            content = storage.read_json(where)
        except FileNotFoundError as error:
            do = "run the step that prepares this source"
            raise ShardError("the source is not finished", where=where, do=do) from error
        except ValueError as error:  # not UTF-8, not JSON
            raise _damaged(where, f"not JSON: {error}") from None
        if not isinstance(content, dict):
            raise _damaged(where, json.dumps(content)[:100])
        if content.get("format") != FORMAT:
            got = content.get("format")
            raise ShardError("shards of another format", where=where, expected=FORMAT, got=got)
        stated = content.get("digest")
        found = resolve.digest({key: value for key, value in content.items() if key != "digest"})
        if stated != found:
            raise ShardError("the source's manifest was changed", where=where, expected=stated, got=found)
        return cls(uri, content, keep_indexes)

    @property
    def num_samples(self) -> int:
        return self.manifest["num_samples"]

    @property
    def num_shards(self) -> int:
        return len(self.manifest["shards"])

    @property
    def digest(self) -> str:
        return self.manifest["digest"]

    def index(self, shard: int) -> pa.Table:
        """The shard's index, verified against source.json."""
        found = self._indexes.get(shard)
        if found is None:
            facts = self._facts(shard)
            where = storage.join(self.uri, f"{facts['name']}.index.parquet")
            try:
                data = storage.read_bytes(where)
            except FileNotFoundError as error:
                raise ShardError("a shard's index is missing", where=where, do="prepare the source again") from error
            if (digest := hashlib.sha256(data).hexdigest()) != facts["index_sha256"]:
                raise ShardError(
                    "a shard's index is not what was written", where=where, expected=facts["index_sha256"], got=digest
                )
            found = self._indexes[shard] = _read_parquet(data, where)
        if self.keep_indexes is not None:
            self._indexes.pop(shard, None)
            self._indexes[shard] = found  # the last to go
            while len(self._indexes) > self.keep_indexes:
                self._indexes.pop(next(iter(self._indexes)), None)
        return found

    def _facts(self, shard: int) -> dict[str, Any]:
        shards = self.manifest["shards"]
        if not 0 <= shard < len(shards):
            raise ShardError("no such shard", where=self.uri, expected=f"below {len(shards)}", got=shard)
        return shards[shard]

    def sample(self, shard: int, row: int) -> Sample:
        """Raises ShardError, or DataError when the row is not a Sample of this format."""
        where = f"{self.uri}, shard {shard}, row {row}"
        return from_json(self.index(shard)["sample_json"][row].as_py(), where=where)

    def sample_id(self, shard: int, row: int) -> str:
        return self.index(shard)["id"][row].as_py()


def _damaged(where: str, got: str) -> ShardError:
    expected = "the JSON object that was written"
    do = "restore the file, or remove the folder and prepare or ingest the source again"
    return ShardError("the source's manifest is damaged", where=where, expected=expected, got=got, do=do)


class ShardReader:
    """Media of a source's samples. A shard in a local folder is read in place; one elsewhere is fetched whole, once,
    into `cache_dir` (bounded, least recently used), by default into the node cache (trainer/cache.py), which ranks and
    runs share; without one into a temporary folder. Threads may share a reader."""

    def __init__(self, source: Source | str, *, cache_dir: str | None = None, cache_bytes: int = DEFAULT_CACHE_BYTES):
        self.source = Source.open(source) if isinstance(source, str) else source
        self.cache_bytes = cache_bytes
        self._local = storage.local_path(self.source.uri) is not None
        self._cache_dir = cache_dir or cache.folder("shards")
        self._shared = cache_dir is None and self._cache_dir is not None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()
        self._files: OrderedDict[int, tuple[int, int, str | None]] = OrderedDict()
        """shard -> (descriptor, bytes, file to remove with it)"""

    def media(self, shard: int, row: int) -> list[bytes]:
        """The row's files in the order of sample.media. Raises ShardError with shard and row for any other byte."""
        index = self.source.index(shard)
        if not 0 <= row < index.num_rows:
            raise ShardError("no such row", where=self._where(shard, row), expected=f"below {index.num_rows}", got=row)
        if index["num_images"][row].as_py() + index["num_videos"][row].as_py() == 0:
            return []
        data = self.row_bytes(shard, row)
        return [content for name, content in row_members(data) if not name.endswith(".json")]

    def row_bytes(self, shard: int, row: int) -> bytes:
        """The row's tar members, verified."""
        index = self.source.index(shard)
        offset, size, digest = (index[name][row].as_py() for name in ("offset", "size", "digest"))
        data = self._read(shard, offset, size)
        if not _is(data, size, digest) and not self._local:  # the cache is a hint: fetch it again, once
            self._forget(shard)
            data = self._read(shard, offset, size)
        if not _is(data, size, digest):
            raise ShardError(
                "a row's bytes are not what was written",
                where=self._where(shard, row),
                expected=f"{size} bytes, sha256 {digest}",
                got=f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}",
                do="remove the shard and prepare the source again; look at the disk or the transfer",
            )
        return data

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        with self._lock:  # an eviction must not close the descriptor under a read
            return os.pread(self._descriptor(shard), size, offset)

    def _forget(self, shard: int) -> None:
        with self._lock:
            descriptor, _, owned = self._files.pop(shard, (None, 0, None))
            if descriptor is not None:
                os.close(descriptor)
            if self._shared and self._cache_dir is not None:
                owned = os.path.join(self._cache_dir, f"{self.source._facts(shard)['sha256']}.tar")
            if owned:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(owned)

    def _where(self, shard: int, row: int) -> str:
        ids = self.source.index(shard)["id"]
        name = ids[row].as_py() if 0 <= row < len(ids) else "-"
        return f"{storage.join(self.source.uri, shard_name(shard) + '.tar')}, shard {shard}, row {row}, sample {name}"

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard][0]
        facts = self.source._facts(shard)
        uri = storage.join(self.source.uri, f"{facts['name']}.tar")
        descriptor, owned = self._opened(uri, facts)
        self._files[shard] = (descriptor, 0 if self._local else facts["size_bytes"], owned)
        self._evict(keep=shard)
        return descriptor

    def _opened(self, uri: str, facts: dict[str, Any]) -> tuple[int, str | None]:
        """(descriptor, file to remove with it). Another rank may drop a file of the node cache before it is opened."""
        for turn in range(OPEN_TRIES):
            try:
                path, owned = (storage.local_path(uri), None) if self._local else self._fetch(uri, facts)
                return os.open(str(path), os.O_RDONLY), owned
            except FileNotFoundError as error:
                if self._local or turn == OPEN_TRIES - 1:
                    raise ShardError("a shard is missing", where=uri, do="prepare the source again") from error
        raise AssertionError("not reached")

    def _fetch(self, uri: str, facts: dict[str, Any]) -> tuple[str, str | None]:
        if self._cache_dir is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="shards-")
            self._cache_dir = self._temporary.name
        path = os.path.join(self._cache_dir, f"{facts['sha256']}.tar")
        cache.fetch(uri, path, size_bytes=facts["size_bytes"])
        if self._shared and (base := cache.root()) is not None:
            cache.bound(base)
            return path, None
        return path, path

    def _evict(self, keep: int) -> None:
        while len(self._files) > 1 and sum(size for _, size, _ in self._files.values()) > self.cache_bytes:
            shard = next(name for name in self._files if name != keep)
            descriptor, _, owned = self._files.pop(shard)
            os.close(descriptor)
            if owned:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(owned)

    def close(self) -> None:
        with self._lock:
            for descriptor, _, _ in self._files.values():
                os.close(descriptor)
            self._files.clear()
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None


def _is(data: bytes, size: int, digest: str) -> bool:
    return len(data) == size and hashlib.sha256(data).hexdigest() == digest


def row_members(data: bytes) -> list[tuple[str, bytes]]:
    """(name, content) of the members of a row."""
    found = []
    at = 0
    while at < len(data):
        info = tarfile.TarInfo.frombuf(data[at : at + BLOCK], "utf-8", "strict")
        at += BLOCK
        found.append((info.name, data[at : at + info.size]))
        at += info.size + -info.size % BLOCK
    return found
