"""Sources to shards: read rows in a public format, check and measure their media, write Samples and media as shards.

    prepare_data(recipe, out)     the built-in corpus where the recipe names it, every source, the tokenizer
    python -m pipelines.prepare prepare-data --recipe tiny --out DIR

What was read, kept and refused, and why, is counted in OUT/data/funnel.json. A source that is already there is
recognised by the digest of what it was made from (annotation files, rows, sizes and times of local media, reader
version), wherever that lies. Shards are written beside those that are there, which stay until the new ones are whole;
a run that was killed goes on after the last whole shard (resumable.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice, takewhile
from typing import Any, Literal

from pipelines.prepare import resumable
from pipelines.prepare.annotations import annotation_files
from pipelines.prepare.confined import confined
from pipelines.prepare.corpus.names import SCHEME, SMALL, SMALL_SCALE, SYNTHETIC, is_there
from pipelines.prepare.describe import draft_to_json, inspect, inspect_groups, is_far
from pipelines.prepare.embedded import is_embedded, member_bytes
from pipelines.prepare.engine import Engine
from pipelines.prepare.formats import format_of, reader
from pipelines.prepare.formats.answers import places_as_text
from pipelines.prepare.formats.auto import AUTO
from pipelines.prepare.formats.rows import Bad, Draft, MediaRef, Row, wrong_kind
from pipelines.prepare.ids import Ids
from pipelines.prepare.resumable import ResumableShards
from trainer import storage
from trainer.data.sample import from_json
from trainer.data.shards import MANIFEST
from trainer.errors import DataError, UsageError
from trainer.grounding import is_made, made_in_order
from trainer.recipe import Prepare, Recipe, Source
from trainer.resolve import digest

VERSION = 5
"""Raised when the same rows give other samples than before: sources are made again."""
BLOCK_ROWS = 256
NOT_OF_ROWS = {"licence", "path", "held_out", "media", "rendering", "curate", "grounding", "reasoning", "captioning"}
"""Fields of a source that shards do not depend on (the files behind path and media count by what they hold)."""
BLOCK_BYTES = 256 * 2**20
"""Of media in one block of rows, above one row."""
UNKNOWN_BYTES: dict[str, int] = {"image": 4 * 2**20, "video": 64 * 2**20}
"""Assumed of a medium whose size would have to be asked for: behind a URI, in a table, a PDF page."""
SHOWN = 5
Split = Literal["train", "held_out"]


@dataclass
class Funnel:
    """What happened to the rows of one source and split."""

    read: int = 0
    kept: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    faults: int = 0
    """Of `bad`, those that max_bad_fraction bounds."""
    noted: Counter[str] = field(default_factory=Counter)
    """What a person should know of rows that were kept."""

    def refuse(self, bad: Bad) -> None:
        self.bad[bad.reason] += 1
        self.faults += bad.fault
        if not bad.fault:
            return
        if len(self.examples) < SHOWN:
            self.examples.append(f"{bad.where}: {bad.reason}: expected {bad.expected}, got {bad.got}")

    def as_json(self) -> dict[str, Any]:
        noted = {"noted": dict(sorted(self.noted.items()))} if self.noted else {}
        bad = dict(sorted(self.bad.items()))
        return {"read": self.read, "kept": self.kept, "bad": bad, **noted, "examples": self.examples}

    def so_far(self) -> dict[str, Any]:
        """All of it: what a run that goes on begins with."""
        return {**self.as_json(), "faults": self.faults}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Funnel:
        return cls(**{**content, "bad": Counter(content["bad"]), "noted": Counter(content.get("noted", {}))})


def prepare_data(recipe: Recipe, out: str) -> None:
    """Corpus, sources, tokenizer; each part is skipped when it is there and made from the same input.

    Raises:
        DataError: a source with more unreadable rows than prepare.max_bad_fraction, or without any row.
    """
    from pipelines.prepare.curate.step import curate
    from pipelines.prepare.tokenizer import prepare_tokenizer

    prepare_corpus(recipe, out)
    funnel: dict[str, dict[str, Any]] = {}
    engine: list[Engine] = []
    for name, source in recipe.prepare.sources.items():
        funnel[name] = {}
        for split, path in splits_of(source) if not is_made(source) else ():
            funnel[name][split] = ingest(recipe, out, name, source, split, path, engine)
    for name, curated in curate(recipe, out).items():
        funnel[name]["train"] = {**funnel[name]["train"], "curated": curated}
    for name in made_in_order(recipe.prepare.sources):
        funnel[name] = _made(recipe, out, name, engine)
    storage.write_json(storage.join(out, "data", "funnel.json"), funnel)
    prepare_tokenizer(recipe, out)


def _made(recipe: Recipe, out: str, name: str, engine: list[Engine]) -> dict[str, dict[str, Any]]:
    """One source that is made from others."""
    from pipelines.prepare.captioning import made as captioned
    from pipelines.prepare.grounding import made as questions
    from pipelines.prepare.reasoning import made as reasoned

    source = recipe.prepare.sources[name]
    if source.reasoning is not None:
        return reasoned.make(recipe, out, name)
    if source.captioning is not None:
        return captioned.make(recipe, out, name)
    return questions.make(recipe, out, name, engine)


def prepare_corpus(recipe: Recipe, out: str) -> None:
    """Build what the recipe's corpus:// paths name: the whole corpus, the small one, synthetic pages, or none."""
    sources = recipe.prepare.sources.values()
    paths = [path for source in sources for path in (source.path, source.held_out, source.media) if path]
    asked = {path.removeprefix(SCHEME) for path in paths if path.startswith(SCHEME)}
    root = storage.join(out, "data", "corpus")
    # the whole one first: making it clears the folder that the others lie in
    for small, scale in (("", 1.0), (f"{SMALL}/", SMALL_SCALE)):
        named = [path for path in asked if path.startswith(f"{SMALL}/") == bool(small)]
        pages = [path for path in named if path.startswith(f"{small}{SYNTHETIC}/")]
        base = storage.join(root, small.rstrip("/")) if small else root
        if len(pages) < len(named):
            _corpus(base, recipe.seed, scale)
        if pages:
            _corpus(storage.join(base, SYNTHETIC), recipe.seed, scale, synthetic=True)


