"""Which samples of a source curation has kept (pipelines/prepare/curate). A source that was not curated keeps all.

FOLDER/NNNNN.kept-KEY.parquet    one column `reason` aligned with the shard's rows: the filter that dropped the
                                 sample, or nothing
FOLDER/curation.json             which KEY counts, the digest of the decision, and the funnel; written last
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pyarrow as pa

from trainer import storage
from trainer.data.shards import Source, read_column, write_column
from trainer.errors import ShardError
from trainer.resolve import digest

CURATION = "curation.json"


def facts(folder: str) -> dict[str, Any] | None:
    """curation.json of a source's folder: key, digest, funnel; None where it was not curated. Raises ShardError: it is
    damaged."""
    where = storage.join(folder, CURATION)
    try:
        found = storage.read_json(where)
    except FileNotFoundError:
        return None
    except ValueError as error:
        found = str(error)
    if not (isinstance(found, dict) and {"key", "digest", "funnel"} <= found.keys()):
        do = "remove the file and prepare the data again: the source is curated again"
        expected = "the JSON object that was written"
        raise ShardError(
            "what curation decided is damaged", where=where, expected=expected, got=str(found)[:100], do=do
        )
    return found


def digest_of(folder: str) -> str | None:
    """Digest of the decision: equal digests, equal samples kept."""
    found = facts(folder)
    return found["digest"] if found else None


def data_digest(source: Source) -> str:
    """Digest of what a source offers: its manifest's, and the decision's where it was curated."""
    decided = digest_of(source.uri)
    return source.digest if decided is None else digest([source.digest, decided])


def forget(folder: str) -> None:
    """The source counts whole again."""
    with contextlib.suppress(FileNotFoundError):
        storage.remove(storage.join(folder, CURATION))


def write(source: Source, reason: np.ndarray, *, key: str, funnel: dict[str, Any]) -> None:
    """reason: str[N] of all samples in order of shard and row, empty for what is kept."""
    at = 0
    for shard in range(source.num_shards):
        num_rows = source.index(shard).num_rows
        column = pa.table({"reason": pa.array(reason[at : at + num_rows].tolist(), pa.string())})
        write_column(source.uri, shard, _name(key), column, key)
        at += num_rows
    content = {"key": key, "digest": digest([source.digest, reason.tolist()]), "funnel": funnel}
    storage.write_json(storage.join(source.uri, CURATION), content)


def reasons(source: Source, shard: int) -> np.ndarray:
    """str[N] of a shard's rows: empty where the sample is kept.

    Raises:
        ShardError: curation.json names a column that is not there.
    """
    num_rows = source.index(shard).num_rows
    found = facts(source.uri)
    if found is None:
        return np.full(num_rows, "", dtype=object)
    table = read_column(source.uri, shard, _name(found["key"]), found["key"], num_rows=num_rows)
    if table is None:
        raise ShardError(
            "the column of kept samples is missing",
            where=f"{source.uri}, shard {shard}",
            expected=_name(found["key"]),
            do="run prepare-data again",
        )
    return np.array(table["reason"].to_pylist(), dtype=object)


def rows(source: Source, shard: int) -> np.ndarray:
    """int64[K]: the rows of a shard that are kept, in order."""
    return np.flatnonzero(reasons(source, shard) == "")


def _name(key: str) -> str:
    return f"kept-{key[:12]}"
