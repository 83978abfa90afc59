"""Metrics: rows of named numbers per step, in memory until they are committed with a checkpoint, and in a file to
look at.

The truth is in storage: the parts that a manifest lists (trainer/manifest.MetricsPart).
`attempts/NNNN/metrics.jsonl` is the view of one attempt while it runs; steps after the last commit are in it too,
and a later attempt repeats them.

    metrics = Metrics(path)                     # rank 0
    metrics.log(step, {"loss": 2.3})
    uploader.commit(..., metrics=metrics.drain())
    history(stage_uri, manifest)                # every row of the stage up to the checkpoint
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from trainer import manifest as manifests
from trainer import storage
from trainer.errors import CheckpointError
from trainer.manifest import Manifest


@dataclass(frozen=True)
class Row:
    step: int
    time: float
    """Seconds since the epoch, of the writer."""
    values: Mapping[str, float]


def encode_rows(rows: Iterable[Row]) -> bytes:
    """JSON lines. A number that is not finite is written as null: JSON has no name for it."""
    lines = []
    for row in rows:
        values = {key: value if math.isfinite(value) else None for key, value in row.values.items()}
        lines.append(json.dumps({"step": row.step, "time": row.time, "values": values}, separators=(",", ":")))
    return "".join(f"{line}\n" for line in lines).encode()


def decode_rows(data: bytes) -> list[Row]:
    """Rows of JSON lines; a last line that was cut off by a crash is left out."""
    rows = []
    for line in data.split(b"\n")[:-1]:
        content = json.loads(line)
        values = {key: math.nan if value is None else value for key, value in content["values"].items()}
        rows.append(Row(content["step"], content["time"], values))
    return rows


class Metrics:
    """Rows of this attempt. Thread-compatible: one thread logs and commits."""

    def __init__(self, path: str | None, *, clock: Callable[[], float] = time.time):
        self.clock = clock
        self._rows: list[Row] = []
        self._file = None
        if path is not None:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as this object

    def log(self, step: int, values: Mapping[str, float]) -> None:
        row = Row(step, round(self.clock(), 3), {key: float(value) for key, value in values.items()})
        self._rows.append(row)
        if self._file is not None:
            self._file.write(encode_rows([row]))

    def drain(self) -> list[Row]:
        """Rows since the last drain, for a commit. They are forgotten here: a commit that fails ends the process."""
        rows, self._rows = self._rows, []
        return rows

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def history(stage_uri: str, manifest: Manifest | None) -> list[Row]:
    """All committed rows of the stage, by step, verified.

    Raises:
        CheckpointError: a part is damaged.
    """
    rows: list[Row] = []
    for part in manifest.metrics if manifest else ():
        uri = storage.join(stage_uri, part.key)
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError:
            raise manifests.damaged(uri, expected=f"{part.size_bytes} bytes", got="no such object") from None
        if storage.sha256_bytes(data) != part.sha256:
            raise CheckpointError("metrics of a checkpoint are damaged", where=uri, expected=part.sha256)
        rows += decode_rows(data)
    return rows
