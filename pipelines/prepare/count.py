"""Counts of every (sample, variant): tokens, patches, target tokens, visual tokens, and how an over-long one fits.

Nothing is decoded: text is tokenised, grids follow from the sizes in the headers. Two columns lie beside each shard:

    counts-KEY   what a sample takes as it is; KEY covers rendering, tokenizer, family and pixels, not the budgets
    fits-KEY     the same after the over-long policy; written only for shards in which something is over-long

So another mixture tokenises nothing, and other budgets tokenise what does not fit them. A shard whose column is there
is not counted again: an interrupted step goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa

from pipelines.prepare.engine import Engine, blocks
from trainer import storage
from trainer.data import kept
from trainer.data.layout import REASONS, Drop, Fit, Layout, Rules, fit_sample, layout, reason_of, stage_rules, varies
from trainer.data.mixture import SourceCounts
from trainer.data.order import id_hash
from trainer.data.sample import Sample, from_json
from trainer.data.shards import Source, read_column, write_column
from trainer.data.tokenizer import Tokenizer
from trainer.models.config import family_of, tokenizer_uri
from trainer.models.family import Family
from trainer.recipe import Recipe
from trainer.resolve import digest, from_resolved, resolved

VERSION = 1
BLOCK_ROWS = 2048
FIELDS = ("tokens", "patches", "targets", "visual", "drop")
FIT_FIELDS = (*FIELDS, "image_max", "max_frames", "turns")
COUNTED = {"tokens": np.int32, "patches": np.int32, "targets": np.int32, "drop": np.int8, "fit": np.int32}
"""Held of every sample of a source."""
Columns = dict[str, np.ndarray]
"""int32[N, V] by field; `drop` is an index into layout.REASONS, -1: used."""


@dataclass(frozen=True)
class RulesRef:
    """What a worker needs to build the rules of one source: text, so that it travels to a worker of Ray."""

    recipe_json: str
    stage: str
    source: str
    out: str


@lru_cache(maxsize=16)
def rules_for(ref: RulesRef) -> Rules:
    recipe = from_resolved(json.loads(ref.recipe_json), where="the recipe of this step")
    stage = recipe.stages.named()[ref.stage]
    tokenizer = Tokenizer.load(tokenizer_uri(recipe, ref.out))
    return stage_rules(recipe, stage, family_of(recipe, ref.out), tokenizer)[ref.source]


def rules_ref(recipe: Recipe, stage: str, source: str, out: str) -> RulesRef:
    return RulesRef(json.dumps(resolved(recipe), sort_keys=True), stage, source, out)


# ---------------------------------------------------------------- one sample


def natural(text: str, num_variants: int, rules: Rules) -> dict[str, list[int]]:
    """Counts of every variant of one sample as it is, whatever the budgets."""
    sample = from_json(text)
    return _by_variant(FIELDS, sample, num_variants, lambda variant: _natural(sample, variant, rules))


def _natural(sample: Sample, variant: int, rules: Rules) -> tuple[int, ...]:
    try:
        laid = layout(sample, variant, Fit(), rules)
    except ValueError as error:
        return (0, 0, 0, 0, REASONS.index(reason_of(error)))
    return (*_counts(laid), -1 if laid.num_targets else REASONS.index("no_target"))


def fitted(text: str, num_variants: int, rules: Rules) -> dict[str, list[int]]:
    """Counts of every variant of one sample after the over-long policy."""
    sample = from_json(text)
    return _by_variant(FIT_FIELDS, sample, num_variants, lambda variant: _fitted(sample, variant, rules))


def _fitted(sample: Sample, variant: int, rules: Rules) -> tuple[int, ...]:
    found = fit_sample(sample, variant, rules)
    if isinstance(found, Drop):
        return (0, 0, 0, 0, REASONS.index(found.reason), 0, 0, 0)
    return (*_counts(found.layout), -1, *found.fit.row())


def _counts(laid: Layout) -> tuple[int, int, int, int]:
    return laid.num_tokens, laid.num_patches, laid.num_targets, laid.num_visual_tokens


def _by_variant(
    fields: tuple[str, ...], sample: Sample, num_variants: int, count: Callable[[int], tuple[int, ...]]
) -> dict[str, list[int]]:
    """Counts by field; a sample that every variant writes alike is counted once."""
    counted = [count(variant) for variant in range(num_variants)] if varies(sample) else [count(0)] * num_variants
    return {name: list(values) for name, values in zip(fields, zip(*counted, strict=True), strict=True)}


def _count_row(text: str, *, ref: RulesRef, num_variants: int, fit: bool) -> tuple[str, list[bytes]]:
    count = fitted if fit else natural
    return json.dumps(count(text, num_variants, rules_for(ref))), []


# ---------------------------------------------------------------- one source


class Counter:
    """Counts sources of one stage, shard by shard. `tokenised` is how many samples it had to tokenise."""

    def __init__(self, recipe: Recipe, stage: str, out: str):
        self.recipe, self.stage, self.out = recipe, stage, out
        self.num_variants = recipe.prepare.variants
        self.tokenised = 0
        self._engine: Engine | None = None

    def count(self, name: str, uri: str, *, kind: str, split: str, weight: float) -> SourceCounts:
        """`name` is the source's name in the mixture, `uri` its folder relative to the output."""
        folder = storage.join(self.out, uri)
        source = Source.open(folder, keep_indexes=1)
        ref = rules_ref(self.recipe, self.stage, name, self.out)
        rules = rules_for(ref)
        started, before = time.monotonic(), self.tokenised
        told = started
        parts: list[Columns] = []
        for shard in range(source.num_shards):
            parts.append(_compact(self._shard(source, shard, ref, rules)))
            if self.tokenised > before and time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"count: {self.stage} {name}/{split} shard {shard + 1} of {source.num_shards}", flush=True)
        if self.tokenised > before:
            took = time.monotonic() - started
            print(f"count: {self.stage} {name}/{split} {self.tokenised - before} tokenised ({took:.1f} s)", flush=True)
        return _source_counts(source, parts, rules, name=name, uri=uri, kind=kind, split=split, weight=weight)

    def _shard(self, source: Source, shard: int, ref: RulesRef, rules: Rules) -> Columns:
        """Natural counts, with those that do not fit replaced by what the policy makes of them."""
        every = np.arange(source.index(shard).num_rows)
        columns = self._column(source, shard, "counts", _loose_digest(rules), every, ref)
        columns |= {name: np.zeros_like(columns["tokens"]) for name in ("image_max", "max_frames", "turns")}
        too_long = (columns["tokens"] > rules.length) | (columns["patches"] > rules.patch_budget)
        rows = np.flatnonzero((too_long & (columns["drop"] < 0)).any(axis=1))
        if rows.size:
            fits = self._column(source, shard, "fits", rules.digest, rows, ref)
            for name, values in columns.items():
                values[rows] = fits[name][rows]
        return columns

    def _column(
        self, source: Source, shard: int, kind: str, rules_digest: str, rows: np.ndarray, ref: RulesRef
    ) -> Columns:
        """The stored column of a kind (counts, fits), or the one computed now for `rows` (the others are zero)."""
        fit = kind == "fits"
        fields = FIT_FIELDS if fit else FIELDS
        texts = source.index(shard)["sample_json"]
        name = f"{kind}-{rules_digest[:12]}"
        key = f"{VERSION}/{self.num_variants}/{rules_digest}/{source.manifest['shards'][shard]['index_sha256']}"
        table = read_column(source.uri, shard, name, key, num_rows=len(texts))
        if table is None:
            found = {field: np.zeros((len(texts), self.num_variants), np.int32) for field in fields}
            for block in blocks(rows.tolist(), BLOCK_ROWS):
                for row, values in zip(block, self._map([texts[row].as_py() for row in block], ref, fit), strict=True):
                    for field in fields:
                        found[field][row] = values[field]
            self.tokenised += len(rows)
            per_row = pa.list_(pa.int32(), self.num_variants)
            arrays = {
                field: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=per_row)
                for field, values in found.items()
            }
            write_column(source.uri, shard, name, pa.table(arrays), key)
            return found
        shape = (table.num_rows, self.num_variants)
        return {field: table[field].combine_chunks().flatten().to_numpy().reshape(shape).copy() for field in fields}

    def _map(self, texts: list[str], ref: RulesRef, fit: bool) -> list[dict[str, list[int]]]:
        if self._engine is None:
            self._engine = Engine(self.recipe.prepare.engine)
        function = partial(_count_row, ref=ref, num_variants=self.num_variants, fit=fit)
        return [json.loads(text) for text, _ in self._engine.map(function, texts)]


