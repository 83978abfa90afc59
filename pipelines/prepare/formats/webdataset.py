"""WebDataset tars: files of one key are one sample. KEY.jpg (png, webp, ...; several as KEY.0.jpg, KEY.1.jpg) or
KEY.mp4 with KEY.txt, a caption, or KEY.json, an object that any reader of rows knows (conversations, messages, points,
a caption). Media named inside that object are replaced by the key's own. Other files of a key (.cls, .npy) are not
read.

The shards that this project writes are such tars: their KEY.json is a Sample, which is read back as it was, apart from
`kind`, `source` and `split`, which the source in the recipe says.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO

from pydantic import ValidationError

from pipelines.prepare.embedded import member, open_file
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, MediaRef, Row, check_sound, guarded
from pipelines.prepare.formats.table import draft_of_row
from trainer.data.sample import Sample
from trainer.errors import DataError
from trainer.recipe import Source

KIND, RENDERING = "caption", "document"
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
VIDEOS = ("mp4", "webm", "mkv", "avi", "mov")
MEDIA = ("image", "images", "video", "videos")

Member = tuple[str, str, int, int]
"""Key, ending, first byte, size."""


def looks(peek: Peek) -> str | None:
    return "a tar file" if peek.holds == "tar" else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    if path.endswith((".gz", ".tgz")):
        do = "gunzip it: media inside are compressed already"
        raise DataError("a compressed tar, whose members cannot be read in place", where=path, do=do)
    with open_file(path) as file:
        members = _Members(file, path)
        for key, listed in groupby(members, lambda item: item[0]):
            entry = {"key": key, "members": list(listed)}
            yield guarded(f"{path}, {key}", lambda entry, where: _draft(entry, where, path, file, source), entry)
        if members.lack is not None:
            yield Bad(path, "a whole tar file", members.lack, "damaged-tar")


class _Members:
    """Regular files of a tar in order, without keeping them; `lack` says afterwards what the file lacks."""

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
                    if info.isfile() and not name.startswith("."):
                        yield f"{folder}{slash}{stem}", ending.lower(), info.offset_data, info.size
                self.file.seek(archive.offset)
                self.lack = None if self.file.read(1) else "no end mark: later samples may be missing"
        except tarfile.TarError as error:
            self.lack = str(error)


def _draft(entry: dict, where: str, path: str, file: BinaryIO, source: Source) -> Draft:
    key, members = entry["key"], entry["members"]
    media: list[MediaRef] = []
    words: str | None = None
    row: dict = {}
    for _, ending, start, size in members:
        last = ending.rpartition(".")[2]
        if last in IMAGES or last in VIDEOS:
            media.append(MediaRef(member(path, start, size), "image" if last in IMAGES else "video"))
        elif ending == "txt":
            words = _content(file, start, size, f"{key}.txt")
        elif ending == "json":
            row = _object(_content(file, start, size, f"{key}.json"))
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
