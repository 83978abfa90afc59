"""OpenAI chat messages, one conversation a line: {"messages": [{"role", "content"}]}. Content is text or a list of
{"type": "text" | "image_url" | "image" | "video_url" | "video"}; an image is a path, a URL or a data: URI.

With `images` / `videos` beside the messages and <image> / <video> in plain text it is ms-swift's form.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.llava import media_of
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Places,
    Row,
    answer_parts,
    check_turns,
    each,
    field_of,
    identity_of,
    key_of,
    message,
    resolve,
    text,
    units_of,
)  # fmt: skip
from trainer.recipe import Source

ROLES = ("system", "developer", "user", "assistant", "tool")


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        media = media_of(entry, media_root)
        places = Places(media)
        listed = field_of(entry, "messages")
        if not listed:
            raise BadRow("wrong-form", "at least one message", "an empty list")
        messages = [conversation_message(item, media, places, media_root) for item in listed]
        places.finish()
        check_turns(messages)
        identity = identity_of(entry, where)
        return Draft(where, identity, messages, media, key=key_of(entry), units=units_of(entry))

    yield from each(path, one)


def conversation_message(item: dict, media: list[MediaRef], places: Places, root: str) -> dict:
    """One message; media in typed content are added to `media`."""
    role = field_of(item, "role")
    if role not in ROLES:
        raise BadRow("wrong-form", f"a role of {', '.join(ROLES)}", role)
    role = "system" if role == "developer" else role
    content = item.get("content")
    if isinstance(content, str):
        if role == "assistant" and "<image>" not in content:
            return message(role, *answer_parts(content, len(media)))
        return message(role, *(places.split(content) if places.media else _plain(content)))
    if not isinstance(content, list):
        raise BadRow("wrong-form", "content: text or a list of parts", type(content).__name__)
    return message(role, *(_part(part, media, root) for part in content))


def _plain(content: str) -> list[dict]:
    for kind in ("image", "video"):
        if f"<{kind}>" in content:
            raise BadRow("placeholder-without-media", f"1 {kind} file", "0 of them")
    return [text(content)]


def _part(part: dict, media: list[MediaRef], root: str) -> dict:
    kind = field_of(part, "type")
    if kind in ("text", "input_text", "output_text"):
        return text(field_of(part, "text"))
    medium = {
        "image_url": "image",
        "image": "image",
        "input_image": "image",
        "video_url": "video",
        "video": "video",
    }.get(kind)
    if medium is None:
        raise BadRow("wrong-form", "a part text, image_url, image, video_url or video", kind)
    value = field_of(part, kind, medium, "image_url", "url")
    uri = value.get("url") or value.get("path") if isinstance(value, dict) else value
    media.append(MediaRef(resolve(root, uri), medium))  # type: ignore[arg-type]
    return {"part": medium, "media": len(media) - 1}