def _corpus(uri: str, seed: int, scale: float, *, synthetic: bool = False) -> None:
    """What builds the corpus imports much: only where it is not there yet."""
    if is_there(uri, seed=seed, scale=scale):
        print(f"corpus: {uri} is already there", flush=True)
        return
    from pipelines.prepare.corpus.build import build_corpus

    build_corpus(uri, seed=seed, scale=scale, synthetic=synthetic)


def splits_of(source: Source) -> list[tuple[Split, str]]:
    """(split, path) of a source: training, and what is held out where there is some."""
    found: list[tuple[Split, str]] = [("train", source.path)]
    return [*found, ("held_out", source.held_out)] if source.held_out else found


def source_uri(out: str, name: str, split: str) -> str:
    return storage.join(out, "data", "sources", name, split)


def located(out: str, path: str) -> str:
    """A source's path with corpus:// resolved."""
    return storage.join(out, "data", "corpus", path.removeprefix(SCHEME)) if path.startswith(SCHEME) else path


# ---------------------------------------------------------------- one source


def ingest(
    recipe: Recipe, out: str, name: str, source: Source, split: Split, path: str, engine: list[Engine]
) -> dict[str, Any]:
    """One split of a source to shards; returns its funnel. `engine` is made on first need (one item)."""
    media = located(out, source.media) if source.media else None
    place = Place(name, split, source_uri(out, name, split), f"prepare.sources.{name}", out)
    files = annotation_files(located(out, path), where=place.field)
    return write_source(recipe.prepare, source, place, files, media, engine)


@dataclass(frozen=True)
class Place:
    """Where a split of a source goes, and how it is called to a person."""

    name: str
    split: Split
    target: str
    field: str
    """What a person would change: a field of the recipe, an argument."""
    out: str
    """Folder that names count from, beside the media's."""
    limit: str = "prepare.max_bad_fraction"
    """What says how many rows may be refused, likewise."""
    replace: bool = True
    """Whether shards that were made from something else are replaced; if not, they are an error."""


