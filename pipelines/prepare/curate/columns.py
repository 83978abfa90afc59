"""Columns of curation beside the shards: computed shard by shard by row functions on Daft, keyed by what they were
computed from, so that an interrupted step goes on and another threshold computes nothing.

Also the frames that span sources: a `uid` is a sample's place, one number over all folders of a comparison.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from pipelines.prepare.engine import Answer, Engine, blocks
from trainer.data.shards import Source, read_column, write_column

BLOCK_ROWS = 1024
SHARD_BITS, ROW_BITS = 21, 27
"""Of a uid, int64: folder (15 bits), shard, row. A shard of 128 million rows does not exist."""

Rows = Callable[[list[str], int, list[int]], list[dict[str, Any]]]
"""(sample JSON of a block, shard, rows) -> one dict of columns a sample."""


def uid_of(folder: int, shard: int, row: int) -> int:
    return (folder << (SHARD_BITS + ROW_BITS)) | (shard << ROW_BITS) | row


def place_of(uid: int) -> tuple[int, int, int]:
    """(folder, shard, row)."""
    return uid >> (SHARD_BITS + ROW_BITS), (uid >> ROW_BITS) & ((1 << SHARD_BITS) - 1), uid & ((1 << ROW_BITS) - 1)


class Work:
    """The engine, made on first need, and how many samples each kind of column was computed for."""

    def __init__(self, kind: str):
        self.kind = kind
        self.computed: dict[str, int] = {}
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            self._engine = Engine("ray" if self.kind == "ray" else "native")
        return self._engine

    @property
    def daft(self) -> Any:
        return self.engine.daft

    def map(self, function: Callable[[str], Answer], texts: list[str]) -> list[dict[str, Any]]:
        """A row function whose answers are JSON."""
        return [json.loads(text) for text, _ in self.engine.map(function, texts)]

    def column(
        self,
        source: Source,
        shard: int,
        *,
        kind: str,
        key: str,
        rows: Rows,
        schema: pa.Schema,
        told: str,
        whole: Callable[[], bool] = lambda: True,
    ) -> pa.Table:
        """The stored column of a kind (clean, score, near) with this key, else the one computed now.

        `key` covers everything but the shard itself; its first 12 characters are in the file's name.
        `whole` is asked when all rows were computed: where it says no, the column is not stored.
        """
        index = source.index(shard)
        full = f"{key}/{source.manifest['shards'][shard]['index_sha256']}"
        name = f"{kind}-{key[:12]}"
        if (table := read_column(source.uri, shard, name, full, num_rows=index.num_rows)) is not None:
            return table
        found: list[dict[str, Any]] = []
        last = time.monotonic()
        for block in blocks(range(index.num_rows), BLOCK_ROWS):
            texts = [index["sample_json"][row].as_py() for row in block]
            found += rows(texts, shard, block)
            if time.monotonic() - last > 5:
                last = time.monotonic()
                print(f"curate: {told} {kind} shard {shard}, {len(found)} of {index.num_rows}", flush=True)
        table = pa.Table.from_pylist(found, schema=schema)
        if whole():
            write_column(source.uri, shard, name, table, full)
        self.computed[kind] = self.computed.get(kind, 0) + len(found)
        return table


def with_uids(tables: Sequence[pa.Table], folder: int) -> list[pa.Table]:
    """The columns of all shards of one folder, with a column uid in front."""
    found = []
    for shard, table in enumerate(tables):
        uids = pa.array([uid_of(folder, shard, row) for row in range(table.num_rows)], pa.int64())
        found.append(table.add_column(0, "uid", uids))
    return found
