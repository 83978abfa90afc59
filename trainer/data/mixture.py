"""The mixture: what counting found of each source, and which uses of which samples a window offers to the packer.

Epoch after epoch every source gives each of its samples `weight` times: a fraction is a seeded choice of samples, a
repeat within an epoch takes the next variant. Pure arithmetic on columns; N rows of a source, V variants.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from trainer.data.order import mix, unit
from trainer.data.packing import lower_bound, pack_windows

MAX_EPOCHS = 100_000


@dataclass(frozen=True)
class SourceCounts:
    """What one source offers. N rows, V variants; `fit` is an index into `fits` (rows of layout.Fit), -1: dropped, and
    then `drop` is an index into `reasons`, else -1."""

    name: str
    split: str
    kind: str
    uri: str
    """Of the source's folder, relative to OUT."""
    digest: str
    """Of the source's manifest."""
    rules_digest: str
    shard: np.ndarray
    """int32[N]"""
    row: np.ndarray
    """int32[N]"""
    id_hash: np.ndarray
    """uint64[N]: order.id_hash(source, sample id)"""
    tokens: np.ndarray
    """int32[N, V]"""
    patches: np.ndarray
    """int32[N, V]"""
    targets: np.ndarray
    """int32[N, V]"""
    fit: np.ndarray
    """int32[N, V]"""
    drop: np.ndarray
    """int8[N, V]"""
    fits: Sequence[Sequence[int]] = ((0, 0, 0),)
    reasons: Sequence[str] = ()
    weight: float = 1.0
    shard_bytes: Sequence[int] = ()
    """Size of each shard, for the cache that a node needs."""
    row_bytes: np.ndarray | None = None
    """int64[N]: bytes of the row in its shard, 0 for one without media, whose text lies in the index."""

    @property
    def num_variants(self) -> int:
        return self.tokens.shape[1]


