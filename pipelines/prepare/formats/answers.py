"""Places in what an assistant says, as Qwen2.5-VL writes them: JSON objects with bbox_2d or point_2d become Objects, so
that each family writes its own coordinates. As text they would stay those of the file, whatever the picture is resized
to.

Read are a list and a single object, with any of JSON's white space, in a fence (```json, which goes) or not, with words
around them. The picture meant is the only one shown before. What has numbers under these names and is none of that is
refused; where no picture was shown it stays text, and the funnel counts it (`places-as-text`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from math import isfinite

from pipelines.prepare.formats.rows import BadRow, say, text

OBJECT_FIELDS = {"label", "bbox_2d", "point_2d", "role", "text_content"}
"""What an object of a JSON answer may have; all of it is written again."""
NAMES = ("bbox_2d", "point_2d")
_NUMBERS = re.compile(r"""\b(?:bbox_2d|point_2d)\b\\?["']?\s*[:=](?:[\s\[({"'\\]*|\s*\{[^}]*:\s*)[-+.]?\d""")
"""Coordinates, not words about the format; in Python's quotes or JSON within JSON as well."""
_BEGINS = re.compile(r"\[\s*\{|\{")
_FENCE = re.compile(r"```[ \t]{0,8}(?:json)?\Z", re.IGNORECASE)
_FENCE_ENDS = re.compile(r"\s*```")
_DECODER = json.JSONDecoder()
EXPECTED = "JSON objects with bbox_2d or point_2d and label, in a list or alone"


def has_places(words: str) -> bool:
    """Whether there are coordinates under the names of places."""
    return "_2d" in words and _NUMBERS.search(words) is not None


def places_as_text(messages: Sequence[dict]) -> bool:
    """Whether coordinates stay in the words of a message, in the numbers of the file."""
    return any(part["part"] == "text" and has_places(part["text"]) for item in messages for part in item["parts"])


def with_places(messages: Sequence[dict], before: Sequence[dict] = ()) -> list[dict]:
    """Messages in which the assistant's places are Objects; `before`: messages that were said before them.

    Raises:
        BadRow: places that cannot be read, or several pictures that they could be of.
    """
    shown = {part["media"] for item in before for part in item["parts"] if part["part"] in ("image", "video")}
    found = []
    for item in messages:
        if item["role"] == "assistant":
            item = {**item, "parts": [one for part in item["parts"] for one in _placed(part, shown)]}
        shown |= {part["media"] for part in item["parts"] if part["part"] in ("image", "video")}
        found.append(item)
    return found


def _placed(part: dict, shown: set[int]) -> list[dict]:
    if part["part"] != "text" or not shown or not has_places(part["text"]):
        return [part]
    if len(shown) > 1:
        raise BadRow("which-picture", "one picture before an answer with bbox_2d or point_2d", f"{len(shown)} of them")
    return answer_parts(part["text"], media=min(shown))


def answer_parts(value: str, *, media: int = 0) -> list[dict]:
    """An assistant's text about one picture, with its places as Objects.

    Raises:
        BadRow: places in another form, or with other fields, which would be lost.
    """
    if not has_places(value):
        return [text(value)]
    parts: list[dict] = []
    at = 0
    for start, end, objects in _found(value):
        words = value[at:start]
        if parts and not words.strip():
            parts[-1]["objects"] += objects
        else:
            say(parts, words if words.strip() else "")
            parts.append({"part": "objects", "media": media, "objects": objects, "form": "json"})
        at = end
    say(parts, value[at:] if value[at:].strip() else "")
    for part in parts:
        if part["part"] == "text" and (left := _NUMBERS.search(part["text"])) is not None:
            raise BadRow("unread-places", EXPECTED, _near(part["text"], left.start()))
    return parts


def _found(value: str) -> Iterator[tuple[int, int, list[dict]]]:
    """(start, end, objects) of all JSON with places, fences included, in order."""
    at = 0
    while (begins := _BEGINS.search(value, at)) is not None:
        start = begins.start()
        try:
            decoded, end = _DECODER.raw_decode(value, start)
        except (ValueError, RecursionError):
            if not has_places(value[start:]):
                return
            if begins[0] != "{":  # its entries alone would be read without the rest
                raise BadRow("unread-places", EXPECTED, f"no JSON: {_near(value, start)}") from None
            at = start + 1
            continue
        at = end
        entries = decoded if isinstance(decoded, list) else [decoded]
        if not has_places(value[start:end]):
            continue
        if not all(isinstance(entry, dict) and any(name in entry for name in NAMES) for entry in entries):
            raise BadRow("unread-places", EXPECTED, _near(value, start))
        before = value[:start].rstrip()
        fence, closed = _FENCE.search(before, max(0, len(before) - 16)), _FENCE_ENDS.match(value, end)
        if fence is not None and closed is not None:
            start, at = fence.start(), closed.end()
        yield start, at, [_object(entry) for entry in entries]


def _near(value: str, at: int) -> str:
    return repr(value[max(0, at - 20) : at + 80])


def _object(entry: dict) -> dict:
    if unknown := sorted(entry.keys() - OBJECT_FIELDS):
        expected = f"objects of {', '.join(sorted(OBJECT_FIELDS))}"
        raise BadRow("unsupported", expected, f"{', '.join(unknown)} as well")
    if all(name in entry for name in NAMES):
        raise BadRow("unsupported", "a bbox_2d or a point_2d", "both in one object")
    if "bbox_2d" in entry:
        at: dict = {"shape": "box", "xyxy": _numbers(entry, "bbox_2d", 4)}
    else:
        at = {"shape": "point", "xy": _numbers(entry, "point_2d", 2)}
    found = {"label": "" if entry.get("label") is None else str(entry["label"]), "at": at}
    if entry.get("role"):
        found["role"] = str(entry["role"])
    if entry.get("text_content") is not None:
        found["content"] = str(entry["text_content"])
    return found


def _numbers(entry: dict, name: str, count: int) -> list[float]:
    try:
        value = [float(one) for one in entry[name]]
    except (TypeError, ValueError, OverflowError):
        value = []
    if len(value) != count or not all(map(isfinite, value)):
        raise BadRow("unread-places", f"{name}: {count} numbers", repr(entry[name]))
    return value
