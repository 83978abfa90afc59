"""Near-duplicate pairs on Daft, over all partitions: LSH keys -> groups -> candidate pairs -> verified pairs.

    text_pairs(daft, frame)     frame: uid int64, bands list<uint64>, shingles list<uint64> -> a, b, similarity
    image_pairs(daft, frame)    frame: uid uint64, bands, hash, thumb binary -> a, b, distance, difference

Every shuffle is a groupby or a join of Daft. Results are sorted, so they do not depend on partitions or on the runner.
"""

from __future__ import annotations

from functools import reduce
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.prepare.curate import image_signature, text_signature
from pipelines.prepare.curate.text_signature import jaccard

LIMIT = 200
"""Members of a group up to which all pairs are tried. In a larger one (a licence text, a logo) each is tried with the
first and with its next NEIGHBOURS in order: equal ones stay connected, and the work stays linear."""
NEIGHBOURS = 16
BANDS_AT_ONCE = 6
"""Of 36 or 48. All at once hold some 5 KB a sample while they are grouped: a row of every band of every sample."""
MIN_SIMILARITY = 0.7
MAX_DISTANCE = 64
"""The loosest thresholds that a recipe may state: pairs are stored up to them, and a stricter one needs no search."""


def pairs_in(members: list[int]) -> list[tuple[int, int]]:
    """Candidate pairs (a < b) of one group, which is sorted and without repeats."""
    if len(members) <= LIMIT:
        return list(combinations(members, 2))
    near = {(a, b) for at, a in enumerate(members) for b in members[at + 1 : at + 1 + NEIGHBOURS]}
    return sorted(near | {(members[0], b) for b in members[1:]})


def candidates(daft: Any, frame: Any, kind: Any, num_bands: int) -> Any:
    """A frame a, b of different members of one group, each pair once; `kind` is the type of uid. Bands have keys of
    their own, so some of them at a time give the same pairs."""
    parts = []
    for first in range(0, num_bands, BANDS_AT_ONCE):
        bands = frame["bands"].slice(first, first + BANDS_AT_ONCE)
        parts.append(_candidates(daft, frame.select(frame["uid"], bands.alias("bands")), kind).collect())
    return reduce(lambda one, other: one.concat(other), parts).distinct()


def _candidates(daft: Any, frame: Any, kind: Any) -> Any:
    col = daft.col
    groups = (
        frame.explode("bands").where(daft.functions.not_null(col("bands"))).distinct()
        .groupby("bands").agg(col("uid").list_agg().alias("uids"))
        .where(col("uids").list_count() > 1)
        .select(col("uids").list_sort().alias("uids")).distinct()
    )  # fmt: skip
    pair = daft.DataType.struct({"a": kind, "b": kind})

    @daft.func(return_dtype=daft.DataType.list(pair))
    def tried(uids: list[int]) -> list[dict[str, int]]:
        return [{"a": a, "b": b} for a, b in pairs_in(uids)]

    found = groups.select(tried(col("uids")).alias("pair")).explode("pair")
    return found.select(col("pair").get("a").alias("a"), col("pair").get("b").alias("b")).distinct()


def _joined(daft: Any, pairs: Any, frame: Any, names: list[str]) -> Any:
    """Pairs with the columns `names` of both ends, as NAME_a and NAME_b."""
    col = daft.col
    for end in ("a", "b"):
        side = frame.select(col("uid").alias(end), *(col(name).alias(f"{name}_{end}") for name in names))
        pairs = pairs.join(side, on=end)
    return pairs


def text_pairs(daft: Any, frame: Any) -> pa.Table:
    """a, b, similarity: pairs whose Jaccard similarity is at least MIN_SIMILARITY, exact on the shingles."""
    col = daft.col

    @daft.func.batch(return_dtype=daft.DataType.float64())
    def similarity(left: Any, right: Any) -> pa.Array:
        ends = [_lists(side.to_arrow()) for side in (left, right)]
        return pa.array([jaccard(one, other) for one, other in zip(*ends, strict=True)], pa.float64())

    pairs = _joined(daft, candidates(daft, frame, daft.DataType.int64(), text_signature.NUM_BANDS), frame, ["shingles"])
    scored = pairs.select("a", "b", similarity(col("shingles_a"), col("shingles_b")).alias("similarity"))
    kept = scored.where(col("similarity") >= MIN_SIMILARITY)
    return _sorted(kept.to_arrow())


def _lists(column: pa.Array | pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a list column, without copies."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values, at = array.values.to_numpy(), array.offsets.to_numpy()
    return [values[start:stop] for start, stop in pairwise(at)]


def image_pairs(daft: Any, frame: Any) -> pa.Table:
    """a, b, distance (bits), difference (image_signature.difference): pairs within MAX_DISTANCE."""
    col = daft.col
    bits = daft.DataType.fixed_size_binary(image_signature.NUM_BITS // 8)
    hashed = frame.with_column("hash", col("hash").cast(bits))
    pairs = _joined(daft, candidates(daft, hashed, daft.DataType.uint64(), image_signature.NUM_BANDS), hashed, ["hash"])
    distance = daft.functions.hamming_distance(col("hash_a"), col("hash_b"))
    close = pairs.select("a", "b", distance.alias("distance")).where(col("distance") <= MAX_DISTANCE)

    @daft.func(return_dtype=daft.DataType.float64())
    def difference(left: bytes, right: bytes) -> float:
        return image_signature.difference(left, right)

    scored = _joined(daft, close, hashed, ["thumb"])
    found = scored.select("a", "b", "distance", difference(col("thumb_a"), col("thumb_b")).alias("difference"))
    return _sorted(found.to_arrow())


def _sorted(table: pa.Table) -> pa.Table:
    return table.sort_by([("a", "ascending"), ("b", "ascending")]).combine_chunks()
