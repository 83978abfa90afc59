"""What stands on a page of a PDF: lines of characters, grids of rules, images, all in pixels of the page's picture."""

from __future__ import annotations

import ctypes
import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pypdfium2 as pdfium
import pypdfium2.raw as raw

from pipelines.prepare.formats.blocks import Box
from pipelines.prepare.formats.pdf_tables import Table, tables_of
from pipelines.prepare.pdf_pages import SCALE
from trainer.data import media

BREAK = 1.5
"""Blank between two characters that ends a line, in heights: columns and cells lie side by side."""
SMALL = 0.01
LARGE = 0.9
"""Of the page's area: image objects below are ornaments, above the scan behind a text layer."""
FINE = 16
"""pdfium answers in whole pixels of a device: one this many times finer."""
HYPHEN = "\x02"
"""pdfium's sign for a hyphen at the end of a line whose word goes on."""


@dataclass
class Line:
    text: str = ""
    box: Box = (0.0, 0.0, 0.0, 0.0)
    chars: list[tuple[str, Box]] = field(default_factory=list)
    turned: bool = False

    @property
    def height(self) -> float:
        return self.box[3] - self.box[1]

    @property
    def size(self) -> float:
        """Height of its tallest character, to the half pixel: what lines of one font size share."""
        axis = 0 if self.turned else 1
        return round(2 * max(box[axis + 2] - box[axis] for _, box in self.chars)) / 2

    def overlaps(self, other: Line) -> bool:
        """Whether the two share some width."""
        return min(self.box[2], other.box[2]) > max(self.box[0], other.box[0])


@dataclass(frozen=True)
class Page:
    lines: list[Line]
    tables: list[Table]
    pictures: list[Box]
    unknown: int
    """Glyphs that stand for no known character."""
    blank: bool = False
    """Nothing is to be seen on it."""


def page_of(page: pdfium.PdfPage) -> Page:
    """Call with pdf_pages.LOCK held; closes the page."""
    place = _Places(page)
    textpage = page.get_textpage()
    lines, unknown = _lines(textpage, place)
    textpage.close()
    rules: list[Box] = []
    pictures: list[Box] = []
    for thing in page.get_objects(max_depth=1):
        box, kind = place.box(*thing.get_bounds()), raw.FPDFPageObj_GetType(thing.raw)
        if kind == raw.FPDF_PAGEOBJ_PATH:
            rules += _rules(thing, box)
        elif kind == raw.FPDF_PAGEOBJ_IMAGE:
            share = (box[2] - box[0]) * (box[3] - box[1]) / (place.width * place.height)
            pictures += [box] * (SMALL <= share <= LARGE)
    blank = not unknown and not any(line.text.strip() for line in lines) and _is_blank(page, place)
    page.close()
    return Page(lines, tables_of(rules), pictures, unknown, blank)


def _is_blank(page: pdfium.PdfPage, place: _Places) -> bool:
    """Whether the page's picture is of one colour; one that is too large to be drawn is not looked at."""
    if place.width * place.height > media.MAX_PIXELS:
        return False
    picture = page.render(scale=1).to_pil().convert("RGB")
    return all(low == high for low, high in picture.getextrema())  # type: ignore[misc]  # of three bands


class _Places:
    """Points of the page (its own unit, origin below) -> pixels of its picture; crop box and rotation applied."""

    def __init__(self, page: pdfium.PdfPage):
        self.page = page
        self.width, self.height = (side * SCALE for side in page.get_size())
        self.rotation = math.radians(page.get_rotation())
        self.device = (round(self.width * FINE), round(self.height * FINE))

    def box(self, left: float, bottom: float, right: float, top: float) -> Box:
        (x0, y0), (x1, y1) = self._point(left, top), self._point(right, bottom)
        return (
            max(min(x0, x1), 0.0),
            max(min(y0, y1), 0.0),
            min(max(x0, x1), self.width),
            min(max(y0, y1), self.height),
        )

    def _point(self, x: float, y: float) -> tuple[float, float]:
        across, down = ctypes.c_int(), ctypes.c_int()
        raw.FPDF_PageToDevice(self.page.raw, 0, 0, *self.device, 0, x, y, across, down)
        return across.value / FINE, down.value / FINE


def _lines(textpage: pdfium.PdfTextPage, place: _Places) -> tuple[list[Line], int]:
    lines: list[Line] = []
    unknown = 0
    line = Line()
    for char, box, turned in _characters(textpage, place):
        if char in "\r\n":
            line = Line()
        elif box is None:
            line.chars += [(" ", line.chars[-1][1])] if line.chars and line.chars[-1][0] != " " else []
        elif _unreadable(char):
            unknown += 1
        elif box[0] < box[2] and box[1] < box[3]:  # what lies outside the crop box has no area
            if line.chars and _breaks(line, box, turned):
                line = Line()
            if not line.chars:
                line.turned = turned
                lines.append(line)
            line.chars.append((char, box))
    for found in lines:
        found.text = " ".join("".join(char for char, _ in found.chars).split())
        lefts, tops, rights, bottoms = zip(*(box for _, box in found.chars), strict=True)
        found.box = (min(lefts), min(tops), max(rights), max(bottoms))
    return [found for found in lines if found.text], unknown


def _characters(textpage: pdfium.PdfTextPage, place: _Places) -> Iterator[tuple[str, Box | None, bool]]:
    """(character, its box or None for a blank, whether it is turned)."""
    rect = raw.FS_RECTF()
    for at in range(textpage.count_chars()):
        code = raw.FPDFText_GetUnicode(textpage.raw, at)
        char = "-" if chr(code) == HYPHEN else chr(code)
        if char in "\r\n" or char.isspace():
            yield ("\n" if char in "\r\n" else " "), None, False
            continue
        raw.FPDFText_GetLooseCharBox(textpage.raw, at, rect)
        angle = raw.FPDFText_GetCharAngle(textpage.raw, at) - place.rotation  # 0: upright as the page is shown
        turned = abs(math.remainder(angle, 2 * math.pi)) > 0.1
        yield char, place.box(rect.left, rect.bottom, rect.right, rect.top), turned


def _unreadable(char: str) -> bool:
    return char in "\x00\ufffd\ufffe" or unicodedata.category(char) in ("Co", "Cs", "Cn", "Cc")


def _breaks(line: Line, box: Box, turned: bool) -> bool:
    """Whether a character begins another line than the one so far."""
    last = line.chars[-1][1]
    height = max(last[3] - last[1], box[3] - box[1])
    if turned or line.turned:
        return turned != line.turned
    apart = abs((last[1] + last[3]) - (box[1] + box[3])) / 2
    return apart > 0.6 * height or box[0] - last[2] > BREAK * height or box[0] < last[0] - height


def _rules(thing: Any, box: Box) -> Sequence[Box]:
    """The straight edges of a path: a thin one is a rule, a stroked rectangle has four."""
    if min(box[2] - box[0], box[3] - box[1]) <= 2 * SCALE:
        return [box]
    fill, stroke = ctypes.c_int(), ctypes.c_int()
    raw.FPDFPath_GetDrawMode(thing.raw, fill, stroke)
    if not stroke.value or raw.FPDFPath_CountSegments(thing.raw) not in (4, 5):
        return []
    left, top, right, bottom = box
    return [
        (left, top, right, top),
        (left, bottom, right, bottom),
        (left, top, left, bottom),
        (right, top, right, bottom),
    ]
