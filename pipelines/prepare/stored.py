"""Shards that are there already: found, verified byte by byte and sample by sample, and counted.

folders_below(uri)     every folder of shards at or below an address; sources_below(uri) opens them
problems(source)       what is wrong with one: digests of shards, rows, media, indexes, columns; each Sample's own
statistics(source)     counts by kind, split and role, sizes, lengths, objects: from the index, media are not read
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer import storage
from trainer.data import kept, media, video
from trainer.data.sample import Action, Media, Objects, Sample, Span, Text, from_json, parts_of
from trainer.data.shards import INDEX_SCHEMA, MANIFEST, ShardReader, Source, header_facts, row_members, shard_name
from trainer.errors import DataError, UsageError

DEPTH = 4
"""Folders below an output in which shards are looked for: OUT/data/sources/NAME/SPLIT."""
FILES = frozenset(
    (
        "tar", "parquet", "arrow", "json", "jsonl", "yaml", "yml", "txt", "md", "log", "html", "css", "js", "csv",
        "tsv", "xml", "pdf", "png", "jpg", "jpeg", "webp", "gif", "bmp", "svg", "mp4", "webm", "mkv", "mov", "avi",
        "safetensors", "bin", "pt", "npy", "npz", "gz", "zst", "lock",
    )
)  # fmt: skip
"""Endings of what is never looked into."""
PERCENTILES = (0, 50, 95, 100)


def sources_below(uri: str) -> list[Source]:
    """
    Raises:
        UsageError: no shards at or below the address. ShardError: a manifest that is not what was written.
    """
    return [opened(folder) for folder in folders_below(uri)]


def opened(folder: str) -> Source:
    """To be gone through in order. Raises ShardError."""
    return Source.open(folder, keep_indexes=2)


def folders_below(uri: str) -> list[str]:
    """Raises UsageError: no shards at or below the address."""
    level, found = [uri.rstrip("/")], []
    for _ in range(DEPTH + 1):
        below = []
        for folder in level:
            names = storage.list_dir(folder)
            if MANIFEST in names:
                found.append(folder)
            else:
                below += [storage.join(folder, name) for name in names if _may_be_a_folder(name)]
        level = below
    if not found:
        do = f"name a folder of shards (it has a {MANIFEST}), or an output above some; qwenvl data ingest makes them"
        raise UsageError("no shards", where=uri, do=do)
    return sorted(found)


def _may_be_a_folder(name: str) -> bool:
    """A listing does not say: a store has no folders, and asking for each file would be a request each."""
    return not name.startswith(".") and name.rpartition(".")[2].lower() not in FILES


# ---------------------------------------------------------------- check


def problems(source: Source) -> Iterator[str]:
    """Everything that is wrong with a source, one line each. All bytes are read."""
    reader = ShardReader(source)
    seen: dict[str, str] = {}
    try:
        for shard in range(source.num_shards):
            yield from _shard_problems(source, reader, shard, seen)
    finally:
        reader.close()
    if sum(facts["num_samples"] for facts in source.manifest["shards"]) != source.num_samples:
        yield f"{source.uri}/{MANIFEST}: num_samples is not the sum over the shards"


def _shard_problems(source: Source, reader: ShardReader, shard: int, seen: dict[str, str]) -> Iterator[str]:
    facts, tar = source.manifest["shards"][shard], storage.join(source.uri, f"{shard_name(shard)}.tar")
    try:
        index = source.index(shard)
    except DataError as error:
        yield as_problem(error)
        return
    if index.schema.names != INDEX_SCHEMA.names or index.num_rows != facts["num_samples"]:
        yield f"{tar}: the index has {index.num_rows} rows of {index.schema.names}, not {facts['num_samples']}"
        return
    try:
        found = (storage.size(tar), storage.sha256_of(tar))
    except FileNotFoundError:
        yield f"{tar}: the shard is missing"
        return
    if found != (facts["size_bytes"], facts["sha256"]):
        yield f"{tar}: expected {facts['size_bytes']} bytes, sha256 {facts['sha256']}; got {found[0]}, {found[1]}"
    yield from _column_problems(source.uri, shard, index.num_rows)
    for row in range(index.num_rows):
        entry = {name: index[name][row].as_py() for name in index.schema.names}
        where = f"{tar}, row {row}, sample {entry['id']}"
        if entry["id"] in seen:
            yield f"{where}: the id is that of {seen[entry['id']]}, too"
        seen[entry["id"]] = f"shard {shard}, row {row}"
        yield from (f"{where}: {problem}" for problem in _row_problems(reader, shard, row, entry))


def _row_problems(reader: ShardReader, shard: int, row: int, entry: dict[str, Any]) -> Iterator[str]:
    try:
        sample = from_json(entry["sample_json"])
        members = row_members(reader.row_bytes(shard, row))
    except DataError as error:
        yield as_problem(error, place=False)  # whoever asks says it
        return
    if not members or members[0][1].decode("utf-8", "replace") != entry["sample_json"]:
        yield "the tar's sample is not the index's"
    files = [data for _, data in members[1:]]
    if len(files) != len(sample.media):
        yield f"expected {len(sample.media)} media files, got {len(files)}"
        return
    for name, value in header_facts(sample).items():
        if entry[name] != value:
            yield f"the index says {name} {entry[name]}, the sample {value}"
    for number, (item, data) in enumerate(zip(sample.media, files, strict=True)):
        yield from (f"media {number} ({item.origin}): {problem}" for problem in _media_problems(item, data))
    yield from sample_problems(sample)


def _media_problems(item: Media, data: bytes) -> Iterator[str]:
    if (found := media.digest_of(data)) != item.digest:
        yield f"expected sha256 {item.digest}, got {found}"
    try:
        header = media.image_header(data) if item.kind == "image" else video.video_header(data)
    except DataError as error:
        yield as_problem(error)
        return
    if (header.width, header.height, header.suffix) != (item.width, item.height, item.suffix):
        told = f"{header.width}x{header.height} {header.suffix}"
        yield f"expected {item.width}x{item.height} {item.suffix}, the file is {told}"
    if len(data) != item.size_bytes:
        yield f"expected {item.size_bytes} bytes, got {len(data)}"


def sample_problems(sample: Sample) -> Iterator[str]:
    """What a Sample says that cannot be: a place outside its picture, a time outside its clip, nothing to learn."""
    for part in parts_of(sample):
        if isinstance(part, Objects):
            item = sample.media[part.media]
            for thing in part.objects:
                yield from (f"object {thing.label!r}: {problem}" for problem in _place_problems(thing.at, item))
        elif isinstance(part, Action):
            for name, (x, y) in part.coordinates.items():
                item = sample.media[part.media]
                if not (0 <= x <= item.width and 0 <= y <= item.height):
                    yield f"action {part.action}: {name} {x}, {y} outside {item.width}x{item.height}"
    learnt = [message for message in (*sample.messages, *sample.chosen) if message.role in ("assistant", "document")]
    if not any(part.part != "text" or part.text.strip() for message in learnt for part in message.parts):
        yield "nothing to learn: no document, and no answer with content"


def _place_problems(at: Any, item: Media) -> Iterator[str]:
    if isinstance(at, Span):
        if item.kind != "video" or not 0 <= at.start_s <= at.end_s <= item.duration_s:
            yield f"the time {at.start_s} to {at.end_s} s in a {item.kind} of {item.duration_s:.3f} s"
        return
    x0, y0, x1, y1 = (*at.xy, *at.xy) if at.shape == "point" else at.xyxy
    if not (0 <= x0 <= x1 <= item.width and 0 <= y0 <= y1 <= item.height):
        yield f"{at.shape} {[x0, y0, x1, y1]} outside {item.width}x{item.height}"
    if at.shape == "mask":
        if at.rle is not None and sum(at.rle) != item.width * item.height:
            yield f"run lengths of {sum(at.rle)} pixels in {item.width}x{item.height}"
        if at.rle is None and at.polygons is None:
            yield "a mask without run lengths and without polygons"


def _column_problems(uri: str, shard: int, num_rows: int) -> Iterator[str]:
    """Columns computed later: readable, checksums of their pages right, aligned with the shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipelines.prepare.embedded import open_file

    start, end = f"{shard_name(shard)}.", ".parquet"
    for name in storage.list_dir(uri):
        if not (name.startswith(start) and name.endswith(end)) or name == f"{start}index{end}":
            continue
        where = storage.join(uri, name)
        with open_file(where) as file:
            try:
                found = pq.read_table(
                    file, page_checksum_verification=True, use_threads=False, pre_buffer=False
                ).num_rows
            except (pa.ArrowException, OSError) as error:
                yield f"{where}: a column that cannot be read: {error}; remove it, it is computed again"
                continue
        if found != num_rows:
            yield f"{where}: expected {num_rows} rows, as the shard has, got {found}"


