"""Rows of Multimodal-Mind2Web's Parquet (arXiv 2401.01614): an action a row, its screenshot in a cell, where it stays
until it is described (embedded.py). Of the columns only those that are needed are read: the pages' HTML is most of a
table.

An episode may go on in the next file of NAME-00000-of-00027.parquet: its rows there are read with where it began, and
are counted as `in-the-file-before` (no fault) where they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.prepare.embedded import cell, open_file
from pipelines.prepare.formats.parquet import pictures_of_group
from pipelines.prepare.formats.rows import Bad, resolve
from trainer import storage
from trainer.errors import DataError

NEEDED = ("annotation_id", "confirmed_task", "operation", "pos_candidates", "screenshot")
READ = (*NEEDED[:-1], "target_action_index", "action_reprs")
BATCH_ROWS = 64
_PART = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet$")
Entry = tuple[str, dict[str, Any] | Bad]


def entries(path: str, media_root: str) -> Iterator[Entry]:
    """(where, row or Bad) of a table, with those rows of the next ones that belong to its last episode.

    Raises:
        DataError: not a Parquet file, or one without a column that is needed.
    """
    taken = _last_episode(neighbour(path, -1))
    episode = None
    for where, row in _rows(path, media_root):
        if taken is not None and not isinstance(row, Bad) and row.get("annotation_id") == taken:
            yield (
                where,
                Bad(where, "an episode that begins in this file", f"more of {taken}", "in-the-file-before", False),
            )
            continue
        taken = None
        episode = row.get("annotation_id") if not isinstance(row, Bad) else None
        yield where, row
    following = neighbour(path, 1)
    while following is not None and episode is not None:
        for where, row in _rows(following, media_root):
            if isinstance(row, Bad) or row.get("annotation_id") != episode:
                return
            yield where, row
        following = neighbour(following, 1)


def neighbour(path: str, step: int) -> str | None:
    """The file before (-1) or after (1) in the same table, where it is there."""
    found = _PART.match(path)
    if found is None:
        return None
    number = int(found["number"]) + step
    name = f"{found['stem']}-{number:05d}-of-{found['count']}.parquet"
    return name if 0 <= number < int(found["count"]) and storage.exists(name) else None


def _last_episode(path: str | None) -> str | None:
    if path is None:
        return None
    with open_file(path) as file:
        table = _opened(file, path)
        filled = [group for group in range(table.num_row_groups) if table.metadata.row_group(group).num_rows]
        if not filled:
            return None
        return table.read_row_group(filled[-1], columns=["annotation_id"])["annotation_id"][-1].as_py()


def _opened(file: Any, path: str) -> pq.ParquetFile:
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError("not a Parquet file", where=path, got=error) from None
    if lacking := [name for name in NEEDED if name not in table.schema_arrow.names]:
        raise DataError("a table without columns that are needed", where=path, expected=", ".join(NEEDED),
                        got=f"no {', '.join(lacking)}")  # fmt: skip
    return table


def _rows(path: str, media_root: str) -> Iterator[Entry]:
    local = storage.local_path(path)
    number = 0
    with open_file(path) as file:
        table = _opened(file, path)
        columns = [name for name in READ if name in table.schema_arrow.names]
        for group in range(table.num_row_groups):
            try:
                shown = pictures_of_group(table, group, "screenshot", 0)
                in_group = 0
                for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        place = cell(local or path, group, in_group, "screenshot")
                        screenshot = [resolve(media_root, name) if name else place for name in shown[in_group]]
                        yield f"{path}, row {number}", {**row, **({"screenshot": screenshot[0]} if screenshot else {})}
                        in_group += 1
                        number += 1
            except (pa.ArrowException, OSError) as error:
                where = f"{path}, row group {group}"
                yield where, Bad(where, "a whole row group", str(error)[:200], "damaged-parquet")
