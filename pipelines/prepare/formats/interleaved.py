"""Interleaved documents as OBELICS writes them: {"images": [path | null, ...], "texts": [text | null, ...]}, two lists
of one length; at each place one of the two is null."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    each,
    field_of,
    identity_of,
    message,
    resolve,
    says_something,
    text,
)
from trainer.recipe import Source

KIND, RENDERING = "interleaved", "document"


def looks(peek: Peek) -> str | None:
    images, texts = peek.first("images"), peek.first("texts")
    both = isinstance(images, list) and isinstance(texts, list)
    # objects are questions and answers (the_cauldron): captions.py
    return "images and texts" if both and not any(isinstance(item, dict) for item in texts) else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    if source.rendering == "chat":
        ask = "rendering: document in the recipe, --kind interleaved --rendering document on the command line"
        raise BadRow("wrong-form", f"the document rendering for interleaved documents: {ask}", "chat")
    images, texts = field_of(entry, "images"), field_of(entry, "texts")
    if len(images) != len(texts):
        raise BadRow("wrong-form", f"as many texts as images ({len(images)})", len(texts))
    parts: list[dict] = []
    media: list[MediaRef] = []
    for place, (image, written) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (written is None):
            raise BadRow(
                "wrong-form", f"an image or a text at place {place}", "both" if image is not None else "neither"
            )
        if image is not None:
            media.append(MediaRef(resolve(media_root, image), "image"))
            parts.append({"part": "image", "media": len(media) - 1})
        else:
            parts.append(text(written))
    whole = message("document", *parts)
    if not says_something(whole):
        raise BadRow("empty-text", "at least one text with words", texts[:3])
    return Draft(where, identity_of(entry, where), [whole], media)
