"""What every reader gives: rows in order, each a draft of a Sample or the reason why there is none.

A draft is a Sample whose media are only named (MediaRef): ingest.py reads the files, checks them and fills in digests
and sizes. Geometry is in pixels of the original file, or in shares of its sides when the source says so (`units`).
A row that cannot be used is a Bad: counted, shown with file and line, and an error above prepare.max_bad_fraction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer import storage
from trainer.data.sample import Key
from trainer.errors import DataError
from trainer.recipe import Source

Units = Literal["pixels", "thousand", "unit"]
MediaKind = Literal["image", "video"]


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    where: str
    """File and line (or index of the entry)."""
    expected: str
    got: str
    reason: str
    """A short name: what funnel.json counts by."""


class BadRow(ValueError):
    """Raised inside a reader for the row at hand; the reader's loop turns it into a Bad."""

    def __init__(self, reason: str, expected: str, got: object):
        super().__init__(f"{reason}: expected {expected}, got {got}")
        self.reason, self.expected, self.got = reason, expected, str(got)[:200]


@dataclass(frozen=True)
class MediaRef:
    """A file that a row names: path or URI, or a data: URI."""

    uri: str
    kind: MediaKind


@dataclass(frozen=True)
class Draft:
    """A Sample still without media facts: `messages`, `chosen` and `rejected` are the Sample's JSON."""

    where: str
    id: str
    messages: list[dict]
    media: list[MediaRef] = field(default_factory=list)
    chosen: list[dict] = field(default_factory=list)
    rejected: list[dict] = field(default_factory=list)
    key: dict | None = None
    units: Units = "pixels"
    """Of the geometry in the messages and the key."""
    meta: dict = field(default_factory=dict)


Row = Draft | Bad
Reader = Callable[[str, str, Source], Iterator[Row]]
"""read(path, media_root, source): one annotation file; relative media paths start from media_root."""


# ---------------------------------------------------------------- files


def json_entries(path: str) -> Iterator[tuple[str, Any]]:
    """(where, value or Bad) of every entry of a JSON list or of a JSONL file, whatever the file is called."""
    text = _text(path)
    if text.lstrip()[:1] == "[":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                "the annotation file is not JSON",
                where=f"{path}, line {error.lineno}",
                expected="a JSON list",
                got=error.msg,
            ) from None
        yield from ((f"{path}, entry {number}", entry) for number, entry in enumerate(entries))
        return
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # splitlines() also cuts at characters that JSON strings may hold
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            yield (
                where,
                Bad(where, "one JSON object", f"{error.msg} at column {error.colno}: {line[:60]!r}", "bad-json"),
            )


def identity_of(entry: dict, where: str) -> str:
    """The entry's own id, else its file's name and its number there, which no other file of the source has."""
    if entry.get("id") is not None:
        return str(entry["id"])
    file, _, place = where.rpartition("/")[2].rpartition(", ")
    return f"{file}#{place.rpartition(' ')[2]}"


def json_document(path: str) -> dict:
    """A file that holds one JSON object."""
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            "the annotation file is not JSON", where=f"{path}, line {error.lineno}", got=error.msg
        ) from None
    if not isinstance(value, dict):
        raise DataError(
            "the annotation file has another form", where=path, expected="a JSON object", got=type(value).__name__
        )
    return value


def _text(path: str) -> str:
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such annotation file", where=path, do="check prepare.sources.NAME.path") from None
    except UnicodeDecodeError as error:
        raise DataError("the annotation file is not UTF-8", where=path, got=f"byte {error.start}") from None


def each(path: str, read_one: Callable[[dict, str], Draft]) -> Iterator[Row]:
    """Rows of a JSON or JSONL file whose entries are objects."""
    for where, entry in json_entries(path):
        if isinstance(entry, Bad):
            yield entry
        elif not isinstance(entry, dict):
            yield Bad(where, "an object", type(entry).__name__, "wrong-form")
        else:
            yield guarded(where, read_one, entry)


def guarded(where: str, read_one: Callable[[dict, str], Draft], entry: dict) -> Row:
    """One entry as a Draft, or as the Bad that says why not."""
    try:
        return read_one(entry, where)
    except BadRow as error:
        return Bad(where, error.expected, error.got, error.reason)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return Bad(where, "the fields of the format", f"{type(error).__name__}: {error}", "wrong-form")