@dataclass(frozen=True)
class Order:
    """What a plan is made with, besides the counts. With neither steps nor tokens: one pass over the mixture, whose
    last step may have empty places. `max_packs` cuts one pass short (held-out data)."""

    length: int
    patch_budget: int
    lanes: int
    packs_per_step: int
    seed: int
    steps: int | None = None
    tokens: int | None = None
    max_packs: int | None = None
    window_shards: int = 8
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Digests and names that go into plan.json as they are: stage, tokenizer, processor, data."""


class Place(NamedTuple):
    """One sample of a pack: where it lies, how it is rendered, and what it counts."""

    source: int
    shard: int
    row: int
    variant: int
    fit: int
    tokens: int
    patches: int
    targets: int


PLACE_TYPES = {
    "source": np.int16,
    "shard": np.int32,
    "row": np.int32,
    "variant": np.int16,
    "fit": np.int32,
    "tokens": np.int32,
    "patches": np.int32,
    "targets": np.int32,
}


def drops_of(source: SourceCounts) -> dict[str, int]:
    """Samples by the reason for which they are dropped; counted once, by the first variant that is dropped."""
    found: dict[str, int] = {}
    dropped = (source.drop >= 0).any(axis=1)
    for row in np.flatnonzero(dropped):
        variant = int(np.argmax(source.drop[row] >= 0))
        reason = source.reasons[int(source.drop[row, variant])]
        found[reason] = found.get(reason, 0) + 1
    return dict(sorted(found.items()))


class Pool:
    """Candidates: one entry for each use of a sample, appended epoch by epoch; packs hold indices of entries."""

    def __init__(self, sources: Sequence[SourceCounts], order: Order):
        self.sources, self.order = sources, order
        self.columns = {name: Growing(dtype) for name, dtype in PLACE_TYPES.items()}
        self.window = Growing(np.int32)
        """Of each entry: which window offered it, over all epochs; 0 while one window is the whole corpus."""
        self.epochs = 0
        self.dropped = [0] * len(sources)
        self.text_pack: list[int] = []
        fits = sorted({tuple(map(int, fit)) for source in sources for fit in source.fits} | {(0, 0, 0)})
        self.fits = [list(fit) for fit in fits]
        number = {fit: index for index, fit in enumerate(fits)}
        self.fit_of = [
            np.array([number[tuple(map(int, fit))] for fit in source.fits] or [0], np.int32) for source in sources
        ]

    @property
    def tokens(self) -> Growing:
        return self.columns["tokens"]

    @property
    def patches(self) -> Growing:
        return self.columns["patches"]

    def pack_tokens(self, pack: Sequence[int]) -> int:
        return int(self.tokens[np.asarray(pack)].sum())

    def pack_patches(self, pack: Sequence[int]) -> int:
        return int(self.patches[np.asarray(pack)].sum())

    def windows(self) -> Iterator[np.ndarray]:
        """Entries in seeded order. The windows of an epoch come before those of the next."""
        passes = 1 if self.order.steps is None and self.order.tokens is None else MAX_EPOCHS
        while self.epochs < passes:
            entries = self._epoch(self.epochs)
            self.epochs += 1
            yield from self._cut(entries)

    def _epoch(self, epoch: int) -> np.ndarray:
        first = len(self.tokens)
        for number, source in enumerate(self.sources):
            self._append(number, source, epoch)
        entries = np.arange(first, len(self.tokens))
        return entries[np.argsort(mix(self.order.seed, epoch, 1, entries - first), kind="stable")]

    def _append(self, number: int, source: SourceCounts, epoch: int) -> None:
        hashes = np.asarray(source.id_hash, np.uint64)
        whole = int(source.weight)
        chosen = unit(mix(self.order.seed, epoch, 2, hashes)) < source.weight - whole
        first_variant = (mix(self.order.seed, epoch, hashes) % np.uint64(source.num_variants)).astype(np.int64)
        for repeat in range(whole + 1):
            rows = np.arange(len(hashes)) if repeat < whole else np.flatnonzero(chosen)
            variants = (first_variant[rows] + repeat) % source.num_variants
            kept = source.fit[rows, variants] >= 0
            self.dropped[number] += int((~kept).sum())
            rows, variants = rows[kept], variants[kept]
            values = {
                "source": np.full(len(rows), number),
                "shard": source.shard[rows],
                "row": source.row[rows],
                "variant": variants,
                "fit": self.fit_of[number][source.fit[rows, variants]],
                "tokens": source.tokens[rows, variants],
                "patches": source.patches[rows, variants],
                "targets": source.targets[rows, variants],
            }
            for name, column in self.columns.items():
                column.extend(values[name])
            self.window.extend(np.zeros(len(rows), np.int32))

    def _cut(self, entries: np.ndarray) -> Iterator[np.ndarray]:
        """One window over everything while the corpus has no more shards than the lanes keep open together; else
        windows of so many shards a source, in seeded order, each with the mixture of the whole."""
        if self.order.max_packs is not None:
            enough = np.cumsum(self.tokens[entries]) >= self.order.max_packs * self.order.length
            entries = entries[: int(np.argmax(enough)) + 1] if enough.any() else entries
        num_windows = self.windows_per_epoch
        if num_windows == 1:
            yield self._without_text_pack(entries) if self.epochs == 1 else entries
            return
        shards, sources = self.columns["shard"][entries], self.columns["source"][entries]
        keys = mix(self.order.seed, self.epochs, 3, sources, shards)
        window = np.zeros(len(entries), np.int64)
        for number in range(len(self.sources)):
            mine = sources == number
            ranks = np.unique(keys[mine], return_inverse=True)[1]
            window[mine] = ranks * num_windows // (int(ranks.max(initial=0)) + 1)
        self.window.values[entries] = (self.epochs - 1) * num_windows + window
        for number in range(num_windows):
            if (part := entries[window == number]).size:
                yield part

    @property
    def windows_per_epoch(self) -> int:
        most = max((len(np.unique(source.shard)) for source in self.sources), default=1)
        return max(-(-most // (self.order.window_shards * self.order.lanes)), 1)

    def _without_text_pack(self, entries: np.ndarray) -> np.ndarray:
        """Sets the fullest possible pack of text alone aside, when the data has pictures and text for one: packed
        together best, they would rarely leave one (see plan.EARLY_STEPS)."""
        text = entries[self.patches[entries] == 0]
        if len(text) == len(entries) or self.tokens[text].sum() < self.order.length // 2:
            return entries
        order = self.order
        found = pack_windows([text], self.tokens, self.patches, length=order.length, patch_budget=order.patch_budget)
        self.text_pack = max((pack for packs in found for pack in packs), key=self.pack_tokens)
        return entries[~np.isin(entries, self.text_pack)]


class Growing:
    """An array that grows at its end."""

    def __init__(self, dtype: Any):
        self.values = np.zeros(1024, dtype)
        self.size = 0

    def extend(self, more: np.ndarray) -> None:
        need = self.size + len(more)
        if need > len(self.values):
            self.values = np.concatenate([self.values, np.zeros(max(need, len(self.values)), self.values.dtype)])
        self.values[self.size : need] = more
        self.size = need

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.values[: self.size][index]


def source_table(pool: Pool, packs: list[list[int]]) -> list[dict[str, Any]]:
    """What the packs use of each source, and what was dropped of it: rows of plan.json."""
    used = np.array([entry for pack in packs for entry in pack], np.int64)
    owner = pool.columns["source"][used]
    table = []
    for number, source in enumerate(pool.sources):
        mine = used[owner == number]
        shards = pool.columns["shard"][mine].astype(np.int64)
        rows = np.unique(shards * (int(source.row.max(initial=0)) + 1) + pool.columns["row"][mine])
        fitted = pool.columns["fit"][mine] != pool.fits.index([0, 0, 0])
        table.append(
            {
                "name": source.name,
                "split": source.split,
                "kind": source.kind,
                "uri": source.uri,
                "digest": source.digest,
                "rules_digest": source.rules_digest,
                "weight": source.weight,
                "num_samples": len(source.row),
                "num_dropped": int((source.drop >= 0).any(axis=1).sum()),
                "drops": drops_of(source),
                "uses": len(mine),
                "distinct": len(rows),
                "text_uses": int((pool.patches[mine] == 0).sum()),
                "fitted": int(fitted.sum()),
                "tokens": int(pool.tokens[mine].sum(dtype=np.int64)),
                "patches": int(pool.patches[mine].sum(dtype=np.int64)),
                "targets": int(pool.columns["targets"][mine].sum(dtype=np.int64)),
            }
        )
    return table


def statistics(pool: Pool, packs: list[list[int]], order: Order) -> dict[str, Any]:
    """Fill and totals of the packs that steps use."""
    used = np.array([entry for pack in packs for entry in pack], np.int64)
    tokens = int(pool.tokens[used].sum(dtype=np.int64))
    patches = int(pool.patches[used].sum(dtype=np.int64))
    room = max(len(packs), 1) * order.length
    bound = lower_bound(pool.tokens[used], order.length)
    preference = np.array([source.kind == "preference" for source in pool.sources])
    window_bytes = sum(sum(source.shard_bytes) for source in pool.sources) // pool.windows_per_epoch
    return {
        "fill": tokens / room,
        "patch_fill": patches / (max(len(packs), 1) * order.patch_budget),
        "tokens": tokens,
        "padding_tokens": len(packs) * order.length - tokens,
        "patches": patches,
        "targets": int(pool.columns["targets"][used].sum(dtype=np.int64)),
        "pairs": int(preference[pool.columns["source"][used]].sum()),
        "samples": len(used),
        "text_samples": int((pool.patches[used] == 0).sum()),
        "epochs": pool.epochs,
        "packs_over_lower_bound": len(packs) / max(bound, 1),
        "node_cache_bytes": window_bytes,
        **reading(pool, used),
        "dropped_uses": sum(pool.dropped),
    }


def reading(pool: Pool, used: np.ndarray) -> dict[str, Any]:
    """What a node that runs every lane fetches and what of it the packs use, in bytes. A shard is fetched whole, once
    for each window that uses a row of it. `read_amplification` is the one by the other: above 1 when few rows of a
    shard are used, below 1 when the cache serves a row several times, 0 without media. Lanes share one window, so that
    each of N nodes fetches nearly all of it, and over all nodes it is N times as much.
    """
    owner, shards, rows = (pool.columns[name][used].astype(np.int64) for name in ("source", "shard", "row"))
    fetched = needed = 0
    for number, source in enumerate(pool.sources):
        if source.row_bytes is None or not len(source.shard_bytes):
            continue
        mine = owner == number
        stride = int(source.row.max(initial=0)) + 1
        sizes = np.zeros(len(source.shard_bytes) * stride, np.int64)
        sizes[source.shard.astype(np.int64) * stride + source.row] = source.row_bytes
        found = sizes[shards[mine] * stride + rows[mine]]
        touched = np.unique(np.stack([pool.window[used][mine][found > 0], shards[mine][found > 0]]), axis=1)
        fetched += int(np.asarray(source.shard_bytes, np.int64)[touched[1].astype(np.int64)].sum())
        needed += int(found.sum())
    amplification = round(fetched / needed, 4) if needed else 0.0
    return {"fetched_bytes": fetched, "used_bytes": needed, "read_amplification": amplification}
