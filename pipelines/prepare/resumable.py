"""Shards made from items one after the other, which a process that was killed goes on with: of the shards that are
whole only the rest is made, to the same bytes.

    stored(target, key)                    the funnel of finished shards, made from what `key` stands for; else None
    made = ResumableShards(target, key=key, shard_bytes=...)
    for item in islice(items, made.num_items, None):
        made.add(samples and files of the item, counts=what was counted before it)
    made.finish(funnel, source=..., split=...)
    with made: ...                         around all of it: what stays when something fails

What bad data ended leaves nothing, since the same call would end there again. What an endpoint ended (Unfinished), a
full disk or a kill leaves every whole shard.

They are written beside what is there (swap.py). Beside every whole shard lies which items are in it and what was
counted until then, written after the shard: one without such a note is written again. Items have to come in the same
order; `key` stands for all that they depend on, and with another key everything begins anew.

    FOLDER/.tmp-new/.tmp-progress/NNNNN.json    {key, shard, num_items, num_samples, counts}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pipelines.prepare import swap
from trainer import storage
from trainer.data.sample import Sample
from trainer.data.shards import MANIFEST, ShardWriter, shard_name
from trainer.errors import DataError

INPUT = "input.json"
LAST = (INPUT, MANIFEST)
PROGRESS = f"{storage.TEMPORARY}progress"
Json = dict[str, Any]


def stored(target: str, key: str) -> Json | None:
    """The stored funnel when the shards are finished and made from the same input; a damaged note of that is none."""
    swap.settle(target, last=LAST)
    marker = storage.join(target, INPUT)
    if not (storage.exists(marker) and storage.exists(storage.join(target, MANIFEST))):
        return None
    content = _json(marker)
    if content is None or "funnel" not in content:
        told = "is damaged, nobody knows what the shards were made from: they count as of another input"
        print(f"{marker} {told}", flush=True)
        return None
    if content.get("key") != key:
        return None
    storage.remove_tree(swap.beside(target))  # what a process that was killed had not yet tidied up
    return content["funnel"]


class Unfinished(DataError):
    """An endpoint did not answer, or not in the form that was asked for: the same call may go on later."""


class ResumableShards:
    """`num_items`: items that need not be made again; `counts`: what was counted up to there, None at the beginning."""

    def __init__(self, target: str, *, key: str, shard_bytes: int):
        self.target, self.key = target, key
        self._new = swap.beside(target)
        notes = _notes(self._new, key)
        if not notes:
            swap.discard(target)
        self.num_items: int = notes[-1]["num_items"] if notes else 0
        self.counts: Json | None = notes[-1]["counts"] if notes else None
        self._first = self.num_items
        self._in_shards: int = notes[-1]["num_samples"] if notes else 0
        self.writer = ShardWriter(self._new, shard_bytes=shard_bytes, shards=[note["shard"] for note in notes])

    def add(self, samples: Sequence[tuple[Sample, Sequence[bytes]]], *, counts: Callable[[], Json]) -> None:
        """The samples of the next item, with their files. `counts` gives what was counted before this item, as JSON;
        it is asked when a shard became whole."""
        there = self._in_shards if self.num_items == self._first else 0
        for number, (sample, files) in enumerate(samples):
            if number < there:
                continue
            before = len(self.writer.shards)
            self.writer.add(sample, files)
            if len(self.writer.shards) > before:
                self._note(number, counts())
        self.num_items += 1

    def _note(self, num_samples: int, counts: Json) -> None:
        """The last shard holds all samples of the items before this one, and `num_samples` of its own."""
        shard = self.writer.shards[-1]
        content = {"key": self.key, "shard": shard, "num_items": self.num_items, "num_samples": num_samples}
        storage.write_json(storage.join(self._new, PROGRESS, f"{shard['name']}.json"), {**content, "counts": counts})

    def finish(self, funnel: Json, **facts: Any) -> Json:
        """The shards take the place of those that are there; returns their manifest."""
        storage.write_json(storage.join(self._new, INPUT), {"key": self.key, "funnel": funnel})
        manifest = self.writer.close(**facts)
        swap.take(self.target, last=LAST)
        return manifest

    def __enter__(self) -> ResumableShards:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A DataError leaves nothing of the new shards; Unfinished, and what is no DataError, leaves the whole ones."""
        if kind is None:
            return
        unfinished = issubclass(kind, Unfinished) and bool(self.writer.shards)
        if issubclass(kind, DataError) and not unfinished:
            self.discard()
            return
        self.stop()
        if unfinished:
            count = sum(shard["num_samples"] for shard in self.writer.shards)
            told = f"{len(self.writer.shards)} whole shards with {count} samples stay"
            print(f"{self.target}: {told}; the same command goes on after them", flush=True)

    def stop(self) -> None:
        """Leaves the whole shards to the next one that is made with the same key."""
        self.writer.abort()

    def discard(self) -> None:
        """Nothing of the new shards stays."""
        self.writer.abort()
        swap.discard(self.target)


def _notes(folder: str, key: str) -> list[Json]:
    """Notes of the shards that are whole and made with this key, from the first on without a gap."""
    found: list[Json] = []
    names = set(storage.list_dir(storage.join(folder, PROGRESS)))
    while (name := f"{shard_name(len(found))}.json") in names:
        note = _json(storage.join(folder, PROGRESS, name))
        if note is None or note.get("key") != key or not _is_whole(folder, note["shard"]):
            break
        found.append(note)
    return found


def _json(uri: str) -> Json | None:
    """None for what is not a JSON object."""
    try:
        content = storage.read_json(uri)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _is_whole(folder: str, shard: Json) -> bool:
    tar, index = (storage.join(folder, f"{shard['name']}.{suffix}") for suffix in ("tar", "index.parquet"))
    try:
        return storage.size(tar) == shard["size_bytes"] and storage.sha256_of(index) == shard["index_sha256"]
    except FileNotFoundError:
        return False
