"""What every reader gives: rows in order, each a draft of a Sample or the reason why there is none.

A draft is a Sample whose media are only named (MediaRef): ingest.py reads the files, checks them and fills in digests
and sizes. Geometry is in pixels of the original file, or in shares of its sides when the source says so (`units`).
A row that cannot be used is a Bad: counted, shown with file and line, and an error above prepare.max_bad_fraction.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from pydantic import ValidationError

from pipelines.prepare.embedded import is_embedded, open_file
from pipelines.prepare.formats.streams import JsonStream, TooMuch, not_utf8
from trainer import storage
from trainer.data.sample import Key
from trainer.errors import DataError, QwenVLError, StorageError, UsageError
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
    fault: bool = True
    """False: nothing is wrong with it, there is just nothing to learn. Counted, but prepare.max_bad_fraction is not for
    it."""


class BadRow(ValueError):
    """Raised inside a reader for the row at hand; the reader's loop turns it into a Bad."""

    def __init__(self, reason: str, expected: str, got: object, *, fault: bool = True):
        super().__init__(f"{reason}: expected {expected}, got {got}")
        self.fault = fault
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
    """What the reader knows of the media: stated_size."""
    scores: dict[str, float] = field(default_factory=dict)
    """With `notes`: what a Sample that is read again carried (its `scores` and `meta`)."""
    notes: dict = field(default_factory=dict)
    noted: tuple[str, ...] = ()
    """What a person should know of the row though it is kept: short names, which funnel.json counts."""


Row = Draft | Bad
Reader = Callable[[str, str, Source], Iterator[Row]]
"""read(path, media_root, source): one annotation file; relative media paths start from media_root."""


MAX_DEPTH = 64
"""Levels of lists and objects in one row; conversations have five."""
_SURROGATE = re.compile("[\ud800-\udfff]")

# ---------------------------------------------------------------- files