def resolve(root: str, path: str) -> str:
    """A medium's path as it can be opened: URIs and absolute paths as they are, others below root."""
    if not isinstance(path, str) or not path:
        raise BadRow("wrong-form", "the path of a file", repr(path))
    if path.startswith(("/", "data:")) or "://" in path:
        return path
    return f"{root.rstrip('/')}/{path.removeprefix('./')}"


def field_of(entry: dict, *names: str) -> Any:
    """The first of the fields that the entry has."""
    for name in names:
        if entry.get(name) is not None:
            return entry[name]
    raise BadRow("wrong-form", f"a field {' or '.join(names)}", f"fields {sorted(entry)}")


# ---------------------------------------------------------------- parts


def text(value: str) -> dict:
    return {"part": "text", "text": value}


def message(role: str, *parts: dict) -> dict:
    return {"role": role, "parts": list(parts)}


PLACEHOLDER = re.compile(r"(<image>|<video>)")


class Places:
    """Hands out media to placeholders in order, and notices when the numbers differ."""

    def __init__(self, media: Sequence[MediaRef]):
        self.media, self.next = list(media), {"image": 0, "video": 0}
        self.of_kind = {
            kind: [number for number, item in enumerate(media) if item.kind == kind] for kind in ("image", "video")
        }

    def take(self, kind: Literal["image", "video"]) -> dict:
        number = self.next[kind]
        self.next[kind] += 1
        if number >= len(self.of_kind[kind]):
            raise BadRow(
                "placeholder-without-media", f"{self.next[kind]} {kind} files", f"{len(self.of_kind[kind])} of them"
            )
        return {"part": kind, "media": self.of_kind[kind][number]}

    def split(self, value: str) -> list[dict]:
        """Text with <image> and <video> as parts; a line break that only sets the placeholder apart goes."""
        parts: list[dict] = []
        pieces = PLACEHOLDER.split(value)
        for place, piece in enumerate(pieces):
            if place % 2:
                parts.append(self.take("image" if piece == "<image>" else "video"))
                continue
            if place:
                piece = piece.removeprefix("\n")
            if place + 1 < len(pieces):
                piece = piece.removesuffix("\n")
            if piece:
                parts.append(text(piece))
        return parts

    def finish(self) -> None:
        for kind, numbers in self.of_kind.items():
            if self.next[kind] != len(numbers):
                raise BadRow(
                    "media-without-placeholder", f"{len(numbers)} placeholders <{kind}>", f"{self.next[kind]} of them"
                )


def answer_parts(value: str, num_media: int, *, media: int = 0) -> list[dict]:
    """An assistant's text; a JSON list of boxes or points (Qwen's form) becomes Objects, so that each family writes its
    own coordinates."""
    found = _objects(value) if num_media == 1 else None
    return [{"part": "objects", "media": media, "objects": found, "form": "json"}] if found else [text(value)]


def _objects(value: str) -> list[dict] | None:
    stripped = value.strip()
    if not (stripped.startswith("[{") and ("bbox_2d" in stripped or "point_2d" in stripped)):
        return None
    try:
        entries = json.loads(stripped)
        return [_object(entry) for entry in entries]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def _object(entry: dict) -> dict:
    if "bbox_2d" in entry:
        left, top, right, bottom = map(float, entry["bbox_2d"])
        at: dict = {"shape": "box", "xyxy": [left, top, right, bottom]}
    else:
        x, y = map(float, entry["point_2d"])
        at = {"shape": "point", "xy": [x, y]}
    found = {"label": str(entry.get("label", "")), "at": at}
    if entry.get("text_content"):
        found["content"] = str(entry["text_content"])
    return found


def units_of(entry: dict) -> Units:
    """In what the row's coordinates are written: pixels of the original file unless `coordinates` says otherwise."""
    units = entry.get("coordinates", "pixels")
    if units not in ("pixels", "thousand", "unit"):
        raise BadRow("wrong-form", "coordinates pixels, thousand or unit", units)
    return units


def key_of(entry: dict) -> dict | None:
    """The answer key of a task: {"task": ..., "value": ...}."""
    if entry.get("key") is None:
        return None
    try:
        return Key.model_validate(entry["key"]).model_dump()
    except ValueError as error:
        raise BadRow("wrong-form", "key: {task, value}", error) from None
