"""Objects of a medium as text: boxes, points, spans of time, pages, in the form that a family reads and writes.

A family names a style; the variant of a sample picks among ways of writing the same thing. `html` (a page as QwenVL
HTML) and `plain` (just the coordinates) are the same in every style, in the family's coordinate convention.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trainer.data import page
from trainer.data.coordinates import Convention, Size
from trainer.data.pieces import Piece
from trainer.data.sample import Box, Mask, Object, Objects, Point, Sample, Span

Resized = Callable[[int], Size]
"""Index in Sample.media -> (width, height) that it is resized to."""


@dataclass(frozen=True)
class Pen:
    """Writes places and times of one sample's media in one family's convention."""

    sample: Sample
    variant: int
    convention: Convention
    resized: Resized

    def point(self, media: int, x: float, y: float) -> list[float] | list[int]:
        file = self.sample.media[media]
        return list(self.convention.to_model(x, y, (file.width, file.height), self.resized(media)))  # type: ignore[return-value]

    def box(self, media: int, xyxy: Sequence[float]) -> list[Any]:
        return [*self.point(media, xyxy[0], xyxy[1]), *self.point(media, xyxy[2], xyxy[3])]

    def time(self, media: int, seconds: float) -> str:
        if self.variant % 2 == 0:
            return f"{seconds:.1f} seconds"
        return hmsf(seconds, self.sample.media[media].fps)


class ObjectStyle(Protocol):
    """ValueError: an object that the form has no words for."""

    @property
    def name(self) -> str: ...

    def write(self, part: Objects, pen: Pen, target: bool) -> list[Piece]: ...


@dataclass(frozen=True)
class JsonObjects:
    """[{"bbox_2d": [x1, y1, x2, y2], "label": ...}], points also as <points x1= y1= alt=>: Qwen2.5-VL and Qwen3-VL."""

    name: str = "json"

    def write(self, part: Objects, pen: Pen, target: bool) -> list[Piece]:
        return [Piece("text", self._text(part, pen), target)]

    def _text(self, part: Objects, pen: Pen) -> str:
        if part.form in ("html", "plain"):
            return shared_form(part, pen)
        points_only = bool(part.objects) and all(isinstance(thing.at, Point) for thing in part.objects)
        if part.form == "xml" or (part.form == "any" and points_only and pen.variant % 2 == 1):
            return points_xml(part, pen)
        return _compact([self._entry(part.media, thing, pen) for thing in part.objects])

    def _entry(self, media: int, thing: Object, pen: Pen) -> dict[str, Any]:
        at = thing.at
        if isinstance(at, Point):
            entry: dict[str, Any] = {"point_2d": pen.point(media, *at.xy)}
        elif isinstance(at, Span):
            entry = {"start": pen.time(media, at.start_s), "end": pen.time(media, at.end_s)}
        else:  # Qwen2.5-VL publishes no text form of masks: their box is written
            entry = {"bbox_2d": pen.box(media, at.xyxy)}
        entry["label"] = thing.label
        if thing.role:
            entry["role"] = thing.role
        if thing.content is not None:
            entry["text_content"] = thing.content
        return entry


@dataclass(frozen=True)
class TaggedObjects:
    """label and (x1,y1),(x2,y2) between special tokens, one object after the other: Qwen-VL (<ref>, <box>; arXiv
    2308.12966 section 3) and Qwen2-VL (arXiv 2409.12191 section 2.2.2).

    Ours, where the papers have no words: a point is one (x,y) between the box tokens (UI-TARS, which is a Qwen2-VL,
    writes it so), a span of time stands in plain text after its label, content after its box. A role is not written.
    """

    ref_start: str = "<|object_ref_start|>"
    ref_end: str = "<|object_ref_end|>"
    box_start: str = "<|box_start|>"
    box_end: str = "<|box_end|>"
    name: str = "tagged"

    def write(self, part: Objects, pen: Pen, target: bool) -> list[Piece]:
        if part.form in ("html", "plain"):
            return [Piece("text", shared_form(part, pen), target)]
        return [piece for thing in part.objects for piece in self._entry(part.media, thing, pen, target)]

    def _entry(self, media: int, thing: Object, pen: Pen, target: bool) -> list[Piece]:
        at = thing.at
        pieces = self._between(self.ref_start, thing.label, self.ref_end, target) if thing.label else []
        if isinstance(at, Span):
            pieces.append(Piece("text", plain(media, thing, pen), target))
        else:
            corners = [at.xy] if isinstance(at, Point) else [at.xyxy[:2], at.xyxy[2:]]
            written = ",".join("({},{})".format(*pen.point(media, *corner)) for corner in corners)
            pieces += self._between(self.box_start, written, self.box_end, target)
        return [*pieces, Piece("text", thing.content, target)] if thing.content else pieces

    @staticmethod
    def _between(start: str, text: str, end: str, target: bool) -> list[Piece]:
        return [Piece("special", start, target), Piece("text", text, target), Piece("special", end, target)]


@dataclass(frozen=True)
class BracketObjects:
    """label: [x1, y1, x2, y2] with two decimals, one object a line: LLaVA (0-1 boxes of its region data, arXiv
    2310.03744). One object without label is the bare box, as in its answers to a referring expression.

    Ours, where its data have no words: a point is [x, y], a span of time stands in plain text, content after its place.
    A role is not written.
    """

    name: str = "brackets"

    def write(self, part: Objects, pen: Pen, target: bool) -> list[Piece]:
        if part.form in ("html", "plain"):
            return [Piece("text", shared_form(part, pen), target)]
        return [Piece("text", "\n".join(self._line(part.media, thing, pen) for thing in part.objects), target)]

    def _line(self, media: int, thing: Object, pen: Pen) -> str:
        at = thing.at
        if isinstance(at, Span):
            place = plain(media, thing, pen)
        else:
            numbers = pen.point(media, *at.xy) if isinstance(at, Point) else pen.box(media, at.xyxy)
            place = "[" + ", ".join(f"{number:.2f}" for number in numbers) + "]"
        line = f"{thing.label}: {place}" if thing.label else place
        return f"{line} {thing.content}" if thing.content else line


_OBJECT = r"(?:(?:<\|object_ref_start\|>|<ref>)(?P<label>[^<]*)(?:<\|object_ref_end\|>|</ref>))?"
_CORNER = r"\(\s*(-?\d+)\s*,\s*(-?\d+)\s*\)"
_TAGGED = re.compile(rf"{_OBJECT}\s*(?:<\|box_start\|>|<box>){_CORNER}(?:,{_CORNER})?(?:<\|box_end\|>|</box>)")


def read_tagged(text: str) -> list[dict[str, Any]]:
    """An answer as JSON of parts in reading order: its words, and each run of tagged objects (of medium 0) in the units
    that it writes. White space alone between objects is left out."""
    parts: list[dict[str, Any]] = []
    at = 0
    for match in _TAGGED.finditer(text):
        if (words := text[at : match.start()]).strip():
            parts.append({"part": "text", "text": words})
        if not parts or parts[-1]["part"] == "text":
            parts.append({"part": "objects", "media": 0, "objects": []})
        label, *corners = match.groups()
        numbers = [float(number) for number in corners if number is not None]
        place = {"shape": "point", "xy": numbers} if len(numbers) == 2 else {"shape": "box", "xyxy": numbers}
        parts[-1]["objects"].append({"label": label or "", "at": place})
        at = match.end()
    return [*parts, {"part": "text", "text": text[at:]}] if text[at:].strip() else parts


# ---------------------------------------------------------------- forms that every style shares


def shared_form(part: Objects, pen: Pen) -> str:
    """`html` or `plain`."""
    return page_html(part, pen) if part.form == "html" else "\n".join(plain(part.media, o, pen) for o in part.objects)


def plain(media: int, thing: Object, pen: Pen) -> str:
    """Just the coordinates: "x, y", "x1, y1, x2, y2", "start - end"."""
    at = thing.at
    if isinstance(at, Point):
        return ", ".join(map(str, pen.point(media, *at.xy)))
    if isinstance(at, Span):
        return f"{pen.time(media, at.start_s)} - {pen.time(media, at.end_s)}"
    return ", ".join(map(str, pen.box(media, at.xyxy)))


def points_xml(part: Objects, pen: Pen) -> str:
    """<points x1= y1= alt=>label</points>, one a label; boxes give their centre."""
    grouped: dict[str, list[Sequence[float]]] = {}
    for thing in part.objects:
        grouped.setdefault(thing.label, []).append(pen.point(part.media, *_centre(thing)))
    lines = []
    for label, points in grouped.items():
        label = html.escape(label)
        where = " ".join(f'x{n}="{x}" y{n}="{y}"' for n, (x, y) in enumerate(points, start=1))
        lines.append(f'<points {where} alt="{label}">{label}</points>')
    return "\n".join(lines)


def page_html(part: Objects, pen: Pen) -> str:
    """QwenVL HTML (page.py)."""
    return page.page_html(part.objects, box_of, lambda xyxy: " ".join(map(str, pen.box(part.media, xyxy))))


def hmsf(seconds: float, fps: float) -> str:
    """hours:minutes:seconds:frame, as "00:02:12:15"."""
    frames_per_s = round(fps) or 1
    whole = int(seconds)
    frame = min(int((seconds - whole) * frames_per_s + 1e-6), frames_per_s - 1)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}:{frame:02d}"


def box_of(thing: Object) -> tuple[float, float, float, float]:
    """A place in the picture as a box. ValueError for a span of time."""
    at = thing.at
    if isinstance(at, Box | Mask):
        return at.xyxy
    if isinstance(at, Point):
        return (*at.xy, *at.xy)
    raise ValueError(f"object {thing.label!r} is a span of time; the form needs a place in the picture")


def _centre(thing: Object) -> tuple[float, float]:
    if isinstance(thing.at, Point):
        return thing.at.xy
    x0, y0, x1, y1 = box_of(thing)
    return (x0 + x1) / 2, (y0 + y1) / 2


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
