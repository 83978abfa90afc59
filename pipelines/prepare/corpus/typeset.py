"""A small typesetter: blocks of a document on a page, with the exact box of every block.

The boxes are those of the drawn lines, so layout and picture agree by construction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

from pipelines.prepare.corpus.sources import package_folder
from pipelines.prepare.corpus.texts import paragraphs

Role = Literal["h1", "h2", "p", "table", "chart"]
MARGIN = 8
GAP = 6
FONTS: dict[Role, tuple[str, int]] = {
    "h1": ("DejaVuSans-Bold.ttf", 13),
    "h2": ("DejaVuSans-Bold.ttf", 11),
    "p": ("DejaVuSans.ttf", 10),
    "table": ("DejaVuSansMono.ttf", 8),
    "chart": ("DejaVuSans.ttf", 9),
}


@dataclass(frozen=True)
class Block:
    role: Role
    text: str
    """Table: rows separated by newlines, cells by tabs. Chart: what it shows."""
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Laid:
    """A block on a page."""

    block: Block
    box: tuple[int, int, int, int]

    def as_json(self) -> dict:
        found = {"type": self.block.role, "bbox": list(self.box), "text": self.block.text}
        if self.block.role == "table":
            rows = [row.split("\t") for row in self.block.text.splitlines()]
            cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
            found["html"] = "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"
        return found


@cache
def _font(role: Role) -> ImageFont.FreeTypeFont:
    name, size = FONTS[role]
    path = package_folder("matplotlib") / "mpl-data" / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def blocks_of(text: str) -> Iterator[Block]:
    """Headings (markdown, reStructuredText), simple tables and paragraphs of a document, in order."""
    for chunk in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        lines = [line.strip() for line in chunk.strip().splitlines()]
        if not lines:
            continue
        if (table := _table(lines)) is not None:
            yield Block("table", table)
        elif len(lines) == 1 and (found := re.fullmatch(r"(#{1,3}) +([\w ,.:()-]{3,40})", lines[0])):
            yield Block("h1" if len(found[1]) == 1 else "h2", found[2].strip())
        elif len(lines) >= 2 and re.fullmatch(r"[-=~]{3,}", lines[1]) and re.fullmatch(r"[\w ,.:()-]{3,40}", lines[0]):
            yield Block("h1" if lines[1][0] == "=" else "h2", lines[0])
        else:
            for paragraph in paragraphs(chunk):
                yield Block("p", paragraph)


def _table(lines: Sequence[str]) -> str | None:
    """A simple table of reStructuredText as rows of cells; None when the lines are something else."""
    rules = [line for line in lines if re.fullmatch(r"=+( +=+)+", line)]
    if len(rules) < 2:
        return None
    rows = [re.split(r"\s{2,}", line) for line in lines if line and not re.fullmatch(r"[= ]+", line)]
    rows = [[cell.rstrip(":") for cell in row] for row in rows][:7]
    width = max((len(row) for row in rows), default=0)
    if not 2 <= width <= 5 or any(len(row) < width - 1 or not row[0] for row in rows):
        return None
    return "\n".join("\t".join(["", *row] if len(row) < width else row) for row in rows)


def pages_of(blocks: Sequence[Block], width: int, height: int) -> Iterator[tuple[Image.Image, list[Laid]]]:
    """Fill pages one after the other; a block that does not fit begins the next page, or is cut between lines there."""
    page, laid, top = Image.new("RGB", (width, height), "white"), [], MARGIN
    for block in blocks:
        for piece in _pieces(block, width, height):
            tall = _height(piece, width)
            if laid and top + tall > height - MARGIN:
                yield page, laid
                page, laid, top = Image.new("RGB", (width, height), "white"), [], MARGIN
            laid.append(Laid(piece, _draw(page, piece, top)))
            top = laid[-1].box[3] + GAP
    if laid:
        yield page, laid


def _lines(block: Block, width: int) -> list[str]:
    font, room = _font(block.role), width - 2 * MARGIN
    if block.role == "table":
        return [_row(row) for row in block.text.splitlines()]
    found, at = [], ""
    for word in block.text.split():
        longer = f"{at} {word}" if at else word
        if at and font.getlength(longer) > room:
            found.append(at)
            at = word
        else:
            at = longer
    return [*found, at] if at else found


def _row(row: str) -> str:
    cells = row.split("\t")
    return f"{cells[0][:17]:<18}" + "".join(f"{cell[:7]:>8}" for cell in cells[1:])


def _line_height(role: Role) -> int:
    ascent, descent = _font(role).getmetrics()
    return ascent + descent


def _height(block: Block, width: int) -> int:
    caption = len(_lines(block, width)) * _line_height(block.role)
    return caption + (block.picture.height + 2 if block.picture is not None else 0)


def _pieces(block: Block, width: int, height: int) -> Iterator[Block]:
    most = max(1, (height - 2 * MARGIN) // _line_height(block.role))
    lines = _lines(block, width)
    if block.role != "p" or len(lines) <= most:
        yield block
        return
    for start in range(0, len(lines), most):
        yield Block(block.role, " ".join(lines[start : start + most]))


def _draw(page: Image.Image, block: Block, top: int) -> tuple[int, int, int, int]:
    """Draw the block; returns the box of what was drawn."""
    draw, font = ImageDraw.Draw(page), _font(block.role)
    left, right, y = MARGIN, MARGIN + 1, top
    if block.picture is not None:
        page.paste(block.picture, (left, y))
        right, y = left + block.picture.width, y + block.picture.height + 2
    for line in _lines(block, page.width):
        draw.text((left, y), line, fill="black", font=font)
        right = max(right, left + round(font.getlength(line)))
        y += _line_height(block.role)
    return left, top, min(right, page.width), min(y, page.height)
