"""Tables as HTML: of a source that has HTML, checked and brought into one form; or from cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser

from pipelines.prepare.formats.rows import BadRow

LARGEST = 1000
"""Rows or columns that one cell may span, as browsers have it for columns."""


@dataclass
class Cell:
    content: str = ""
    rows: int = 1
    columns: int = 1
    heading: bool = False


def cells_html(rows: Sequence[Sequence[Cell]]) -> str:
    """<table><tr><td rowspan= colspan=>text</td></tr></table>. Raises BadRow when cells lie on each other."""
    check_spans(rows)
    return "<table>" + "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows) + "</table>"


def _cell(cell: Cell) -> str:
    tag = "th" if cell.heading else "td"
    spans = "".join(f' {name}="{n}"' for name, n in (("rowspan", cell.rows), ("colspan", cell.columns)) if n > 1)
    return f"<{tag}{spans}>{escape(' '.join(cell.content.split()), quote=False)}</{tag}>"


def check_spans(rows: Sequence[Sequence[Cell]]) -> None:
    """Places cells as a browser does. Raises BadRow: two cells in one place, or a span below the last row."""
    taken: set[tuple[int, int]] = set()
    if not any(rows):
        raise BadRow("broken-table", "at least one cell", "none")
    for down, row in enumerate(rows):
        across = 0
        for cell in row:
            while (down, across) in taken:
                across += 1
            places = {(down + y, across + x) for y in range(cell.rows) for x in range(cell.columns)}
            if places & taken or down + cell.rows > len(rows):
                raise BadRow(
                    "broken-table", f"spans within {len(rows)} rows, no two cells in one place",
                    f"row {down + 1}: {cell.content[:40]!r} over {cell.rows} rows and {cell.columns} columns",
                )  # fmt: skip
            taken |= places


def table_html(value: str) -> str:
    """A table in HTML in our form: rows of cells with their text and spans; styles and inner marks go, text stays.

    Raises:
        BadRow: not one table, a table in a table, text outside its cells, or spans that do not go together.
    """
    parser = _Rows()
    parser.feed(value)
    parser.close()
    if parser.cell is not None or parser.stray:
        raise BadRow("broken-table", "one table whose text stands in closed cells", parser.stray or "an open cell")
    return cells_html(parser.rows)


class _Rows(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[list[Cell]] = []
        self.cell: Cell | None = None
        self.tables = 0
        self.stray = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables += 1
            if self.tables > 1:
                self.stray = self.stray or "a second <table>"
        elif tag == "tr":
            self.cell = None  # </td> and </tr> may be left out
            self.rows.append([])
        elif tag in ("td", "th"):
            if not self.rows:
                self.rows.append([])
            named = dict(attrs)
            self.cell = Cell("", _span(named.get("rowspan")), _span(named.get("colspan")), tag == "th")
            self.rows[-1].append(self.cell)
        elif tag in ("br", "p", "div", "li") and self.cell is not None:
            self.cell.content += " "

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr", "table"):
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.content += data
        elif data.strip():
            self.stray = self.stray or f"text outside of cells: {data.strip()[:40]!r}"


def _span(value: str | None) -> int:
    count = int(value or 1)  # what is no number is caught with the row: wrong-form
    if not 1 <= count <= LARGEST:
        raise BadRow("broken-table", f"spans of 1 to {LARGEST}", value)
    return count