def json_entries(path: str) -> Iterator[tuple[str, Any]]:
    """(where, value or Bad) of every entry of a JSON list or of a JSONL file, whatever the file is called. One entry
    is in memory at a time.

    Raises:
        DataError: no such file, not UTF-8, a list that is not JSON, or objects that are spread over several lines.
    """
    with opened(path) as stream:
        first = stream.peek()
        if first == "[":
            yield from _listed(stream, path)
            return
        if first == "{":
            _refuse_pretty_printed(stream)
    for number, line in enumerate(text_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(line, where)


@contextlib.contextmanager
def opened(path: str) -> Iterator[JsonStream]:
    """A JSON file to be read as a stream. Raises DataError: no such file."""
    try:
        file = open_file(path)
    except DataError:
        raise DataError("no such annotation file", where=path, do="check the path of the source") from None
    with file:
        yield JsonStream(file, path)


def text_lines(path: str) -> Iterator[str]:
    """Lines of a text file, read one by one; only a line feed ends one, as JSON strings may hold the others.

    Raises:
        DataError: no such file, or one that is not UTF-8. StorageError
    """
    before = 0
    try:
        opened = open_file(path)
    except DataError:
        raise DataError("no such annotation file", where=path, do="check the path of the source") from None
    with opened as file:
        while data := file.readline():
            try:
                yield data.decode("utf-8" if before else "utf-8-sig").removesuffix("\n")
            except UnicodeDecodeError as error:
                raise not_utf8(path, before + error.start) from None
            before += len(data)


def _parsed(line: str, where: str) -> Any:
    """The value of one line, or the Bad that says why there is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return Bad(where, "one JSON object", f"{error.msg} at column {error.colno}: {line[:60]!r}", "bad-json")
    except RecursionError:
        return Bad(where, f"at most {MAX_DEPTH} levels of JSON", "more than the parser reads", "too-deep")
    except ValueError as error:  # a number with more digits than Python converts
        return Bad(where, "one JSON object", str(error), "bad-json")


def _listed(stream: JsonStream, path: str) -> Iterator[tuple[str, Any]]:
    for number, entry in enumerate(stream.entries()):
        if isinstance(entry, TooMuch):  # only that one is lost
            where = f"{path}, line {entry.line}, entry {number}"
            yield where, _parsed(entry.text, where)
        else:
            yield f"{path}, entry {number}", entry
    stream.end()


def _refuse_pretty_printed(stream: JsonStream) -> None:
    """One error for a file whose JSON values go over several lines, where each line would be a bad row."""
    begins = stream.line
    try:
        value = stream.beginning(1)
    except (DataError, TooMuch):
        return  # a broken line, not an object over several of them: its row is bad
    lines = stream.line - begins + 1
    if lines == 1:
        return
    inside = [name for name, entry in value.items() if isinstance(entry, list)]
    more = bool(stream.peek())
    raise DataError(
        "the annotation file is neither JSON Lines nor a JSON list",
        where=stream.path,
        expected="one JSON object a line, or a list of objects",
        got=f"an object over {lines} lines with the fields {sorted(value)[:8]}; "
        f"{'more follow' if more else 'nothing follows'}",
        do=f"write the list under {inside[0]!r} to a file of its own: jq .{inside[0]} FILE"
        if len(inside) == 1 and not more
        else "write each object on one line: jq -c . FILE",
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
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(
            "the annotation file is not JSON",
            where=f"{path}, line {error.lineno}, column {error.colno}",
            got=f"{error.msg}, in {error.doc[max(0, error.pos - 40) : error.pos + 40]!r}",
            do="mend the file there, or write it again: it may be cut",
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError("the annotation file is not JSON that can be read", where=path, got=error) from None
    if not isinstance(value, dict):
        raise DataError(
            "the annotation file has another form", where=path, expected="a JSON object", got=type(value).__name__
        )
    return value


def read_text(path: str) -> str:
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError("no such annotation file", where=path, do="check the path of the source") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, error.start) from None


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
        check_sound(entry)
        return read_one(entry, where)
    except BadRow as error:
        return Bad(where, error.expected, error.got, error.reason, error.fault)
    except DataError as error:  # of a file that belongs to this row alone
        return Bad(where, str(error.expected or "a file that can be read"), told(error), "wrong-form")
    except (StorageError, UsageError) as error:
        return Bad(where, "files that can be reached", told(error), "unreachable-media")
    except WRONG as error:
        return Bad(where, "the fields of the format", told(error), "wrong-form")


WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError)
"""What Python raises for a row whose fields hold something else than their format says."""


def told(error: Exception) -> str:
    """An error in a line of a report; numbers in it may have any length."""
    if isinstance(error, QwenVLError):
        return ": ".join(str(part)[:200] for part in (error.what, error.where, error.got) if part is not None)
    return f"{type(error).__name__}: {error}"[:200]


def check_sound(entry: dict) -> None:
    """JSON allows what no later step can hold: text that has no UTF-8 form, and any depth of nesting.

    Raises:
        BadRow
    """
    open_values: list[tuple[Any, int]] = [(entry, 1)]
    while open_values:
        value, depth = open_values.pop()
        if depth > MAX_DEPTH:
            raise BadRow("too-deep", f"at most {MAX_DEPTH} levels of JSON", "more")
        for item in (*value, *value.values()) if isinstance(value, dict) else value:
            if isinstance(item, str):
                if (lone := _SURROGATE.search(item)) is not None:
                    near = ascii(item[max(0, lone.start() - 20) : lone.end() + 20])
                    raise BadRow("not-unicode", "surrogates in pairs", f"a lone one in {near}")
            elif isinstance(item, dict | list):
                open_values.append((item, depth + 1))


def resolve(root: str, path: str) -> str:
    """A medium's path as it can be opened: URIs and absolute paths as they are, others below root.

    Raises:
        BadRow: no path, or an address of a kind that rows may not name. What a row says comes from strangers, and
            fsspec knows kinds that log in elsewhere or chain others (zip://a::b).
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise BadRow("wrong-form", "the path of a file", repr(path))
    scheme, found, _ = path.partition("://") if not path.startswith("data:") else ("", "", "")
    chained = "::" in path and is_embedded(path)  # a URL may hold ::, but embedded.py gives its container to fsspec
    if found and (chained or scheme not in (*SCHEMES, root.partition("://")[0])):
        raise BadRow("unreachable-media", f"a path, data: or one of {', '.join(SCHEMES)}", path)
    if path.startswith(("/", "data:")) or "://" in path or is_embedded(path):
        return path
    return f"{root.rstrip('/')}/{path.removeprefix('./')}"


SCHEMES = ("file", "http", "https", "s3")
"""Addresses that a row may name, beside those of the kind that the media folder has."""


def field_of(entry: dict, *names: str) -> Any:
    """The first of the fields that the entry has."""
    for name in names:
        if entry.get(name) is not None:
            return entry[name]
    raise BadRow("wrong-form", f"a field {' or '.join(names)}", f"fields {sorted(entry)}")


def wrong_kind(row: Draft, kind: str) -> Bad | None:
    """The Bad of a row that has a rejected answer in a source of another kind than preference, or has none in one."""
    if bool(row.chosen) == (kind == "preference"):
        return None
    if row.chosen:
        expected = (
            "rows without a rejected answer, or the kind preference (--kind preference; in a recipe kind: preference)"
        )
        return Bad(row.where, expected, f"a rejected answer in a source of the kind {kind}", "wrong-kind")
    expected = "a chosen and a rejected answer in each row, or another kind (--kind instruction)"
    return Bad(row.where, expected, "one answer in a source of the kind preference", "wrong-kind")


# ---------------------------------------------------------------- parts


def text(value: str) -> dict:
    return {"part": "text", "text": value}


def say(parts: list[dict], words: str) -> None:
    """Adds words to the parts of a message: to the text that ends it, where one does."""
    if parts and parts[-1]["part"] == "text":
        parts[-1] = text(parts[-1]["text"] + words)
    elif words:
        parts.append(text(words))


def message(role: str, *parts: dict) -> dict:
    return {"role": role, "parts": list(parts)}


def check_turns(messages: Sequence[dict], *, ends: Literal["answer", "question"] = "answer") -> None:
    """A conversation that a chat template can hold: system only first, people (or tools) and the assistant in turn, the
    last word the assistant's (or, for the prompt of a preference, not), and no answer empty.

    Raises:
        BadRow
    """
    roles = [item["role"] for item in messages]
    told = f"{', '.join(roles[:12])}{', ...' if len(roles) > 12 else ''}"
    spoken = roles[1:] if roles[:1] == ["system"] else roles
    if "system" in spoken:
        raise BadRow("wrong-order", "a system message only in the first place", told)
    if spoken[:1] != ["user"]:
        raise BadRow("wrong-order", "a first turn from the user", told)
    for before, now in pairwise(spoken):
        if now not in FOLLOWS[before]:
            raise BadRow("wrong-order", f"after {before} a turn from {' or '.join(FOLLOWS[before])}", told)
    if (spoken[-1] == "assistant") != (ends == "answer"):
        raise BadRow("wrong-order", f"a last turn from {'the assistant' if ends == 'answer' else 'the user'}", told)
    for number, item in enumerate(messages):
        if item["role"] == "assistant" and not says_something(item):
            raise BadRow("empty-answer", "an answer with text", f"none in message {number}")


def rendered(messages: list[dict], source: Source) -> list[dict]:
    """A conversation in turns; with the document rendering one document of all that was said, without roles.

    Raises:
        BadRow
    """
    if source.rendering == "chat":
        check_turns(messages)
        return messages
    whole = message("document", *(part for item in messages for part in item["parts"]))
    if not says_something(whole):
        raise BadRow("empty-answer", "a document with text", "none")
    return [whole]


FOLLOWS = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
"""Who may speak after whom; a turn of several tools has one message a tool."""


def says_something(item: dict) -> bool:
    """Whether a message has anything to learn: words, objects or an action."""
    return any(part.get("text", "").strip() or part["part"] in ("objects", "action") for part in item["parts"])


PLACEHOLDER = re.compile(r"(<image>|<video>)")


class Places:
    """Hands out media to placeholders in order, and notices when the numbers differ."""

    def __init__(self, media: Sequence[MediaRef], *, any_kind: bool = False):
        """`any_kind`: <image> is a video where there are only videos, as LLaVA-Video's data have it."""
        self.media, self.next = list(media), {"image": 0, "video": 0}
        self.of_kind = {
            kind: [number for number, item in enumerate(media) if item.kind == kind] for kind in ("image", "video")
        }
        self._only_videos = any_kind and bool(media) and not self.of_kind["image"]

    def take(self, kind: Literal["image", "video"]) -> dict:
        kind = "video" if self._only_videos else kind
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


def units_of(entry: dict) -> Units:
    """In what the row's coordinates are written: pixels of the original file unless `coordinates` says otherwise."""
    units = entry.get("coordinates", "pixels")
    if units not in ("pixels", "thousand", "unit"):
        raise BadRow("wrong-form", "coordinates pixels, thousand or unit", units)
    return units


def key_of(entry: dict) -> dict | None:
    """The answer key of a task: {"task": ..., "value": ...}. What is no object is another's field of that name, as the
    number of a row that img2dataset writes."""
    if not isinstance(entry.get("key"), dict):
        return None
    try:
        return Key.model_validate(entry["key"]).model_dump()
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:3])
        raise BadRow("wrong-form", "key: {task, value}", f"{entry['key']}: {told}") from None