def write_source(
    prepare: Prepare, source: Source, place: Place, files: list[str], media: str | None, engine: list[Engine]
) -> dict[str, Any]:
    """Annotation files to the shards of one place, unless they are there, made from the same input; returns the funnel.

    Raises:
        DataError: too many rows that cannot be used, or none at all; nothing half-written stays, and what was there
            before does. After any other error the same call goes on from the last whole shard.
        UsageError: shards of another input are there and not to be replaced.
    """
    started = time.monotonic()
    name, split, target = place.name, place.split, place.target
    root = media or common_folder(files)
    formats = [format_of(source.format, file) for file in files]
    rows = partial(_rows, source, name, list(zip(files, formats, strict=True)), media)  # read twice, never held
    key = input_key(source, prepare, files, rows(), below=(root, place.out))
    if (stored := resumable.stored(target, key)) is not None:
        print(f"ingest: {name}/{split} is already there ({stored['kept']} samples)", flush=True)
        return stored
    if not place.replace and storage.exists(storage.join(target, MANIFEST)):
        do = "choose another --out, or say --replace"
        raise UsageError("shards of another input are there", where=target, expected="none, or of this input", do=do)
    if source.format == AUTO:
        print(f"ingest: {name}/{split} is of the format {', '.join(sorted(set(formats)))}", flush=True)
    if not engine:
        engine.append(Engine(prepare.engine))
    made = ResumableShards(target, key=key, shard_bytes=prepare.shard_bytes)
    funnel = Funnel() if made.counts is None else Funnel.from_json(made.counts)
    if made.num_items:
        print(f"ingest: {name}/{split} goes on after {made.num_items} rows, in whole shards already", flush=True)
    with made:
        facts = {"source": name, "kind": source.kind, "split": split, "media_root": root}
        _write(rows(), {**facts, "verify": prepare.verify_media}, made, funnel, engine[0])
        where = f"{place.field} ({split}: {', '.join(files[:3])})"
        check(funnel, prepare.max_bad_fraction, where=where, limit=place.limit)
        made.finish(stored := funnel.as_json(), source=name, split=split)
    told = f", {sum(funnel.bad.values())} refused" if funnel.bad else ""
    told += "".join(f", {count} {what}" for what, count in sorted(funnel.noted.items()))
    print(f"ingest: {name}/{split} {funnel.kept} samples{told} ({time.monotonic() - started:.1f} s)", flush=True)
    return stored


def folder_of(file: str) -> str:
    """Where relative media paths start from when nothing else is said: beside the annotation file."""
    return file.rpartition("/")[0] or "."


def common_folder(files: list[str]) -> str:
    """The deepest folder that all files lie in."""
    parts = [file.split("/")[:-1] for file in files]
    same = takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return "/".join(level[0] for level in same) or ("/" if files[0].startswith("/") else ".")


def _rows(source: Source, name: str, files: list[tuple[str, str]], media: str | None) -> Iterator[Row]:
    """Rows of all files, given with their formats, in order. A row that was there before is bad; another of the same id
    (LLaVA's files call a conversation after its picture, which has several) gets an id made from what it says."""
    common = common_folder([file for file, _ in files])
    with Ids() as ids:
        for file, format in files:
            for row in reader(format, name)(file, media or folder_of(file), source):
                row = confined(row, media or folder_of(file), file) if source.confined else row
                if isinstance(row, Draft):
                    row = replace(row, id=_own_id(row, file, common)) if len(files) > 1 else row
                    row = wrong_kind(row, source.kind) or _told_apart(row, ids, media or common)
                if isinstance(row, Draft) and places_as_text([*row.messages, *row.chosen, *row.rejected]):
                    row = replace(row, noted=(*row.noted, "places-as-text"))
                yield row


def _told_apart(row: Draft, ids: Ids, root: str) -> Draft | Bad:
    """The row with an id that no other has, or the Bad of one that says what a row before it said."""
    content = _content(row, root)
    was = ids.add(row.id, content)
    if was == "other":
        row = replace(row, id=f"{row.id}#{content.hex()}", noted=(*row.noted, "renamed-id"))
        was = ids.add(row.id, content)
    if was == "new":
        return row
    return Bad(row.where, "a row of its own", f"{row.id!r} for the second time", "duplicate-id")


def _content(row: Draft, root: str) -> bytes:
    """Digest of what a row says and shows, wherever its folder lies. A picture in a tar counts by its size, one in a
    table not at all: a copy of the row lies elsewhere."""
    uris = [ref.uri for ref in row.media]
    shown = [member_bytes(uri) if is_embedded(uri) else inside(uri, (root,)) for uri in uris]
    said = [row.messages, row.chosen, row.rejected, row.key, row.units]
    written = json.dumps([said, shown], sort_keys=True).encode()
    return hashlib.blake2b(written, digest_size=8).digest()


def _own_id(row: Draft, file: str, common: str) -> str:
    """An id that a reader made of a place in the file (its name and a number, a tar's key) with the file's path below
    the folder of all of them: another folder or tar has the same places. An id that the row brought stays."""
    name = inside(file, (common,))
    base = name.rpartition("/")[2]
    if row.id == base or row.id.startswith(f"{base}#"):
        return f"{name}{row.id.removeprefix(base)}"
    return f"{name}/{row.id}" if row.where == f"{file}, {row.id}" else row.id


