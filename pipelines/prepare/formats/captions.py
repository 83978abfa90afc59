"""A picture and words about it, one an entry: {"image" | "images", "caption" | "text"}, or with "question" and "answer"
| "answers" (the first one is taken). What web-scale caption sets and many tables on a hub come down to.

As a document a caption follows its picture; in a chat it answers the request for a description.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.llava import media_of
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    Row,
    each,
    field_of,
    identity_of,
    key_of,
    message,
    text,
)
from trainer.recipe import Source

KIND, RENDERING = "caption", "document"
QUESTION = "Describe the picture."
IMAGES, WORDS = ("image", "images"), ("caption", "text", "answer", "answers")


def looks(peek: Peek) -> str | None:
    if not any(map(peek.has, IMAGES)) or peek.has("texts"):
        return None
    if peek.has("question"):
        return "image and question" if peek.has("answer") or peek.has("answers") else None
    return next((f"image and {name}" for name in ("caption", "text") if isinstance(peek.first(name), str)), None)


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    media = media_of(entry, media_root)
    if not media:
        raise BadRow("wrong-form", f"a field {' or '.join(IMAGES)}", f"fields {sorted(entry)}")
    asked = entry.get("question")
    words = field_of(entry, *(("answer", "answers") if asked else ("caption", "text")))
    words = words[0] if isinstance(words, list) and words else words
    if not isinstance(words, str) or not words.strip():
        raise BadRow("empty-text", "words about the picture", repr(words))
    shown = [{"part": item.kind, "media": number} for number, item in enumerate(media)]
    if source.rendering == "document":
        said = [text(f"{asked}\n")] if asked else []
        messages = [message("document", *shown, *said, text(words))]
    else:
        messages = [message("user", *shown, text(asked or QUESTION)), message("assistant", text(words))]
    return Draft(where, identity_of(entry, where), messages, media, key=key_of(entry))
