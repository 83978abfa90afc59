"""Counting: tokens, patches and targets of every (sample, variant), as a column file beside the shard.

    table = count_shard(samples, rules, num_variants)         one row a sample; samples of one shard, in order
    write_column(uri, shard, COLUMN, table, key=rules.digest)
    counts = source_counts(source, rules, num_variants, ...)  reads the columns of all shards; for make_plan

From headers and text alone; nothing is decoded. A dropped (sample, variant) has fit_* -1 and a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from trainer import resolve
from trainer.data.layout import REASONS, Drop, Rules, fit_sample
from trainer.data.mixture import SourceCounts
from trainer.data.order import id_hash
from trainer.data.sample import Sample
from trainer.data.shards import Source, read_column
from trainer.errors import ShardError

FORMAT = 1
FIELDS = ("tokens", "patches", "targets", "image_max", "max_frames", "turns", "drop")


def column_name(rules: Rules) -> str:
    """Rules of several stages lie side by side: `counts-` and the start of their digest."""
    return f"counts-{rules.digest[:12]}"


def key_of(source: Source, shard: int, rules: Rules, num_variants: int) -> str:
    """Digest of everything that a shard's counts are computed from: its index, the rules, the number of variants."""
    index = source.manifest["shards"][shard]["index_sha256"]
    return resolve.digest({"format": FORMAT, "index": index, "rules": rules.digest, "variants": num_variants})


def count_shard(samples: Iterable[Sample], rules: Rules, num_variants: int) -> pa.Table:
    """Columns of FIELDS, each a list of V numbers a row. Variants that differ in nothing are counted once each: the
    frame rate, the wording and the time format may make them differ."""
    rows: dict[str, list[list[int]]] = {name: [] for name in FIELDS}
    for sample in samples:
        counted = [count(sample, variant, rules) for variant in range(num_variants)]
        for position, name in enumerate(FIELDS):
            rows[name].append([values[position] for values in counted])
    return pa.table({name: pa.array(values, pa.list_(pa.int32(), num_variants)) for name, values in rows.items()})


def count(sample: Sample, variant: int, rules: Rules) -> tuple[int, ...]:
    """Values in order of FIELDS."""
    found = fit_sample(sample, variant, rules)
    if isinstance(found, Drop):
        return (0, 0, 0, -1, -1, -1, REASONS.index(found.reason))
    counts = found.layout
    return (counts.num_tokens, counts.num_patches, counts.num_targets, *found.fit.row(), -1)


def source_counts(
    source: Source, rules: Rules, num_variants: int, *, name: str, split: str, kind: str, uri: str, weight: float = 1.0
) -> SourceCounts:
    """`uri` is the source's folder relative to OUT. Raises ShardError when a shard was not counted under these rules."""
    columns: dict[str, list[np.ndarray]] = {field: [] for field in FIELDS}
    shards, rows, hashes = [], [], []
    for shard, facts in enumerate(source.manifest["shards"]):
        key = key_of(source, shard, rules, num_variants)
        table = read_column(source.uri, shard, column_name(rules), key, num_rows=facts["num_samples"])
        if table is None:
            where = f"{source.uri}, shard {shard}, column {column_name(rules)}"
            raise ShardError("a shard is not counted under these rules", where=where, do="count it first")
        for field in FIELDS:
            values = table[field].combine_chunks().values.to_numpy()
            columns[field].append(values.reshape(-1, num_variants))
        shards.append(np.full(table.num_rows, shard, np.int32))
        rows.append(np.arange(table.num_rows, dtype=np.int32))
        hashes.append(np.array([id_hash(name, item) for item in source.index(shard)["id"].to_pylist()], np.uint64))
    found = {field: _joined(columns[field], num_variants) for field in FIELDS}
    fits, fit = _fit_table(found)
    return SourceCounts(
        name=name,
        split=split,
        kind=kind,
        uri=uri,
        digest=source.digest,
        rules_digest=rules.digest,
        shard=np.concatenate(shards) if shards else np.zeros(0, np.int32),
        row=np.concatenate(rows) if rows else np.zeros(0, np.int32),
        id_hash=np.concatenate(hashes) if hashes else np.zeros(0, np.uint64),
        tokens=found["tokens"],
        patches=found["patches"],
        targets=found["targets"],
        fit=fit,
        drop=found["drop"].astype(np.int8),
        fits=fits,
        reasons=REASONS,
        weight=weight,
        shard_bytes=[facts["size_bytes"] for facts in source.manifest["shards"]],
    )


def _joined(parts: list[np.ndarray], num_variants: int) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros((0, num_variants), np.int32)


def _fit_table(found: dict[str, np.ndarray]) -> tuple[list[list[int]], np.ndarray]:
    """Distinct fits, and for each (row, variant) its number; -1 where it is dropped."""
    triples = np.stack([found[name] for name in ("image_max", "max_frames", "turns")], axis=-1)
    flat: Any = triples.reshape(-1, 3)
    distinct, number = np.unique(flat, axis=0, return_inverse=True)
    fit = np.where(found["drop"] >= 0, -1, number.reshape(triples.shape[:2])).astype(np.int32)
    return distinct.tolist(), fit
