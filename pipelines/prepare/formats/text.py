"""Plain text: JSONL with `text` (or `content`) a line; a file that ends in .txt or .md is one document."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.peek import IMAGES, VIDEOS, Peek, ending_of
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, Row, each, field_of, guarded, identity_of, message, text
from trainer import storage
from trainer.recipe import Source

KIND, RENDERING = "text", "document"
MEDIA = ("image", "images", "video", "videos")
OTHERS = ("conversations", "messages", "instruction", "pages", "blocks")
"""Fields of other formats."""
ADDRESSES = ("id", "url", "source", "title", "text", "content")
"""Fields that may name a picture without meaning that the row shows it: where a text comes from."""


def looks(peek: Peek) -> str | None:
    if peek.holds == "text":
        return "a text file"
    name = next((name for name in ("text", "content") if isinstance(peek.first(name), str)), None)
    if not name or any(map(peek.has, (*MEDIA, *OTHERS))) or any(map(_shown, peek.entries)):
        return None
    return f"{name} and no media"


def _shown(entry: dict) -> str | None:
    """The first field of the entry that names a picture or a video."""
    for name, value in entry.items():
        if (name in MEDIA and value) or (name not in ADDRESSES and ending_of(value) in (*IMAGES, *VIDEOS)):
            return name
    return None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    if not path.lower().endswith((".txt", ".md")):
        yield from each(path, lambda entry, where: draft(entry, where, media_root, source))
        return
    try:
        content = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        yield Bad(path, "UTF-8", f"byte {error.start}", "not-utf8")
        return
    entry = {"id": path.rpartition("/")[2], "text": content}
    yield guarded(path, lambda entry, where: draft(entry, where, media_root, source), entry)


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    value = field_of(entry, "text", "content")
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty-text", "text", repr(value))
    if (name := _shown(entry)) is not None:
        expected = "text alone; a picture with words is read by captions (format: captions) from image and text"
        raise BadRow("unsupported", expected, f"{name}: {entry[name]!r}")
    return Draft(where, identity_of(entry, where), [message("document", text(value))])
