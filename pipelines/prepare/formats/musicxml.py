"""MusicXML scores (score-partwise, plain or packed as .mxl): a page is a sample, drawn by verovio (scores/draw.py), its
text the ABC of that page (scores/score.py says what of MusicXML is read), a line for each system.

Bad rows: what is no score (bad-xml, bad-score, wrong-form), an element that ABC cannot express, named with its bar
(unsupported), a character without glyph (no-glyph). They are the whole file's; only a slur or wedge that goes from one
page to the next is one page's.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.blocks import Block, page_messages
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import BadRow, Draft, MediaRef, Row, guarded
from pipelines.prepare.scores import draw
from pipelines.prepare.scores.abc import abc_of
from pipelines.prepare.scores.address import address
from pipelines.prepare.scores.score import Score, read_score
from trainer import storage
from trainer.errors import DataError
from trainer.recipe import Source

KIND, RENDERING = "document", "document"


def looks(peek: Peek) -> str | None:
    if peek.holds == "xml" and peek.names and peek.names[0].startswith("score-"):
        return f"XML of {peek.names[0]}"
    return "MusicXML" if peek.holds == "musicxml" else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise DataError("no such annotation file", where=path, do="check the path of the source") from None
    found: list[tuple[Score, list[draw.Page]]] = []

    def whole(entry: dict, where: str) -> Draft:
        root = draw.score_xml(data)
        score, pages = read_score(root), draw.pages_of(root)
        drawn = sum(sum(page.systems) for page in pages)
        if drawn != score.num_bars:
            raise BadRow("bad-score", f"{score.num_bars} bars, as the score has", f"{drawn} in the picture")
        found.append((score, pages))
        return page(1)

    def page(number: int) -> Draft:
        (score, pages), shown = found[0], found[0][1][number - 1]
        first = sum(sum(before.systems) for before in pages[: number - 1])
        box = tuple(map(float, shown.ink))
        block = Block("music sheet", box, abc_of(score, shown.systems, first))  # type: ignore[arg-type]
        media = [MediaRef(address(path, number), "image")]
        name = f"{path.rpartition('/')[2]}#score={number}"
        return Draft(f"{path}, page {number}", name, page_messages([[block]], source.rendering), media)

    yield guarded(f"{path}, page 1", whole, {})
    for number in range(2, len(found[0][1]) + 1 if found else 0):
        yield guarded(f"{path}, page {number}", lambda entry, where: page(entry["number"]), {"number": number})
