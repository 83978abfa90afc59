"""Recorded answers of an endpoint: (request digest, seed, model) -> answer. Written before they are used; what is there
is never asked again, so a run given its record is the same without the endpoint.

    OUT/data/answers/judge/SOURCE/NNNNN.parquet    appended, one file a block; kept when the source is made again
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from trainer import storage
from trainer.errors import DataError

FORMAT = 1
SCHEMA = pa.schema(
    [
        ("request", pa.string()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("text", pa.string()),
        ("finish", pa.string()),
    ]
)


class Asked(NamedTuple):
    request: str
    """Digest of everything the request says."""
    seed: int
    model: str


@dataclass(frozen=True)
class Given:
    text: str
    finish: str
    """stop or length."""


class Record:
    """All answers below one folder, in memory: some hundred bytes each."""

    def __init__(self, uri: str):
        self.uri = uri
        self.answers: dict[Asked, Given] = {}
        names = [name for name in storage.list_dir(uri) if name.endswith(".parquet")]
        for name in sorted(names):
            for row in _rows(storage.join(uri, name)):
                self.answers[Asked(row["request"], row["seed"], row["model"])] = Given(row["text"], row["finish"])
        self._next = max((int(name.removesuffix(".parquet")) for name in names), default=-1) + 1  # 99999 < 100000

    def get(self, asked: Asked) -> Given | None:
        return self.answers.get(asked)

    def add(self, found: dict[Asked, Given]) -> None:
        """Stores a block of answers, then they may be used."""
        if not found:
            return
        columns = {name: [getattr(asked, name) for asked in found] for name in Asked._fields}
        columns |= {name: [getattr(given, name) for given in found.values()] for name in ("text", "finish")}
        sink = io.BytesIO()
        pq.write_table(pa.table(columns, schema=SCHEMA.with_metadata({"format": str(FORMAT)})), sink)
        storage.write_bytes(storage.join(self.uri, f"{self._next:05d}.parquet"), sink.getvalue())
        self._next += 1
        self.answers |= found


def _rows(uri: str) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except pa.ArrowInvalid as error:
        do = "remove the file: its answers are asked for again"
        raise DataError("a block of recorded answers cannot be read", where=uri, got=str(error), do=do) from None
    return table.to_pylist()