def _loose_digest(rules: Rules) -> str:
    """Digest of the rules without the budgets: what natural counts depend on."""
    return digest({**replace(rules, length=0, patch_budget=0, over_long="drop").facts(), "natural": VERSION})


def _compact(counted: Columns) -> Columns:
    """What is held of a shard until all are counted, 17 bytes a variant for 32. `fits`: those that occur, `fit`: which
    of them."""
    fit_rows = np.stack([counted[field] for field in ("image_max", "max_frames", "turns")], axis=-1)
    fits, number = np.unique(fit_rows.reshape(-1, 3), axis=0, return_inverse=True)
    fit = number.reshape(counted["drop"].shape).astype(np.int32)
    counts = {field: counted[field] for field in ("tokens", "patches", "targets")}
    return {**counts, "drop": counted["drop"].astype(np.int8), "fits": fits, "fit": fit}


def _source_counts(source: Source, parts: list[Columns], rules: Rules, **facts) -> SourceCounts:
    num_rows = [part["tokens"].shape[0] for part in parts]
    fits = sorted({tuple(row) for part in parts for row in part["fits"].tolist()}) or [(0, 0, 0)]
    number = {row: at for at, row in enumerate(fits)}
    for part in parts:
        part["fit"] = np.array([number[tuple(row)] for row in part["fits"].tolist()], np.int32)[part["fit"]]
    columns = {
        field: np.concatenate([part.pop(field) for part in parts]) if parts else np.zeros((0, 1), dtype)
        for field, dtype in COUNTED.items()
    }
    reasons = _curated(source, columns["drop"])
    return SourceCounts(
        digest=source.digest,
        rules_digest=rules.digest,
        shard=np.repeat(np.arange(len(parts), dtype=np.int32), num_rows),
        row=np.concatenate([np.arange(n, dtype=np.int32) for n in num_rows]) if parts else np.zeros(0, np.int32),
        id_hash=_id_hashes(source, facts["name"]),
        tokens=columns["tokens"],
        patches=columns["patches"],
        targets=columns["targets"],
        fit=np.where(columns["drop"] < 0, columns["fit"], -1).astype(np.int32),
        drop=columns["drop"],
        fits=fits,
        reasons=reasons,
        shard_bytes=[shard["size_bytes"] for shard in source.manifest["shards"]],
        row_bytes=_row_bytes(source),
        **facts,
    )


