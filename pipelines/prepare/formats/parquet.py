"""Parquet tables as hubs keep them: pictures in columns of Hugging Face's Image type ({bytes, path}), lists of them, or
plain bytes in a column called image(s); the other columns form a row that any reader of rows knows (conversations,
messages, question and answer, caption, points, chosen and rejected, text).

Rows are read in batches without the pictures, which stay in the file until they are described (embedded.py). A picture
without bytes is a file at its path, which counts from the media folder. Other columns of bytes are text in UTF-8.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.prepare.embedded import cell, open_file
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, Row, guarded, resolve
from pipelines.prepare.formats.table import draft_of_row, readers_of
from trainer import storage
from trainer.errors import DataError
from trainer.recipe import Source

KIND, RENDERING = "instruction", "chat"
BATCH_ROWS = 256
MIND2WEB = {"annotation_id", "confirmed_task"}
"""Columns by which mind2web.py, which reads tables as well, knows its own."""
PICTURE_ROWS = 16
"""Rows whose pictures are in memory at once where it must be looked which of them have bytes."""
PICTURES = ("image", "images", "jpg", "png")
"""Columns of bytes that are pictures; {bytes, path} is one whatever its column is called."""


def looks(peek: Peek) -> str | None:
    return "a Parquet file" if peek.holds == "parquet" and not set(peek.names) >= MIND2WEB else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    local = storage.local_path(path)
    with open_file(path) as file:
        try:
            table = pq.ParquetFile(file, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise DataError("not a Parquet file", where=path, got=error) from None
        shown = {field.name: _depth(field) for field in table.schema_arrow if _depth(field) is not None}
        others = [field.name for field in table.schema_arrow if field.name not in shown]
        if not others:
            raise DataError("a table of pictures without words", where=path, got=", ".join(table.schema_arrow.names))
        if "/" in "".join(shown):
            raise DataError("a column of pictures with / in its name", where=path, got=", ".join(shown))
        for group in range(table.num_row_groups):
            try:
                yield from _group(table, group, local or path, path, shown, others, media_root, source)
            except (pa.ArrowException, OSError) as error:
                yield Bad(f"{path}, row group {group}", "a whole row group", str(error)[:200], "damaged-parquet")


def form_of(path: str) -> str | None:
    """The reader of rows that takes the table's first row, None where none or several do."""
    with open_file(path) as file:
        try:
            table = pq.ParquetFile(file)
            shown = [field.name for field in table.schema_arrow if _depth(field) is not None]
            others = [name for name in table.schema_arrow.names if name not in shown]
            batch = next(table.iter_batches(1, columns=others), None) if others else None
            row = _plain(batch.to_pylist()[0]) if batch is not None else {}
        except (pa.ArrowException, OSError, BadRow):  # read() says what is wrong
            return None
    found = readers_of({**row, **({"images": shown} if shown else {})})
    return found[0] if len(found) == 1 else None


def _depth(field: pa.Field) -> int | None:
    """0: a column of pictures, 1: of lists of them, None: of something else."""
    kind, depth = field.type, 0
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind, depth = kind.value_type, 1
    if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(n).name for n in range(kind.num_fields)}:
        return depth
    return depth if field.name in PICTURES and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) else None


def _group(
    table: pq.ParquetFile,
    group: int,
    address: str,
    path: str,
    shown: dict[str, int | None],
    others: list[str],
    media_root: str,
    source: Source,
) -> Iterator[Row]:
    """Rows of one row group. Of the pictures only names are read: how many a row has, and files outside the table."""

    def one(entry: dict, where: str) -> Draft:
        return draft_of_row(_plain(entry), where, media_root, source)

    before = sum(table.metadata.row_group(earlier).num_rows for earlier in range(group))
    named = {name: pictures_of_group(table, group, name, depth) for name, depth in shown.items()}
    number = 0
    for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=others):
        for entry in batch.to_pylist():
            images: list[str] = []
            for name, depth in shown.items():
                for item, file in enumerate(named[name][number]):
                    place = cell(address, group, number, name, item if depth else None)
                    images.append(resolve(media_root, file) if file else place)
            row = {**entry, **({"images": images} if images else {})}
            yield guarded(f"{path}, row {before + number}", one, row)
            number += 1


def pictures_of_group(table: pq.ParquetFile, group: int, name: str, depth: int | None) -> list[list[str | None]]:
    """Of every row of the group an entry a picture: its path when that is where its bytes are, None when they are in
    the cell. Bytes are looked at only where the column's statistics leave open whether some are missing."""
    leaves = {path.rpartition(".")[2]: path for path in _leaves(table) if path.split(".")[0] == name}
    if "path" not in leaves:  # plain bytes
        column = table.read_row_group(group, columns=[name])[name]
        if depth:
            return [[None] * len(value or ()) for value in column.to_pylist()]
        return [[None] * present for present in column.is_valid().to_pylist()]
    column = table.read_row_group(group, columns=[leaves["path"]])[name]
    listed = column.to_pylist() if depth else [[value] if value is not None else [] for value in column.to_pylist()]
    if _all_present(table, group, leaves["bytes"]):
        return [[None] * len(value or ()) for value in listed]
    present = _present(table, group, leaves["bytes"], depth)
    return [[None if next(present) or item is None else item["path"] for item in value or ()] for value in listed]


def _all_present(table: pq.ParquetFile, group: int, leaf: str) -> bool:
    facts = table.metadata.row_group(group).column(_leaves(table).index(leaf)).statistics
    return facts is not None and facts.has_null_count and facts.null_count == 0


def _present(table: pq.ParquetFile, group: int, leaf: str, depth: int | None) -> Iterator[bool]:
    """Whether a picture has bytes, picture after picture."""
    for batch in table.iter_batches(PICTURE_ROWS, row_groups=[group], columns=[leaf]):
        pictures: Any = batch.column(0)
        pictures = pictures.flatten() if depth else pictures.drop_null()
        yield from pictures.field("bytes").is_valid().to_pylist()


def _leaves(table: pq.ParquetFile) -> list[str]:
    return [table.schema.column(number).path for number in range(len(table.schema.names))]


def _plain(value: Any, column: str = "") -> Any:
    """What JSON has words for, without fields that are null. Raises BadRow: bytes that are no text."""
    if isinstance(value, dict):
        return {name: _plain(item, name) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item, column) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise BadRow("not-utf8", f"text in UTF-8 in the column {column}", f"byte {error.start}") from None
    return str(value) if isinstance(value, date | datetime | Decimal) else value
