"""Blocks of a page: what every reader of pages makes, and becomes a conversation or a document in QwenVL HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.prepare.formats.rows import BadRow, message, text
from trainer.data.page import ROLES
from trainer.recipe import Rendering

PROMPT = "QwenVL HTML"
Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the page's picture."""


BULLETS = "•◦▪‣·●○■□"


def unmarked(content: str) -> str:
    """The text of a list's entry without the bullet, which <li> stands for. Numbers and letters stay: they say more."""
    return content[1:].lstrip() if content[:1] in BULLETS and content[1:].strip() else content


@dataclass(frozen=True)
class Block:
    role: str
    """Of trainer/data/page.py."""
    box: Box
    content: str = ""
    """Plain text; of a table (or a chart) `<table>...</table>`."""

    def as_object(self) -> dict:
        assert self.role in ROLES, self.role
        if self.box[0] >= self.box[2] or self.box[1] >= self.box[3]:
            got = ", ".join(f"{value:g}" for value in self.box)
            raise BadRow("empty-box", "left < right and top < bottom", f"[{got}]")
        at = {"shape": "box", "xyxy": list(self.box)}
        return {"label": self.role, "at": at, "role": self.role, "content": self.content}


def page_messages(pages: Sequence[Sequence[Block]], rendering: Rendering) -> list[dict]:
    """Pictures of all pages, then all pages as HTML. Media are the pages in their order.

    Raises:
        BadRow: a page without blocks, or a block without area.
    """
    shown = [{"part": "image", "media": number} for number in range(len(pages))]
    written: list[dict] = []
    for number, blocks in enumerate(pages):
        objects = [block.as_object() for block in blocks]
        if not objects:
            raise BadRow("no-objects", "at least one block on a page", f"none on page {number + 1}")
        if written:
            written.append(text("\n"))
        written.append({"part": "objects", "media": number, "objects": objects, "form": "html"})
    if rendering == "document":
        return [message("document", *shown, text(f"{PROMPT}\n"), *written)]
    return [message("user", *shown, text(PROMPT)), message("assistant", *written)]


# ---------------------------------------------------------------- reading order


def reading_order(boxes: Sequence[Box], *, gap: float) -> list[int]:
    """Indices in reading order by recursive XY-cut (Nagy and Seth 1984). Where `gap` pixels are free from top to bottom
    the left part is read before the right. What crosses the columns (a title, a figure) is cut off first, so that the
    columns below or above it are whole; what cannot be cut is read by its top, then its left.

    Left to right: a right-to-left page needs its order stated by its source.
    """
    found: list[int] = []
    open_parts = [list(range(len(boxes)))]
    while open_parts:
        among = open_parts.pop()
        strip = _column(boxes, among, gap)
        axis = 0
        if strip is None:
            strip, axis = _row(boxes, among, gap), 1
        if strip is None:
            found += sorted(among, key=lambda at: (boxes[at][1], boxes[at][0]))
            continue
        first, rest = _parts(boxes, among, axis, strip)
        open_parts += [rest, first]
    return found


def _parts(boxes: Sequence[Box], among: Sequence[int], axis: int, strip: float) -> tuple[list[int], list[int]]:
    """What ends before the strip, and the rest."""
    first = [at for at in among if boxes[at][axis + 2] <= strip]
    chosen = set(first)
    return first, [at for at in among if at not in chosen]


def _column(boxes: Sequence[Box], among: Sequence[int], gap: float) -> float | None:
    """Where the widest strip of `gap` or more begins that nothing crosses from top to bottom."""
    wide = [(width, start) for width, start in _strips(boxes, among, 0) if width >= gap]
    return max(wide)[1] if wide else None


def _row(boxes: Sequence[Box], among: Sequence[int], gap: float) -> float | None:
    """Where a strip from left to right begins: the lowest above which there are columns, else the topmost."""
    starts = [start for _, start in _strips(boxes, among, 1)]
    for start in reversed(starts):
        if _column(boxes, _parts(boxes, among, 1, start)[0], gap) is not None:
            return start
    return starts[0] if starts else None


def _strips(boxes: Sequence[Box], among: Sequence[int], axis: int) -> list[tuple[float, float]]:
    """(width, where it begins) of every strip that no box crosses, in order."""
    spans = sorted((boxes[at][axis], boxes[at][axis + 2]) for at in among)
    found: list[tuple[float, float]] = []
    end = spans[0][1] if spans else 0.0
    for start, stop in spans[1:]:
        if start >= end:
            found.append((start - end, end))
        end = max(end, stop)
    return found
