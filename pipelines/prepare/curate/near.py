"""Deduplication and decontamination of sources: signatures as columns, pairs over all partitions, decisions from pairs.

A comparison is over folders: the source's own training part is the first, the others are what it is compared with. Its
pairs are stored once below OUT/data/curate, keyed by the digests of the shards; thresholds are applied to them later.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.prepare.curate import image_signature, pairs, text_signature
from pipelines.prepare.curate.columns import Work, place_of, uid_of
from pipelines.prepare.curate.components import components, duplicates
from pipelines.prepare.curate.content import content_digest, text_of
from pipelines.prepare.curate.filters import Verdict
from pipelines.prepare.engine import reader_of
from trainer import storage
from trainer.curation import Near
from trainer.data import kept
from trainer.data.sample import from_json
from trainer.data.shards import Source
from trainer.errors import MediaError
from trainer.resolve import digest

VERSION = [1, text_signature.VERSION, image_signature.VERSION, pairs.LIMIT, pairs.NEIGHBOURS]
Columns = list[pa.Table]
"""One table a folder, in order of shard and row."""


# ---------------------------------------------------------------- columns


def text_columns(work: Work, source: Source, told: str, *names: str) -> pa.Table:
    """The named columns of text_signature.SCHEMA with `place`, one row a sample."""

    def rows(texts: list[str], shard: int, block: list[int]) -> list[dict[str, Any]]:
        facts = work.map(_text_facts, texts)
        signed = text_signature.text_signatures(work.daft, [fact.pop("text") for fact in facts])
        places = ({"place": uid_of(0, shard, row)} for row in block)
        return [{**place, **fact, **signs} for place, fact, signs in zip(places, facts, signed, strict=True)]

    return _all(work, source, "near_text", text_signature.VERSION, rows, text_signature.SCHEMA, told, names)


def _text_facts(text: str) -> tuple[str, list[bytes]]:
    sample = from_json(text)
    said = text_of(sample)
    size = len(said) + sum(media.width * media.height * media.num_frames for media in sample.media)
    return json.dumps({"text": said, "digest": content_digest(sample), "size": size}), []


def image_columns(work: Work, source: Source, told: str, *names: str) -> pa.Table:
    """The named columns of image_signature.SCHEMA with `place`, one row a sample; every image is decoded, once. One
    that cannot be decoded (what prepare.verify_media: header lets through) has an empty hash and is the same as its
    own bytes alone."""

    def rows(texts: list[str], shard: int, block: list[int]) -> list[dict[str, Any]]:
        asked = [json.dumps({"uri": source.uri, "digest": source.digest, "shard": shard, "row": row}) for row in block]
        found = []
        for row, (facts, files) in zip(block, work.engine.map(_image_facts, asked), strict=True):
            half = len(files) // 2
            found.append(
                {
                    "place": uid_of(0, shard, row),
                    "images": json.loads(facts),
                    "hashes": files[:half],
                    "thumbs": files[half:],
                }
            )
        return found

    return _all(work, source, "near_image", image_signature.VERSION, rows, image_signature.SCHEMA, told, names)


def _image_facts(asked: str) -> tuple[str, list[bytes]]:
    """(identities of the sample's images, their hashes and then their thumbnails)."""
    place = json.loads(asked)
    reader = reader_of(place["uri"], place["digest"])
    sample = reader.source.sample(place["shard"], place["row"])
    if not any(media.kind == "image" for media in sample.media):
        return "[]", []
    files = reader.media(place["shard"], place["row"])
    found = [
        (image_signature.image_id(file.digest), *_signature(data, file.origin))
        for file, data in zip(sample.media, files, strict=True)
        if file.kind == "image"
    ]
    return json.dumps([item[0] for item in found]), [*(item[1] for item in found), *(item[2] for item in found)]


def _signature(data: bytes, origin: str) -> tuple[bytes, bytes]:
    try:
        return image_signature.image_signature(data, where=origin)
    except MediaError:
        return b"", b""


def undecodable(work: Work, source: Source, told: str) -> int:
    """Samples with an image that has no signature."""
    hashes = image_columns(work, source, told, "hashes")["hashes"].to_pylist()
    return sum(any(not one for one in row) for row in hashes)


def _all(
    work: Work, source: Source, kind: str, version: int, rows: Any, schema: pa.Schema, told: str, names: Sequence[str]
) -> pa.Table:
    """Of all shards only the columns that are asked for are held."""
    key = digest({"kind": kind, "version": version})
    tables = [
        work.column(source, shard, kind=kind, key=key, rows=rows, schema=schema, told=told).select(["place", *names])
        for shard in range(source.num_shards)
    ]
    return pa.concat_tables(tables).combine_chunks() if tables else schema.empty_table().select(["place", *names])


def documents_of_image(work: Work, source: Source) -> np.ndarray:
    """float64[N]: of each sample's images, the most samples of the source that show one (0 without images)."""
    daft, col = work.daft, work.daft.col
    shown = []
    for shard in range(source.num_shards):
        for row, text in enumerate(source.index(shard)["sample_json"].to_pylist()):
            digests = {media.digest for media in from_json(text).media if media.kind == "image"}
            shown += [(uid_of(0, shard, row), one) for one in sorted(digests)]
    uids = _uids(source, 0)
    if not shown:
        return np.zeros(len(uids))
    frame = daft.from_pydict({"uid": [uid for uid, _ in shown], "image": [one for _, one in shown]})
    counts = frame.groupby("image").agg(col("uid").count().alias("documents"))
    most = frame.join(counts, on="image").groupby("uid").agg(col("documents").max()).to_arrow()
    found = np.zeros(len(uids))
    found[np.searchsorted(uids, most["uid"].to_numpy())] = most["documents"].to_numpy()
    return found


def _uids(source: Source, folder: int) -> np.ndarray:
    """int64[N], ascending."""
    sizes = [shard["num_samples"] for shard in source.manifest["shards"]]
    parts = [uid_of(folder, shard, 0) + np.arange(size, dtype=np.int64) for shard, size in enumerate(sizes)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


# ---------------------------------------------------------------- comparisons


class Known:
    """Signatures and pairs of an output, each read or computed once a run."""

    def __init__(self, out: str, work: Work):
        self.out, self.work = out, work

    def folder(self, name: str, split: str) -> str:
        return storage.join(self.out, "data", "sources", name, split)

    def verdicts(self, part: str, name: str, asked: Near, alive: np.ndarray) -> Iterator[Verdict]:
        """What `decontaminate` or `dedup` drops of a source: first exact copies, then text, then images.

        alive: bool[N], what filters before have kept; it changes while the caller takes verdicts one by one.
        """
        split = "held_out" if part == "decontaminate" else "train"
        folders = [self.folder(name, "train"), *(self.folder(other, split) for other in asked.against)]
        sources = [Source.open(folder, keep_indexes=1) for folder in folders]
        compared = Compared(self.work, sources, self.out, name)
        drop = compared.contaminated if part == "decontaminate" else compared.repeated
        for method in ("exact", "text", "image"):
            limit = getattr(asked, method)
            if limit is None or limit is False:
                continue
            groups, told = compared.groups(method, asked)
            dropped, nearest = drop(groups, alive)
            alive = alive & ~dropped
            yield Verdict(f"{part}.{method}", dropped, nearest, told)


class Compared:
    """The samples of several folders in one numbering: N of the first folder, then those of the others."""

    def __init__(self, work: Work, sources: list[Source], out: str, name: str):
        self.work, self.sources, self.name = work, sources, name
        self.cache = storage.join(out, "data", "curate", name)
        self.uids = np.concatenate([_uids(source, number) for number, source in enumerate(sources)])
        self.num_own = sources[0].num_samples
        ids = [one.index(shard)["id"] for one in sources for shard in range(one.num_shards)]
        self.ids = pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string())
        self.others_kept = np.concatenate(
            [np.zeros(0, bool)]
            + [kept.reasons(one, shard) == "" for one in sources[1:] for shard in range(one.num_shards)]
        )  # fmt: skip

    def groups(self, method: str, asked: Near) -> tuple[Groups, str]:
        if method == "exact":
            return self._exact(), "another sample of the same content"
        if method == "text":
            assert asked.text is not None
            edges = self._pairs("text", lambda: pairs.text_pairs(self.work.daft, self._text_frame()))
            near = edges.filter(pc.field("similarity") >= asked.text)
            return Groups.of_edges(self._numbers(near), len(self.uids)), f"Jaccard similarity below {asked.text:g}"
        edges = self._pairs("image", lambda: pairs.image_pairs(self.work.daft, self._image_frame()))
        close = (pc.field("distance") <= asked.image) & (pc.field("difference") <= asked.image_difference)
        return self._image_groups(edges.filter(close)), f"more than {asked.image} bits apart"

    def _columns(self, kind: str, *names: str) -> Columns:
        make = text_columns if kind == "text" else image_columns
        found = []
        for number, source in enumerate(self.sources):
            table = make(self.work, source, self.name, *names)
            uids = pa.array(table["place"].to_numpy() + uid_of(number, 0, 0))
            found.append(table.set_column(0, "uid", uids))
        return found

    def _exact(self) -> Groups:
        """Digests are compared as their 32 bytes: as text they take ten times that while they are sorted."""
        digests = pa.concat_tables(self._columns("text", "digest"))["digest"]
        raw = [np.array([bytes.fromhex(one) for one in chunk.to_pylist()], "S32") for chunk in digests.chunks]
        _, group = np.unique(np.concatenate([np.zeros(0, "S32"), *raw]), return_inverse=True)
        return Groups(group.reshape(-1))

    def _text_frame(self) -> Any:
        return self.work.daft.from_arrow(pa.concat_tables(self._columns("text", "bands", "shingles")))

    def _image_frame(self) -> Any:
        """One row an image, whatever the number of samples that show it."""
        table = pa.concat_tables(self._columns("image", "images", "hashes", "thumbs"))
        flat = [table[name].combine_chunks().flatten() for name in ("images", "hashes", "thumbs")]
        _, first = np.unique(flat[0].to_numpy(), return_index=True)
        first = np.array([at for at in first.tolist() if flat[1][at].as_py()], np.int64)  # those that were decoded
        ids, hashes, thumbs = (column.take(pa.array(first)) for column in flat)
        bits = np.frombuffer(b"".join(hashes.to_pylist()), np.uint8).reshape(len(ids), image_signature.NUM_BITS // 8)
        bands = pa.array(image_signature.bands_of(bits).tolist(), pa.list_(pa.uint64()))
        return self.work.daft.from_arrow(pa.table({"uid": ids, "bands": bands, "hash": hashes, "thumb": thumbs}))

    def _pairs(self, kind: str, find: Any) -> pa.Table:
        """The stored pairs of these shards, else those found now."""
        key = digest({"kind": kind, "version": VERSION, "sources": [source.digest for source in self.sources]})
        uri = storage.join(self.cache, f"{kind}-{key[:16]}.parquet")
        try:
            return pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
        except FileNotFoundError:
            pass
        found = find()
        self.work.computed[f"pairs_{kind}"] = self.work.computed.get(f"pairs_{kind}", 0) + 1
        sink = pa.BufferOutputStream()
        pq.write_table(found, sink)
        storage.write_bytes(uri, sink.getvalue().to_pybytes())
        return found

    def _numbers(self, edges: pa.Table) -> np.ndarray:
        """int64[E, 2]: uids as places in this comparison."""
        return np.stack([np.searchsorted(self.uids, edges[end].to_numpy()) for end in ("a", "b")], axis=1)

    def _image_groups(self, edges: pa.Table) -> Groups:
        """Samples that show the same pictures are one group; pictures are the same along pairs."""
        shown = pa.concat_tables(self._columns("image", "images"))["images"].to_pylist()
        every = np.unique(np.array([image for images in shown for image in images], np.uint64))
        numbered = np.stack([np.searchsorted(every, edges[end].to_numpy()) for end in ("a", "b")], axis=1)
        label = components(len(every), numbered)
        pictures = [label[np.searchsorted(every, np.array(images, np.uint64))].tolist() for images in shown]
        keys: dict[tuple[int, ...], int] = {}
        group = np.array(
            [keys.setdefault(tuple(sorted(one)) or (-1 - at,), len(keys)) for at, one in enumerate(pictures)], np.int64
        )
        return Groups(group, pictures=pictures)

    # ------------------------------------------------------------ decisions

    def repeated(self, groups: Groups, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bool[N] own samples of which another is kept, str[N] that one's id). What other sources keep goes first,
        then the largest sample, then the smallest id."""
        present = np.concatenate([alive, self.others_kept])
        own = np.arange(len(self.uids)) < self.num_own
        sizes = pa.concat_tables(self._columns("text", "size"))["size"]
        every = pa.table({"own": own, "size": sizes, "id": self.ids, "uid": self.uids, "at": np.arange(len(own))})
        keys = [("own", "ascending"), ("size", "descending"), ("id", "ascending"), ("uid", "ascending")]
        order = every.sort_by(keys)["at"].to_numpy()
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        group = groups.among(present)
        rank[~present] += len(order)
        dropped = duplicates(group, rank) & present
        there = order[present[order]]
        groups_there, at = np.unique(group[there], return_index=True)  # the first of each
        mine = group[: self.num_own]
        place = np.searchsorted(groups_there, mine) if len(there) else np.zeros(len(mine), np.int64)
        known = np.append(groups_there, -1)[place] == mine
        return self._answer(dropped, np.where(known, np.append(there[at], -1)[place], -1))

    def contaminated(self, groups: Groups, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bool[N] own samples that are, or show a picture that is, in what is held out; str[N] with which one)."""
        held = range(self.num_own, len(self.uids))
        where: dict[int, int] = {}
        for at in reversed(held):
            for one in groups.marks(at):
                where[one] = at
        match = [next((where[one] for one in groups.marks(at) if one in where), -1) for at in range(self.num_own)]
        if groups.edges is not None:  # text: a pair, not a chain of pairs
            match = [-1] * self.num_own
            for a, b in groups.edges.tolist():
                if a < self.num_own <= b and (match[a] < 0 or b < match[a]):
                    match[a] = b
        found = np.array([one >= 0 for one in match], bool)
        return self._answer(np.concatenate([found & alive, np.zeros(len(held), bool)]), match)

    def _answer(self, dropped: np.ndarray, partner: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Names only of the samples that are dropped: each is a text of its own."""
        own = dropped[: self.num_own]
        told = np.full(len(own), "", dtype=object)
        for at in np.flatnonzero(own).tolist():
            told[at] = self._told(int(partner[at]))
        return own, told

    def _told(self, at: int) -> str:
        if at < 0:
            return ""
        folder = place_of(int(self.uids[at]))[0]
        return f"{'/'.join(self.sources[folder].uri.rstrip('/').split('/')[-2:])}/{self.ids[at].as_py()}"


class Groups:
    """Which samples are one: a label each, or the pairs that make them so."""

    def __init__(self, label: np.ndarray, *, edges: np.ndarray | None = None, pictures: list[list[int]] | None = None):
        self.label, self.edges, self.pictures = label, edges, pictures

    @classmethod
    def of_edges(cls, edges: np.ndarray, num: int) -> Groups:
        return cls(np.arange(num), edges=edges)

    def among(self, present: np.ndarray) -> np.ndarray:
        """int64[N] labels, where only pairs of samples that are still there count."""
        if self.edges is None:
            return self.label
        return components(len(present), self.edges[present[self.edges].all(axis=1)])

    def marks(self, at: int) -> list[int]:
        """What is looked up of a sample: its group, or each of its pictures."""
        return self.pictures[at] if self.pictures is not None else [int(self.label[at])]
