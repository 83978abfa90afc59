"""PDF documents with a text layer: a page is a sample, drawn at 144 dpi, its blocks found in its text layer
(pdfium's characters with their boxes).

Told, and by what: lines from characters on one base line; reading order by XY-cut (columns included); paragraphs
from the distance of lines and the indent of the first; headings are lines larger than the document's running text, the
largest size h1; li by its mark, a bullet left out; a table where rules close a grid of cells (merged cells are spans);
an image object is a picture without words. Not told, since the file does not say it: tables without rules down (their
text is read as paragraphs), formulas, captions, headings in the size of the text.

Bad rows: no PDF or one with a password (bad-pdf), a page without text (no-text-layer: scans need hOCR), one whose font
does not say what its glyphs mean (no-unicode), and pages mostly right to left (right-to-left: pdfium's order of their
words is not theirs). A blank page is left out and counted (blank-page), and is no fault.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pypdfium2 as pdfium

from pipelines.prepare import pdf_pages
from pipelines.prepare.formats.blocks import Block, page_messages, reading_order, unmarked
from pipelines.prepare.formats.pdf_text import Line, Page, page_of
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, MediaRef, Row, guarded
from trainer import storage
from trainer.errors import DataError, MediaError
from trainer.recipe import Source

HEADING = 1.12
"""Times the running text's size."""
HEADING_CHARS = 200
COLUMN_GAP = 1.0
"""What is free between columns, in heights of a line."""
UNKNOWN_SHARE = 0.01
_MARK = re.compile(r"^(?:[•◦▪‣·●○■□*–—-]|\(?(?:\d{1,3}|[a-zA-Z])[.)]|\[\d{1,3}\])\s+\S")


KIND, RENDERING = "document", "document"


def looks(peek: Peek) -> str | None:
    return "a PDF" if peek.holds == "pdf" else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    try:
        pages = list(_pages(path))
    except MediaError as error:
        yield Bad(path, str(error.expected), f"{error.what}: {error.got}", "bad-pdf")
        return
    body, levels = _sizes([page for page in pages if isinstance(page, Page)])

    def one(entry: dict, where: str) -> Draft:
        page, number = entry["page"], entry["number"]
        if isinstance(page, MediaError):
            raise BadRow("bad-pdf", "a whole page", f"{page.what}: {page.got}")
        _check(page)
        blocks = blocks_of(page, body, levels)
        messages = page_messages([blocks], source.rendering)
        media = [MediaRef(pdf_pages.address(path, number), "image")]
        return Draft(where, f"{path.rpartition('/')[2]}#page={number}", messages, media)

    for number, page in enumerate(pages, 1):
        yield guarded(f"{path}, page {number}", one, {"page": page, "number": number})


def _pages(path: str) -> Iterator[Page | MediaError]:
    """Every page, or why it cannot be read. Raises DataError, and MediaError for the document as a whole."""
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise DataError("no such annotation file", where=path, do="check the path of the source") from None
    with pdf_pages.LOCK:
        document = pdf_pages.open_document(data, path)
        try:
            found = [_page(document, number, path) for number in range(1, len(document) + 1)]
        finally:
            document.close()
    yield from found


def _page(document: pdfium.PdfDocument, number: int, path: str) -> Page | MediaError:
    try:
        return page_of(pdf_pages.page_of(document, number, path))
    except MediaError as error:
        return error
    except pdfium.PdfiumError as error:
        return MediaError("a page that cannot be read", where=pdf_pages.address(path, number), got=error)


def _check(page: Page) -> None:
    text = "".join(line.text for line in page.lines)
    if page.blank:
        raise BadRow("blank-page", "a page with something to be seen", "one colour", fault=False)
    if not text.strip():
        raise BadRow("no-text-layer", "a page with a text layer", "no characters")
    if page.unknown > UNKNOWN_SHARE * (len(text) + page.unknown):
        raise BadRow("no-unicode", "fonts that say which characters their glyphs are", f"{page.unknown} glyphs do not")
    classes = Counter(unicodedata.bidirectional(char) for char in text)
    if classes["R"] + classes["AL"] > classes["L"]:
        raise BadRow(
            "right-to-left", "a page written left to right", f"{classes['R'] + classes['AL']} letters from the right"
        )


def _sizes(pages: Sequence[Page]) -> tuple[float, dict[float, str]]:
    """Size of the running text (the one of most characters) and the heading of every larger size."""
    chars: Counter[float] = Counter()
    for page in pages:
        for line in page.lines:
            chars[line.size] += len(line.text)
    if not chars:
        return 0.0, {}
    body = max(chars, key=lambda size: (chars[size], -size))
    larger = sorted((size for size in chars if size > HEADING * body), reverse=True)
    return body, {size: f"h{min(place, 6)}" for place, size in enumerate(larger, 1)}


def blocks_of(page: Page, body: float, levels: dict[float, str]) -> list[Block]:
    """Blocks of one page in reading order. `body`: size of the running text; `levels`: heading of the larger sizes."""
    inside = [(table, [line for line in page.lines if table.holds(line.box)]) for table in page.tables]
    taken = {id(line) for _, lines in inside for line in lines}
    free = [line for line in page.lines if id(line) not in taken]
    units: list[Line | Block] = list(free)
    units += [Block("table", table.box, table.html(lines)) for table, lines in inside if lines]
    units += [Block("image caption", box) for box in page.pictures]
    order = reading_order([unit.box for unit in units], gap=COLUMN_GAP * body)
    found: list[Block] = []
    run: list[Line] = []
    space = _usual_space(free)
    for at in order:
        unit = units[at]
        if isinstance(unit, Line) and (not run or _goes_on(run, unit, space)):
            run.append(unit)
            continue
        if run:
            found.append(_block(run, levels))
        run = [unit] if isinstance(unit, Line) else []
        if isinstance(unit, Block):
            found.append(unit)
    return [*found, _block(run, levels)] if run else found


def _usual_space(lines: Sequence[Line]) -> float:
    """Between a line and the next below it, as a share of the line's height: the most frequent."""
    spaces = Counter(
        round((below.box[1] - above.box[3]) / above.height, 1)
        for above, below in pairwise(lines)
        if above.size == below.size and below.box[1] > above.box[1] and above.overlaps(below)
    )
    return max(spaces, key=lambda space: (spaces[space], -space)) if spaces else 0.2


def _goes_on(run: Sequence[Line], line: Line, space: float) -> bool:
    """Whether a line belongs to the paragraph so far."""
    last = run[-1]
    if line.size != last.size or line.turned or last.turned or not last.overlaps(line) or _MARK.match(line.text):
        return False
    between = (line.box[1] - last.box[3]) / last.height
    if not -0.9 < between <= space + 0.35:
        return False
    indented = line.box[0] > min(item.box[0] for item in run) + 0.8 * line.height
    return not indented or bool(_MARK.match(run[0].text))


def _block(run: Sequence[Line], levels: dict[float, str]) -> Block:
    text = " ".join(line.text for line in run)
    lefts, tops, rights, bottoms = zip(*(line.box for line in run), strict=True)
    role = levels.get(run[0].size, "p") if len(text) <= HEADING_CHARS else "p"
    if role == "p" and _MARK.match(text):
        role, text = "li", unmarked(text)
    return Block(role, (min(lefts), min(tops), max(rights), max(bottoms)), text)
