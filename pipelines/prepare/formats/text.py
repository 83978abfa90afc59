"""Plain text: JSONL with `text` (or `content`) a line; a file that ends in .txt or .md is one document."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, Row, each, field_of, identity_of, message, text
from trainer import storage
from trainer.recipe import Source

KIND, RENDERING = "text", "document"


def looks(peek: Peek) -> str | None:
    if peek.holds == "text":
        return "a text file"
    name = next((name for name in ("text", "content") if isinstance(peek.first(name), str)), None)
    beside = ("image", "images", "video", "videos", "conversations", "messages", "instruction", "pages", "blocks")
    return f"{name} and no media" if name and not any(map(peek.has, beside)) else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    if not path.endswith((".txt", ".md")):
        yield from each(path, lambda entry, where: draft(entry, where, media_root, source))
        return
    try:
        yield Draft(path, path.rpartition("/")[2], [message("document", text(storage.read_bytes(path).decode()))])
    except UnicodeDecodeError as error:
        yield Bad(path, "UTF-8", f"byte {error.start}", "not-utf8")


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    value = field_of(entry, "text", "content")
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty-text", "text", repr(value))
    return Draft(where, identity_of(entry, where), [message("document", text(value))])