def _curated(source: Source, drop: np.ndarray) -> tuple[str, ...]:
    """Marks what curation has dropped, in place; REASONS and the filters that dropped something. The samples were
    counted all the same: another threshold counts nothing again."""
    found = np.concatenate([np.zeros(0, object), *(kept.reasons(source, n) for n in range(source.num_shards))])
    filters = sorted(set(found.tolist()) - {""})
    for number, name in enumerate(filters, len(REASONS)):
        drop[found == name] = number
    return (*REASONS, *filters)


def _id_hashes(source: Source, name: str) -> np.ndarray:
    """uint64[N]"""
    found = [np.zeros(0, np.uint64)]
    for shard in range(source.num_shards):
        ids = source.index(shard)["id"].to_pylist()
        found.append(np.array([id_hash(name, identity) for identity in ids], np.uint64))
    return np.concatenate(found)


def _row_bytes(source: Source) -> np.ndarray:
    """int64[N]: what the loader reads of each row's shard; nothing for a row without media."""
    found = [np.zeros(0, np.int64)]
    for shard in range(source.num_shards):
        index = source.index(shard)
        size, images, videos = (index[name].to_numpy() for name in ("size", "num_images", "num_videos"))
        found.append(np.where(images + videos > 0, size, 0))
    return np.concatenate(found)


def family_facts(family: Family) -> str:
    """Digest of what the family's arithmetic depends on: for plan.json."""
    return digest(family.layout_facts())
