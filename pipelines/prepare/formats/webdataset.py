"""WebDataset tars: files of one key are one sample. KEY.jpg (png, webp, ...; several as KEY.0.jpg, KEY.1.jpg, taken by
their numbers) or KEY.mp4 with KEY.txt, a caption, or KEY.json, an object that any reader of rows knows (conversations,
messages, points, a caption). Media named inside that object are replaced by the key's own. Other files of a key (.cls,
.npy, .depth.png) are not read; a link in the place of one that is read makes the row bad.

The shards that this project writes are such tars: their KEY.json is a Sample, which is read back as it was, apart from
`kind`, `source` and `split`, which the source in the recipe says.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO, NamedTuple

from pydantic import ValidationError

from pipelines.prepare.embedded import member, open_file
from pipelines.prepare.formats.peek import IMAGES, VIDEOS, Peek
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, MediaRef, Row, check_sound, guarded
from pipelines.prepare.formats.table import draft_of_row
from trainer.data.sample import Sample
from trainer.errors import DataError
from trainer.recipe import Source

KIND, RENDERING = "caption", "document"
MEDIA = ("image", "images", "video", "videos")

END_BYTES = 512
"""Zeros that a tar ends with, at least: programs write two such blocks, readers are content with one."""
READ_BYTES = 2**20


class Member(NamedTuple):
    key: str
    ending: str
    """Of the name, behind its first dot: "jpg", "0.jpg"."""
    start: int
    size: int
    is_file: bool

    def number(self) -> int | None:
        """The place of KEY.N.EXT among the key's media, -1 of KEY.EXT; None of any other name."""
        infix, dot, _ = self.ending.rpartition(".")
        return -1 if not dot else int(infix) if infix.isascii() and infix.isdecimal() else None


def looks(peek: Peek) -> str | None:
    return "a tar file" if peek.holds == "tar" else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    if path.lower().endswith((".gz", ".tgz")):
        do = "gunzip it: media inside are compressed already"
        raise DataError("a compressed tar, whose members cannot be read in place", where=path, do=do)
    with open_file(path) as file:
        members = _Members(file, path)
        for key, listed in groupby(members, lambda item: item.key):
            entry = {"key": key, "members": list(listed)}
            yield guarded(f"{path}, {key}", lambda entry, where: _draft(entry, where, path, file, source), entry)
        if members.lack is not None:
            yield Bad(path, "a whole tar file", members.lack, "damaged-tar")


class _Members:
    """Members of a tar in order, folders apart, without keeping them; `lack` says afterwards what the file lacks."""

    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path = file, path
        self.lack: str | None = None

    def __iter__(self) -> Iterator[Member]:
        try:
            with tarfile.open(fileobj=self.file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members = []  # type: ignore[attr-defined]  # tarfile would remember every one
                    folder, slash, name = info.name.rpartition("/")
                    stem, _, ending = name.partition(".")
                    if not info.isdir() and not name.startswith("."):
                        key = f"{folder}{slash}{stem}"
                        yield Member(key, ending.lower(), info.offset_data, info.size, info.isfile())
                self.lack = self._after(archive.offset)
        except tarfile.TarError as error:
            self.lack = str(error)

    def _after(self, end: int) -> str | None:
        """What is wrong behind the last member that tarfile gives, where only zeros may be: it stops at a header that
        it cannot read, and at the end of the first of two archives, as if that were the end."""
        self.file.seek(end)
        length = 0
        while data := self.file.read(READ_BYTES):
            if any(data):
                return f"a damaged header or another archive behind byte {end}: later samples are not read"
            length += len(data)
        return None if length >= END_BYTES else "no end mark: later samples may be missing"


def _draft(entry: dict, where: str, path: str, file: BinaryIO, source: Source) -> Draft:
    key, members = entry["key"], entry["members"]
    numbered: list[tuple[int, MediaRef]] = []
    words: str | None = None
    row: dict = {}
    for item in members:
        last, number = item.ending.rpartition(".")[2], item.number()
        is_medium = number is not None and last in (*IMAGES, *VIDEOS)
        if not item.is_file and (is_medium or item.ending in ("txt", "json")):
            raise BadRow("not-a-file", f"a file {key}.{item.ending} in the tar", "a link, or a member without bytes")
        if number is not None and is_medium:
            ref = MediaRef(member(path, item.start, item.size), "image" if last in IMAGES else "video")
            numbered.append((number, ref))
        elif item.ending == "txt":
            words = _content(file, item.start, item.size, f"{key}.txt")
        elif item.ending == "json":
            row = _object(_content(file, item.start, item.size, f"{key}.json"))
    media = [ref for _, ref in sorted(numbered, key=lambda pair: pair[0])]
    if row.get("format") == 1 and "messages" in row and "kind" in row:
        return _stored(row, where, media)
    check_sound(row)
    named = {"images": [item.uri for item in media if item.kind == "image"]}
    named["videos"] = [item.uri for item in media if item.kind == "video"]
    row = {**{name: value for name, value in row.items() if name not in MEDIA}, **named}
    row = {**row, "caption": words} if words is not None else row
    return draft_of_row({"id": key, **row}, where, "", source)


def _content(file: BinaryIO, start: int, size: int, name: str) -> str:
    before = file.tell()
    file.seek(start)
    data = file.read(size)
    file.seek(before)  # tarfile goes on from where it was
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow("not-utf8", f"UTF-8 in {name}", f"byte {error.start}") from None


def _object(content: str) -> dict:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad-json", "one JSON object", error) from None
    if not isinstance(value, dict):
        raise BadRow("wrong-form", "an object", type(value).__name__)
    return value


def _stored(row: dict, where: str, media: list[MediaRef]) -> Draft:
    """A Sample of our own shards."""
    try:
        sample = Sample.model_validate(row)
    except ValidationError as error:
        raise BadRow("wrong-form", "a sample of this format", error.errors()[0]["msg"]) from None
    if len(media) != len(sample.media):
        raise BadRow("missing-media", f"{len(sample.media)} media files of the key", f"{len(media)} of them")
    content = sample.model_dump(mode="json", exclude_none=True)
    return Draft(
        where,
        sample.id,
        content["messages"],
        media,
        chosen=content["chosen"],
        rejected=content["rejected"],
        key=content.get("key"),
        scores=content["scores"],
        notes=content["meta"],
    )
