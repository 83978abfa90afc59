"""The beginning of an annotation file, for recognising its format: every reader's `looks(peek)` says by what it would
know the file as its own, or None."""

from __future__ import annotations

import contextlib
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.prepare.embedded import open_file
from pipelines.prepare.formats.rows import opened, read_text, text_lines
from pipelines.prepare.formats.streams import JsonStream, TooMuch
from trainer.errors import DataError

FIRST = 20
"""Entries that are looked at."""
TIMES = re.compile(rb"\s*\S+ +[\d.]+ +[\d.]+ *##")
PICKLES = (".p", ".pkl", ".pickle")
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
"""Endings of names of media."""
LONGEST_NAME = 4096
"""Of a file, in characters: Linux' PATH_MAX."""

Holds = Literal["rows", "object", "tar", "parquet", "pickle", "text", "times", "xml", "hocr", "pdf", "musicxml"]


@dataclass(frozen=True)
class Peek:
    """`rows`: entries are the first objects of a JSON list or of JSON Lines; `object`: the one object of the file;
    `tar`: names are its first members; `parquet`: names are its columns; `xml`: the name of its
    root; `times`: a text file whose first line is VIDEO start end##sentence."""

    path: str
    holds: Holds
    entries: tuple[dict, ...] = ()
    names: tuple[str, ...] = ()

    def first(self, name: str) -> Any:
        """The field's first value that is not null."""
        return next((entry[name] for entry in self.entries if entry.get(name) is not None), None)

    def has(self, name: str) -> bool:
        return self.first(name) is not None

    def all(self, *names: str) -> bool:
        return all(map(self.has, names))

    def seen(self) -> str:
        """What was looked at, for a person."""
        if self.holds in ("tar", "parquet", "xml"):
            what = {"tar": "members", "parquet": "columns", "xml": "root"}[self.holds]
            return f"a {self.holds} file with the {what} {', '.join(self.names[:8]) or '(none)'}"
        fields = sorted({name for entry in self.entries for name in entry})
        found = f"fields {', '.join(fields[:16])}" if fields else "no object"
        if self.holds == "rows":
            return f"its first {len(self.entries)} entries: {found}"
        return f"one JSON object: {found}" if self.holds == "object" else f"a {self.holds} file"


def ending_of(name: object) -> str | None:
    """What the last part of a file's name ends in, in small letters and without the dot; None of what has no ending."""
    found = (
        re.fullmatch(r"[^\n]*[^\n/.]\.(\w{1,5})", name) if isinstance(name, str) and len(name) < LONGEST_NAME else None
    )
    return found[1].lower() if found else None


def peek_at(path: str) -> Peek:
    """
    Raises:
        DataError: no such file, or one that cannot be read as what its name says.
    """
    name = path.lower()
    if name.endswith(PICKLES):
        return Peek(path, "pickle")
    if name.endswith((".txt", ".md")):
        with open_file(path) as file:
            return Peek(path, "times" if TIMES.match(file.readline(1000)) else "text")
    if name.endswith(".pdf"):
        return Peek(path, "pdf")
    if name.endswith((".musicxml", ".mxl")):
        return Peek(path, "musicxml")
    if name.endswith((".hocr", ".html", ".htm")):
        return Peek(path, "hocr" if "ocr_page" in read_text(path) else "text")
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return Peek(path, "tar", names=_members(path))
    if name.endswith(".parquet"):
        with open_file(path) as file:
            try:
                return Peek(path, "parquet", names=tuple(pq.read_schema(file).names))
            except (pa.ArrowException, OSError) as error:
                raise DataError("not a Parquet file", where=path, got=error) from None
    if name.endswith(".xml"):
        root = re.search(r"<([A-Za-z][\w.-]*)", read_text(path))
        return Peek(path, "xml", names=(root[1],) if root else ())
    return _json(path)


def _members(path: str) -> tuple[str, ...]:
    with open_file(path) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:*") as archive:
                return tuple(info.name for info in islice(archive, FIRST))
        except tarfile.TarError as error:
            raise DataError("not a tar file", where=path, got=error) from None


def _json(path: str) -> Peek:
    """A list, an object, or JSON Lines; of the lists in an object, and of a list, only the first entries are held."""
    with opened(path) as stream:
        first = stream.peek()
        if first == "[":
            return Peek(path, "rows", tuple(_first(stream)))
        if first == "{":
            try:
                value = stream.beginning(FIRST)
                if not stream.peek():
                    return Peek(path, "object", (value,))
            except (DataError, TooMuch):
                pass  # the first line may be broken and the others not
    return Peek(path, "rows", tuple(_lines(text_lines(path))))


def _first(stream: JsonStream) -> list[dict]:
    """The first objects of a list, up to what cannot be read."""
    found: list[dict] = []
    with contextlib.suppress(DataError):
        for value in stream.entries():
            if isinstance(value, TooMuch):
                break
            if isinstance(value, dict):
                found.append(value)
            if len(found) == FIRST:
                break
    return found


def _lines(lines: Iterable[str]) -> list[dict]:
    found: list[dict] = []
    for line in islice(lines, 4 * FIRST):
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and len(found) < FIRST:
            found.append(value)
    return found
