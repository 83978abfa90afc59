"""DPO's reference: log-probabilities of both answers under the weights that the stage starts from.

Computed once, by one forward pass over the plan before the first step, and kept in OUT/dpo/reference.parquet, keyed by
plan and model: a resumed stage reads what it began with. Columns: pack, sample (its place in the pack), chosen,
rejected.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from trainer import storage
from trainer.errors import CheckpointError
from trainer.heartbeat import pulse
from trainer.resolve import digest
from trainer.step.dpo import reference_of
from trainer.step.packed import Pack

NAME = "reference.parquet"
Reference = dict[tuple[int, int], tuple[float, float]]


def key_of(plan_digest: str, model_digest: str, skips: Sequence[str] = ()) -> str:
    """A skipped pair has no reference."""
    left_out = {"skips": sorted(skips)} if skips else {}
    return digest({"format": 1, "plan": plan_digest, "model": model_digest, **left_out})


def read(uri: str, key: str) -> Reference | None:
    """What an earlier attempt stored; None when there is none for this plan and model.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    try:
        table = pq.read_table(io.BytesIO(data))
    except pa.ArrowInvalid as error:
        raise CheckpointError("the reference is damaged", where=uri, got=str(error), do="remove it") from None
    if (table.schema.metadata or {}).get(b"key") != key.encode():
        return None
    columns = [table[name].to_pylist() for name in ("pack", "sample", "chosen", "rejected")]
    return {(pack, sample): (chosen, rejected) for pack, sample, chosen, rejected in zip(*columns, strict=True)}


def write(uri: str, key: str, reference: Reference) -> None:
    rows = sorted(reference.items())
    table = pa.table(
        {
            "pack": pa.array([pack for (pack, _), _ in rows], pa.int64()),
            "sample": pa.array([sample for (_, sample), _ in rows], pa.int32()),
            "chosen": pa.array([chosen for _, (chosen, _) in rows], pa.float32()),
            "rejected": pa.array([rejected for _, (_, rejected) in rows], pa.float32()),
        }
    ).replace_schema_metadata({"key": key})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(uri, sink.getvalue())


def compute(engine: Any, loader: Any, place: Callable[[Any], Pack]) -> Reference:
    """One forward pass over the plan; every rank runs as many packs and gets all rows."""
    model = engine.module
    objective, model.objective = model.objective, reference_of
    engine.eval()
    found: Reference = {}
    try:
        with torch.no_grad():
            for step in loader:
                for batch in step.batches:
                    pack = place(batch)
                    answers = engine(pack)[1]["answers"].tolist()
                    rows = zip(pack.pair_samples, answers, strict=True)
                    found |= {(pack.index, sample): (chosen, rejected) for sample, (chosen, rejected) in rows}
                pulse().beat()
    finally:
        model.objective = objective
        engine.train()
    everyone: list[Reference] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {key: row for part in everyone for key, row in part.items()}


def reference_for(
    engine: Any, uri: str, key: str, make_loader: Callable[[], Any], place: Callable[[Any], Pack]
) -> Reference:
    """The stored reference, or the computed one, stored. Every rank calls it, before any checkpoint is loaded."""
    stored: list[Reference | None] = [read(uri, key) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(stored)
    if stored[0] is not None:
        return stored[0]
    loader = make_loader()
    try:
        reference = compute(engine, loader, place)
    finally:
        loader.close()
    if dist.get_rank() == 0:
        write(uri, key, reference)
    return reference
