"""Qwen-VL's own fine-tuning data: {"id", "conversations": [{"from": "user" | "assistant", "value"}]} with
"Picture 1: <img>path</img>\\n" where a picture belongs and <ref>label</ref><box>(x1,y1),(x2,y2)</box> for places, in
thousandths of the picture's sides. Source: arXiv 2308.12966 section 3 and the README beside its released weights.

The words "Picture N: " are the template's, written again by the families that have them. A place is in the last picture
shown before it. <quad> (four corners of a text line) has no geometry here and is refused.
"""

from __future__ import annotations

import re
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
    key_of,
    message,
    rendered,
    resolve,
    say,
)
from trainer.recipe import Source

KIND, RENDERING = "instruction", "chat"
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_PICTURE = re.compile(r"(?:Picture \d+: ?)?<img>(?P<path>.*?)</img>\n?", re.DOTALL)
_PLACE = re.compile(r"<ref>(?P<label>.*?)</ref>(?P<boxes>(?:\s*<box>.*?</box>)*)|<box>(?P<box>.*?)</box>", re.DOTALL)
_BOX = re.compile(r"<box>(.*?)</box>", re.DOTALL)
_CORNERS = re.compile(r"\s*\((\d+),\s*(\d+)\)(?:,\s*\((\d+),\s*(\d+)\))?\s*")
_TAG = re.compile(r"</?(?:img|ref|box|quad)>")


def looks(peek: Peek) -> str | None:
    turns = peek.first("conversations")
    written = [str(entry.get("conversations")) for entry in peek.entries]
    if isinstance(turns, list) and any("<img>" in one and "</img>" in one for one in written):
        return "<img> in conversations"
    return None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    media: list[MediaRef] = []
    messages = []
    for turn in field_of(entry, "conversations"):
        speaker, value = field_of(turn, "from", "role"), field_of(turn, "value", "content")
        if speaker not in ROLES:
            raise BadRow("wrong-form", f"a turn from {', '.join(sorted(ROLES))}", speaker)
        if not isinstance(value, str):
            raise BadRow("wrong-form", "the words of a turn", type(value).__name__)
        messages.append(message(ROLES[speaker], *_parts(value, media, media_root)))
    if not messages:
        raise BadRow("wrong-form", "at least one turn", "an empty conversation")
    messages = rendered(messages, source)
    return Draft(where, identity_of(entry, where), messages, media, key=key_of(entry), units="thousand")


def _parts(value: str, media: list[MediaRef], root: str) -> list[dict]:
    parts: list[dict] = []
    at = 0
    for found in _PICTURE.finditer(value):
        parts += _places(value[at : found.start()], len(media))
        media.append(MediaRef(resolve(root, found["path"].strip()), "image"))
        parts.append({"part": "image", "media": len(media) - 1})
        at = found.end()
    return parts + _places(value[at:], len(media))


def _places(words: str, num_media: int) -> list[dict]:
    """Text with <ref> and <box> as parts; `num_media` pictures were shown before."""
    parts: list[dict] = []
    at = 0
    for found in _PLACE.finditer(words):
        _say(parts, words[at : found.start()])
        at = found.end()
        label = found["label"] or ""
        boxes = [found["box"]] if found["box"] is not None else _BOX.findall(found["boxes"] or "")
        if not boxes:
            _say(parts, label)
            continue
        if not num_media:
            raise BadRow("placeholder-without-media", "a picture before the first <box>", "none")
        objects = [{"label": label, "at": _geometry(box)} for box in boxes]
        form, before = "any" if label else "plain", parts[-1] if parts else {}
        if before.get("part") == "objects" and before["form"] == form:
            before["objects"] += objects
        else:
            parts.append({"part": "objects", "media": num_media - 1, "objects": objects, "form": form})
    _say(parts, words[at:])
    return parts


def _geometry(box: str) -> dict:
    found = _CORNERS.fullmatch(box)
    if found is None:
        raise BadRow("wrong-form", "<box>(x1,y1),(x2,y2)</box> or <box>(x,y)</box>", f"<box>{box}</box>")
    numbers = [float(number) for number in found.groups() if number is not None]
    return {"shape": "point", "xy": numbers} if len(numbers) == 2 else {"shape": "box", "xyxy": numbers}


def _say(parts: list[dict], words: str) -> None:
    if (stray := _TAG.search(words)) is not None:
        told = "unsupported" if "quad" in stray[0] else "wrong-form"
        raise BadRow(told, "<img>, <ref> and <box> that are closed, and no <quad>", f"{stray[0]} in {words[:60]!r}")
    say(parts, words)