def as_problem(error: DataError, *, place: bool = True) -> str:
    """An error as one problem of a list."""
    parts = (error.where if place else None, error.what, error.got)
    return ": ".join(str(part) for part in parts if part is not None)


# ---------------------------------------------------------------- statistics


def statistics(source: Source) -> dict[str, Any]:
    """Counts of one source. Lengths are characters of text, sizes pixels, times seconds; percentiles are of samples
    or of media as they are used (a picture of two samples counts twice)."""
    counted = {name: Counter[str]() for name in ("kinds", "splits", "roles", "parts", "shapes", "labels", "suffixes")}
    gathered: dict[str, list[float]] = {name: [] for name in ("width", "height", "duration_s", "characters", "turns")}
    digests: set[str] = set()
    media_bytes = 0
    for sample in _samples(source):
        counted["kinds"][sample.kind] += 1
        counted["splits"][sample.split] += 1
        gathered["turns"].append(len(sample.messages) + len(sample.chosen[:1]))
        gathered["characters"].append(sum(len(p.text) for p in parts_of(sample) if isinstance(p, Text)))
        for message in (*sample.messages, *sample.chosen, *sample.rejected):
            counted["roles"][message.role] += 1
        for part in parts_of(sample):
            counted["parts"][part.part] += 1
            for thing in part.objects if isinstance(part, Objects) else ():
                counted["shapes"][thing.at.shape] += 1
                counted["labels"][thing.label] += 1
        for item in sample.media:
            digests.add(item.digest)
            media_bytes += item.size_bytes
            counted["suffixes"][item.suffix] += 1
            gathered["width"].append(item.width)
            gathered["height"].append(item.height)
            if item.kind == "video":
                gathered["duration_s"].append(item.duration_s)
    labels = counted.pop("labels")
    return {
        "uri": source.uri,
        "digest": source.digest,
        "samples": source.num_samples,
        "shards": source.num_shards,
        "bytes": sum(facts["size_bytes"] for facts in source.manifest["shards"]),
        **{name: dict(sorted(counts.items())) for name, counts in counted.items()},
        "media": {"used": sum(counted["suffixes"].values()), "distinct": len(digests), "bytes": media_bytes},
        "labels": {"distinct": len(labels), "most": dict(labels.most_common(10))},
        "percentiles": {name: _percentiles(values) for name, values in gathered.items() if values},
        **({"curated": decided["funnel"]} if (decided := kept.facts(source.uri)) else {}),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {str(p): round(float(v), 3) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}


def _samples(source: Source) -> Iterator[Sample]:
    for shard in range(source.num_shards):
        for row in range(source.index(shard).num_rows):
            yield source.sample(shard, row)


def statistics_text(found: dict[str, Any]) -> str:
    """For a person: one block a source."""
    lines = [f"{found['uri']}  {found['samples']:,} samples, {found['shards']} shards, {found['bytes'] / 1e6:,.1f} MB"]
    for name in ("kinds", "splits", "roles", "parts", "shapes", "suffixes"):
        if found[name]:
            lines.append(f"  {name:<12}" + ", ".join(f"{key} {count:,}" for key, count in found[name].items()))
    media_ = found["media"]
    lines.append(
        f"  {'media':<12}{media_['used']:,} used, {media_['distinct']:,} distinct, {media_['bytes'] / 1e6:,.1f} MB"
    )
    if found["labels"]["distinct"]:
        most = ", ".join(f"{json.dumps(k, ensure_ascii=False)} {n:,}" for k, n in found["labels"]["most"].items())
        lines.append(f"  {'labels':<12}{found['labels']['distinct']:,} distinct; {most}")
    for name, values in found["percentiles"].items():
        least, half, most, all_ = (f"{values[str(p)]:g}" for p in PERCENTILES)
        lines.append(f"  {name:<12}least {least}, median {half}, 95 % {most}, most {all_}")
    return "\n".join(lines + _curated_lines(found.get("curated")))


def _curated_lines(funnel: dict[str, Any] | None) -> list[str]:
    """What curation left of the source, and of each domain."""
    if funnel is None:
        return []
    dropped = ", ".join(f"{count:,} {name}" for name, count in funnel["dropped"].items() if count) or "none"
    lines = [f"  {'curated':<12}{funnel['kept']:,} of {funnel['read']:,} kept; dropped: {dropped}"]
    for domain, counts in funnel.get("domains", {}).items():
        told = ", ".join(f"{domain}/{name} {one['kept']:,} of {one['read']:,}" for name, one in counts.items())
        lines.append(f"  {'domain':<12}{told}")
    return lines
