"""OpenAI chat messages, one conversation a line: {"messages": [{"role", "content"}]}. Content is text or a list of
{"type": "text" | "image_url" | "image" | "video_url" | "video"}; an image is a path, a URL or a data: URI.

With `images` / `videos` beside the messages, {"type": "image"} alone (as TRL writes it) or <image> in plain text is the
next of them. A folder's path, https:// and s3:// are read alike. `tools` beside the messages go into the system
message, an assistant's `tool_calls` behind its words, as the chat template writes both. A message of weight 0 (or loss
false, ms-swift's word) is refused: every answer of a sample is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.prepare.formats.answers import with_places
from pipelines.prepare.formats.llava import media_of
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
from pipelines.prepare.formats.tools import calls_of, check_learnt, joined, with_tools
from trainer.recipe import Source

ROLES = ("system", "developer", "user", "assistant", "tool")


KIND, RENDERING = "instruction", "chat"


def looks(peek: Peek) -> str | None:
    messages = peek.first("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return None
    beside = ("images", "videos", "objects", "rejected_response", "rejected_messages", "chosen", "format")
    return "messages of role and content" if "role" in messages[0] and not any(map(peek.has, beside)) else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    media = media_of(entry, media_root)
    places = Places(media)
    listed = field_of(entry, "messages")
    if not listed:
        raise BadRow("wrong-form", "at least one message", "an empty list")
    messages = [conversation_message(item, media, places, media_root) for item in listed]
    places.finish()
    messages = rendered(with_places(told_tools(messages, entry.get("tools"))), source)
    identity = identity_of(entry, where)
    return Draft(where, identity, messages, media, key=key_of(entry), units=units_of(entry))


def conversation_message(item: dict, media: list[MediaRef], places: Places, root: str) -> dict:
    """One message; media in typed content are added to `media`."""
    role = field_of(item, "role")
    if role not in ROLES:
        raise BadRow("wrong-form", f"a role of {', '.join(ROLES)}", role)
    role = "system" if role == "developer" else role
    check_learnt(item)
    if calls := item.get("tool_calls"):
        if role != "assistant":
            raise BadRow("wrong-form", "tool_calls of the assistant", role)
        words = [_said(role, item["content"], media, places, root)] if item.get("content") else []
        return joined([*words, calls_of(calls)])[0]
    return _said(role, item.get("content"), media, places, root)


def told_tools(messages: list[dict], tools: object) -> list[dict]:
    """The conversation with the functions that it may call in its system message."""
    if not (written := with_tools("", tools)):
        return messages
    if messages[0]["role"] != "system":
        return [message("system", text(written)), *messages]
    parts = messages[0]["parts"]
    if parts and parts[-1]["part"] == "text":
        parts = [*parts[:-1], text(f"{parts[-1]['text']}\n\n{written}")]
    else:
        parts = [*parts, text(written)]
    return [message("system", *parts), *messages[1:]]


def _said(role: str, content: Any, media: list[MediaRef], places: Places, root: str) -> dict:
    if isinstance(content, str):
        if role == "assistant" and "<image>" not in content:
            return message(role, text(content))
        return message(role, *(places.split(content) if places.media else _plain(content)))
    if not isinstance(content, list):
        raise BadRow("wrong-form", "content: text or a list of parts", type(content).__name__)
    return message(role, *(_part(part, media, places, root) for part in content))


def _plain(content: str) -> list[dict]:
    for kind in ("image", "video"):
        if f"<{kind}>" in content:
            raise BadRow("placeholder-without-media", f"1 {kind} file", "0 of them")
    return [text(content)]


def _part(part: dict, media: list[MediaRef], places: Places, root: str) -> dict:
    kind = field_of(part, "type")
    if kind in ("text", "input_text", "output_text"):
        return text(field_of(part, "text"))
    kinds: dict[str, MediaKind] = {
        "image_url": "image",
        "image": "image",
        "input_image": "image",
        "video_url": "video",
        "video": "video",
    }
    if (medium := kinds.get(kind)) is None:
        raise BadRow("wrong-form", "a part text, image_url, image, video_url or video", kind)
    if places.media and not any(part.get(name) for name in (kind, medium, "image_url", "url", "path")):
        return places.take(medium)  # {"type": "image"} alone: the next of `images`
    value = field_of(part, kind, medium, "image_url", "url", "path")
    uri = field_of(value, "url", "path") if isinstance(value, dict) else value
    media.append(MediaRef(resolve(root, uri), medium))
    return {"part": medium, "media": len(media) - 1}
