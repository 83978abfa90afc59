"""Media inside other files: a member of a tar, a cell of a Parquet file. They are named, not carried: a row stays small
whatever its pictures weigh, and who needs the bytes reads just those, from a folder or from S3.

    PATH#bytes=START-STOP               a member of a tar: that range of the file
    PATH#cell=GROUP/ROW/COLUMN[/ITEM]   Parquet: a picture of Hugging Face's Image column ({bytes, path}), or bytes
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from trainer import storage
from trainer.errors import DataError, MediaError, StorageError

_PLACE = re.compile(r"^(?P<path>.+)#(?:bytes=(?P<start>\d+)-(?P<stop>\d+)|cell=(?P<cell>\d+/\d+/[^/]+(?:/\d+)?))$")
BLOCK_BYTES = 256 * 1024
"""Read at once from an object store while a container's table of contents is walked."""


def member(path: str, start: int, size: int) -> str:
    return f"{path}#bytes={start}-{start + size}"


def cell(path: str, group: int, row: int, column: str, item: int | None = None) -> str:
    """The picture in a row of a row group; `item` counts in a list of pictures."""
    return f"{path}#cell={group}/{row}/{column}" + ("" if item is None else f"/{item}")


def is_embedded(uri: str) -> bool:
    return "#" in uri and _PLACE.match(uri) is not None


def member_bytes(uri: str) -> int | None:
    """The size of a member of a tar, which its address says; None of anything else."""
    found = _PLACE.match(uri) if "#" in uri else None
    return int(found["stop"]) - int(found["start"]) if found is not None and found["stop"] else None


def read(uri: str) -> bytes:
    """The bytes that an address of this form names.

    Raises:
        FileNotFoundError, StorageError
        MediaError: the container is shorter than the address says, or the cell holds no picture.
    """
    found = _PLACE.match(uri)
    assert found is not None, uri
    path = found["path"]
    if found["cell"] is not None:
        return _cell_bytes(path, found["cell"])
    start, stop = int(found["start"]), int(found["stop"])
    data = storage.read_bytes(path, start, stop) if stop > start else b""
    if len(data) != stop - start:
        raise MediaError("a member is cut short", where=uri, expected=f"{stop - start} bytes", got=len(data))
    return data


def _cell_bytes(path: str, place: str) -> bytes:
    group, row, column, *item = place.split("/")
    value: Any = _column(path, int(group), column)[int(row)].as_py()
    if item and value is not None:
        value = value[int(item[0])]
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise MediaError("a cell without a picture", where=f"{path}, {place}", got=type(value).__name__)
    return value


@lru_cache(maxsize=2)
def _column(path: str, group: int, column: str) -> pa.ChunkedArray:
    """One column of one row group. Rows are asked for in order, so that each is read once; two stay in memory."""
    with open_file(path) as file:
        try:
            return pq.ParquetFile(file, page_checksum_verification=True).read_row_group(group, columns=[column])[column]
        except (pa.ArrowException, OSError) as error:
            raise MediaError("a row group cannot be read", where=f"{path}, row group {group}", got=error) from error


def open_file(path: str) -> BinaryIO:
    """A container of this machine, or of an object store, read in blocks as its parts are asked for.

    Raises:
        DataError: there is none. StorageError
    """
    local = storage.local_path(path)
    try:
        if local is not None:
            return open(local, "rb")
        filesystem, inside = fsspec.core.url_to_fs(path)
        return filesystem.open(inside, "rb", block_size=BLOCK_BYTES, cache_type="readahead")
    except FileNotFoundError:
        raise DataError("no such file", where=path, do="check the path") from None
    except OSError as error:
        raise StorageError("storage could not open", where=path, got=f"{type(error).__name__}: {error}") from error