def input_key(
    source: Source, prepare: Prepare, files: list[str], rows: Iterable[Row], *, below: tuple[str, ...] = ()
) -> str:
    """Digest of what the shards are made from. Rows count as their reader gives them, with all that it read beside the
    annotation file (instances.json, dataset_info.json, a page's cells). Local media count by size and time of change
    (their bytes are read when the source is made); media elsewhere count by name: replace a file there under a new
    name. Names count from the folders in `below`, so an output or a data folder that was moved or renamed is
    recognised."""
    content = hashlib.sha256()
    for row in rows:
        content.update(f"{_row_json(row, below)}\n".encode(errors="surrogatepass"))
    names = [inside(file, (*below, common_folder(files))) for file in files]
    digests = [storage.sha256_of(file) for file in files]
    return digest(
        {
            "version": VERSION,
            "source": source.model_dump(mode="json", exclude=NOT_OF_ROWS),
            "document": source.rendering == "document",
            "shard_bytes": prepare.shard_bytes,
            "max_bad_fraction": prepare.max_bad_fraction,
            **({} if prepare.verify_media == "decode" else {"verify_media": prepare.verify_media}),
            "files": [list(pair) for pair in zip(names, digests, strict=True)],
            "rows": content.hexdigest(),
        }
    )


def _row_json(row: Row, below: tuple[str, ...]) -> str:
    """What a row adds to the key: all but where it stands, its media with sizes and times."""
    if isinstance(row, Bad):
        return json.dumps(["bad", row.reason])
    media = [[ref.kind, *_media_facts(ref.uri, below)] for ref in row.media]
    others = {item.name: getattr(row, item.name) for item in fields(row) if item.name not in ("where", "media")}
    return json.dumps([others, media], ensure_ascii=False)


def _media_facts(uri: str, below: tuple[str, ...]) -> list[str | int]:
    if uri.startswith("data:"):
        return [uri]
    local = storage.local_path(uri)
    try:
        status = os.stat(local) if local is not None else None
    except (OSError, ValueError):  # not there, or a name that no file has
        status = None
    return [inside(uri, below), *((status.st_size, status.st_mtime_ns) if status else ())]


def inside(uri: str, folders: Iterable[str]) -> str:
    """The part of an address below the first of the folders that it lies in; else the address."""
    for folder in folders:
        if folder and uri.startswith(f"{folder.rstrip('/')}/"):
            return uri[len(folder.rstrip("/")) + 1 :]
    return uri


def _write(rows: Iterable[Row], facts: dict[str, str], made: ResumableShards, funnel: Funnel, engine: Engine) -> None:
    told = time.monotonic()
    for block in _blocks(islice(rows, made.num_items, None)):
        drafts = [row for row in block if isinstance(row, Draft)]
        texts = [draft_to_json(draft, **facts) for draft in drafts]
        far = any(map(is_far, drafts))
        answers = iter(inspect_groups(texts, engine) if far else engine.map(inspect, texts) if drafts else [])
        for row in block:
            text, files = next(answers) if isinstance(row, Draft) else ("", [])
            found: dict[str, Any] = json.loads(text) if text else {"bad": asdict(row)}
            samples = [] if "bad" in found else [(from_json(found["sample"]), files)]
            made.add(samples, counts=funnel.so_far)
            funnel.read += 1
            funnel.kept += len(samples)
            if "bad" in found:
                funnel.refuse(Bad(**found["bad"]))
            elif isinstance(row, Draft):
                funnel.noted.update(row.noted)
        if time.monotonic() - told > 5:
            told = time.monotonic()
            print(f"ingest: {facts['source']}/{facts['split']} {funnel.read} rows", flush=True)


def _blocks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows that are described together, their media in memory: BLOCK_ROWS of them, fewer where media are large."""
    block: list[Row] = []
    held = 0
    for row in rows:
        size = sum(map(_media_bytes, row.media)) if isinstance(row, Draft) else 0
        if block and (len(block) == BLOCK_ROWS or held + size > BLOCK_BYTES):
            yield block
            block, held = [], 0
        block.append(row)
        held += size
    if block:
        yield block


def _media_bytes(ref: MediaRef) -> int:
    if ref.uri.startswith("data:"):
        return len(ref.uri)
    if (size := member_bytes(ref.uri)) is not None:
        return size
    local = storage.local_path(ref.uri)
    try:
        return os.stat(local).st_size if local is not None else UNKNOWN_BYTES[ref.kind]
    except (OSError, ValueError):
        return UNKNOWN_BYTES[ref.kind]


def check(funnel: Funnel, max_bad_fraction: float, *, where: str, limit: str) -> None:
    """Raises DataError when too many rows were refused, or none was kept."""
    refused = sum(funnel.bad.values())
    if funnel.read and funnel.faults <= max_bad_fraction * funnel.read and funnel.kept:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(funnel.bad.items()))
    shown = "\n    ".join(funnel.examples)
    raise DataError(
        "rows that cannot be used" if refused else "a source without rows",
        where=where,
        expected=f"at most {max_bad_fraction:.2%} of the rows refused, and at least one kept",
        got=f"{funnel.faults} of {funnel.read} ({reasons})\n    {shown}" if refused else "no rows",
        do=f"repair the rows, or raise {limit} to leave them out (what is left out is counted)",
    )
