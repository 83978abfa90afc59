"""LLaVA and ShareGPT: a list (or lines) of {"id", "image" | "images" | "video" | "videos", "conversations": [{"from",
"value"}]}, with <image> and <video> where the media belong; where there are only videos <image> is one too, as in
LLaVA-Video's data. Also LLaMA-Factory's ShareGPT with `system` beside it.

A source of kind caption, interleaved, document, video or text with the document rendering becomes one document: what
people said and what the model said are one text, without roles.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.answers import with_places
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaKind,
    MediaRef,
    Places,
    Row,
    each,
    field_of,
    identity_of,
    key_of,
    message,
    rendered,
    resolve,
    text,
    units_of,
)  # fmt: skip
from trainer.recipe import Source

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


KIND, RENDERING = "instruction", "chat"


def looks(peek: Peek) -> str | None:
    turns = peek.first("conversations")
    if peek.has("chosen") or peek.has("tools") or not isinstance(turns, list) or not turns:
        return None
    if not isinstance(turns[0], dict) or "<img>" in str(turns) or "from" not in turns[0]:
        return None
    return "conversations of from and value" if turns[0]["from"] in ROLES else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    media = media_of(entry, media_root)
    places = Places(media, any_kind=True)
    messages = turns(entry, places)
    places.finish()
    messages = rendered(with_places(messages), source)
    identity = identity_of(entry, where)
    return Draft(where, identity, messages, media, key=key_of(entry), units=units_of(entry))


def media_of(entry: dict, root: str) -> list[MediaRef]:
    """Images, then videos, each in the order in which the entry names them."""
    found = []
    kinds: tuple[tuple[MediaKind, tuple[str, str]], ...] = (
        ("image", ("image", "images")),
        ("video", ("video", "videos")),
    )
    for kind, names in kinds:
        for name in names:
            value = entry.get(name)
            if value is None:
                continue
            listed = value if isinstance(value, list) else [value]
            for item in listed:
                uri = field_of(item, "path", "url") if isinstance(item, dict) else item
                found.append(MediaRef(resolve(root, uri), kind))
    return found


def turns(entry: dict, places: Places) -> list[dict]:
    """The conversation as messages."""
    listed = field_of(entry, "conversations")
    if not listed:
        raise BadRow("wrong-form", "at least one turn", "an empty conversation")
    found = [message("system", {"part": "text", "text": entry["system"]})] if entry.get("system") else []
    return found + [turn(item, places) for item in listed]


def turn(item: dict, places: Places) -> dict:
    speaker, value = field_of(item, "from", "role"), field_of(item, "value", "content")
    if speaker not in ROLES:
        raise BadRow("wrong-form", f"a turn from {', '.join(sorted(ROLES))}", speaker)
    if not isinstance(value, str):
        raise BadRow("wrong-form", "the words of a turn", type(value).__name__)
    if ROLES[speaker] == "assistant" and "<image>" not in value and "<video>" not in value:
        return message("assistant", text(value))
    return message(ROLES[speaker], *places.split(value))
