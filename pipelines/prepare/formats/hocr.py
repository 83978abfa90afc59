"""hOCR (kba.github.io/hocr-spec/1.2), as Tesseract writes it: HTML in which `title="bbox x0 y0 x1 y1"` says
where a page (ocr_page), a block, a paragraph (ocr_par), a line (ocr_line) and a word (ocrx_word) is. A page is a
sample, its picture the `image` of its title (below the media folder, by its name), in the order of the file, which by
the specification is the reading order.

A paragraph is p; one whose lines are all ocr_header, ocr_caption, ocr_footer or ocr_textfloat is p as well, since the
data do not say which heading it is; a block ocr_photo, ocr_image or ocr_linedrawing is a picture without words. Words
are joined by one blank, lines too, hyphens at their ends stay: nothing is guessed. A line outside of every paragraph is
a block of its own, as is a word outside of every line. Paragraphs without words are noise
of the recogniser (Tesseract writes them for rules and stains) and left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

from pipelines.prepare.formats.blocks import Block, Box, page_messages
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import BadRow, Draft, MediaRef, Row, guarded, read_text, resolve
from trainer.recipe import Source

LINES = ("ocr_line", "ocrx_line", "ocr_header", "ocr_caption", "ocr_footer", "ocr_textfloat")
WORD = "ocrx_word"
PICTURES = ("ocr_photo", "ocr_image", "ocr_linedrawing")
_BOX = re.compile(r"\bbbox\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)\s+(-?\d+)")
_IMAGE = re.compile(r"""\bimage\s+(?:"([^"]*)"|'([^']*)'|([^;]+))""")
VOID = ("br", "hr", "img", "meta", "link", "input", "col", "wbr")


@dataclass
class _Node:
    kind: str
    title: str
    lines: list[list[str]] = field(default_factory=list)
    children: list[_Node] = field(default_factory=list)


KIND, RENDERING = "document", "document"


def looks(peek: Peek) -> str | None:
    return "pages of class ocr_page" if peek.holds == "hocr" else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        page: _Node = entry["page"]
        named = _IMAGE.search(page.title)
        if named is None:
            raise BadRow("wrong-form", 'a page with title="image FILE; bbox ..."', repr(page.title))
        image = next(filter(None, named.groups())).strip().replace("\\", "/").rpartition("/")[2]
        left, top, right, bottom = _box(page)
        if (left, top) != (0, 0):
            raise BadRow("wrong-form", "a page whose box begins at 0 0", page.title)
        blocks = [_block(node) for node in page.children if node.kind in PICTURES or any(node.lines)]
        messages = page_messages([blocks], source.rendering)
        media = [MediaRef(resolve(media_root, image), "image")]
        return Draft(
            where,
            f"{path.rpartition('/')[2]}#{entry['number']}",
            messages,
            media,
            meta={"stated_size": [right, bottom]},
        )

    parser = _Pages()
    parser.feed(read_text(path))
    parser.close()
    if not parser.pages:
        yield guarded(path, _no_page, {})
    for number, page in enumerate(parser.pages, 1):
        yield guarded(f"{path}, page {number}", one, {"page": page, "number": number})


def _no_page(entry: dict, where: str) -> Draft:
    raise BadRow("wrong-form", "hOCR: at least one element of class ocr_page", "none")


def _block(node: _Node) -> Block:
    if node.kind in PICTURES:
        return Block("image caption", _box(node))
    return Block("p", _box(node), " ".join(" ".join(words) for words in node.lines if words))


def _box(node: _Node) -> Box:
    found = _BOX.search(node.title)
    if found is None:
        raise BadRow("wrong-form", "a title with bbox x0 y0 x1 y1", f"{node.kind}: {node.title!r}")
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom


class _Pages(HTMLParser):
    """Pages with their paragraphs and pictures. Text counts inside of a paragraph, or of a line or word that lies in
    none."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pages: list[_Node] = []
        self.open: list[str] = []
        """Class of every open element."""
        self.par: int | None = None
        """Depth at which the open block of text lies: a paragraph, or what has none around it."""
        self.block = _Node("", "")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in VOID:
            return
        named = {name: value or "" for name, value in attrs}
        kind = next((name for name in named.get("class", "").split() if name.startswith("ocr")), "")
        self.open.append(kind)
        if kind == "ocr_page":
            self.pages.append(_Node(kind, named.get("title", "")))
        elif self.pages and kind in PICTURES:
            self.pages[-1].children.append(_Node(kind, named.get("title", "")))
        elif self.pages and (kind == "ocr_par" or (self.par is None and kind in (*LINES, WORD))):
            lines: list[list[str]] = [] if kind == "ocr_par" else [[]]
            self.block = _Node(kind, named.get("title", ""), lines)
            self.pages[-1].children.append(self.block)
            self.par = len(self.open)
        elif self.par is not None and kind in LINES:
            self.block.lines.append([])

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID or not self.open:
            return
        if self.par == len(self.open):
            self.par = None
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.par is None or not data.strip():
            return
        if not self.block.lines:
            self.block.lines.append([])
        self.block.lines[-1] += data.split()
