"""The record of a labeller: what models found in pictures, before any threshold but the lowest. Torch-free.

FOLDER/record.json      which models, with the digests of their files, which labels, and how they were asked
FOLDER/NNNNN.parquet    a block of pictures, by digest; written before it is used, never asked for again
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trainer import storage
from trainer.errors import DataError
from trainer.resolve import digest

FORMAT = 1
FACTS = "record.json"
SCHEMA = pa.schema(
    [
        ("picture", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("scores", pa.list_(pa.float64())),
        ("labels", pa.list_(pa.string())),
        ("masks", pa.list_(pa.list_(pa.int32()))),
        ("mask_scores", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class Found:
    """N boxes in one picture, in pixels of the original; a mask is COCO's uncompressed run lengths, or empty."""

    boxes: Sequence[Sequence[float]]
    """left, top, right, bottom"""
    scores: Sequence[float]
    labels: Sequence[str]
    masks: Sequence[Sequence[int]]
    mask_scores: Sequence[float]
    asked: Sequence[str] = ()
    """Labels that were looked for."""
    provenance: Any = None
    """{detector, segmenter, ...}: goes into the meta of every sample that is made from it."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Found:
        return cls(**value)


class Record:
    """A folder's record, all of it in memory (masks as run lengths: some kilobytes a picture).

    Raises:
        DataError: no record there, of another format, or a block that cannot be read.
    """

    def __init__(self, uri: str):
        self.uri = uri
        try:
            self.facts: dict[str, Any] = storage.read_json(storage.join(uri, FACTS))
        except FileNotFoundError:
            raise DataError("no record of labels", where=uri, expected=f"a folder with {FACTS}",
                            do="python -m trainer.after.label writes one") from None  # fmt: skip
        if self.facts.get("format") != FORMAT:
            raise DataError("a record of another format", where=uri, expected=FORMAT, got=self.facts.get("format"))
        self.names = sorted(name for name in storage.list_dir(uri) if name.endswith(".parquet"))
        self._found: dict[str, dict[str, Any]] = {}
        for name in self.names:
            self._found |= {row["picture"]: row for row in _rows(storage.join(uri, name))}

    def __len__(self) -> int:
        return len(self._found)

    @property
    def digest(self) -> str:
        """Of what it holds, wherever it lies and however it is cut into blocks."""
        return digest([self.facts, sorted((name, digest(row)) for name, row in self._found.items())])

    def get(self, picture: str) -> Found | None:
        """What was found in the picture with this digest; None where it was not asked about."""
        row = self._found.get(picture)
        if row is None:
            return None
        columns = {name: row[name] for name in ("boxes", "scores", "labels", "masks", "mask_scores")}
        return Found(**columns, asked=self.facts["labels"], provenance=self.facts["provenance"])

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Stores a block of rows (columns of SCHEMA); then they are part of the record."""
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink, compression="zstd")
        name = f"{int(max(self.names, default='-1.').split('.')[0]) + 1:05d}.parquet"
        storage.write_bytes(storage.join(self.uri, name), sink.getvalue())
        self.names.append(name)
        self._found |= {row["picture"]: row for row in rows}


def opened(uri: str, labels: Sequence[str], provenance: dict[str, Any]) -> Record:
    """The record in a folder, begun where there is none.

    Raises:
        DataError: it was made by other models, for other labels or in another way.
    """
    wanted = {"format": FORMAT, "labels": list(labels), "provenance": provenance}
    if not storage.exists(storage.join(uri, FACTS)):
        storage.write_json(storage.join(uri, FACTS), wanted)
    record = Record(uri)
    if record.facts != wanted:
        other = sorted(name for name in wanted if record.facts.get(name) != wanted[name])
        raise DataError("the record was made in another way", where=uri, expected=f"the same {', '.join(other)}",
                        got=str({name: record.facts.get(name) for name in other})[:300],
                        do="choose another folder, or remove this one")  # fmt: skip
    return record


def _rows(uri: str) -> list[dict[str, Any]]:
    try:
        return pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
    except pa.ArrowInvalid as error:
        do = "remove the file: its pictures are asked about again"
        raise DataError("a block of recorded labels cannot be read", where=uri, got=str(error), do=do) from None
