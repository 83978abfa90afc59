"""A page as QwenVL HTML (arXiv 2502.13923, section 2.2): every element carries data-bbox, in reading order.

    <html><body>
    <h1 data-bbox="x1 y1 x2 y2">heading</h1>                            h1 to h6, p
    <ul data-bbox="..."><li data-bbox="...">entry</li>...</ul>
    <table data-bbox="..."><tr><td colspan="2">cell</td></tr></table>
    <div class="chart" data-bbox="..."><img data-bbox="..."/><table>...</table></div>
    <div class="image caption" data-bbox="..."><img data-bbox="..."/><p>words</p></div>      also `image ocr`
    <div class="formula" data-bbox="..."><img data-bbox="..."/><div>LaTeX</div></div>
    <div class="music sheet" format="abc notation" data-bbox="..."><img data-bbox="..."/><div>ABC</div></div>
    <div class="chemical formula" format="smile" data-bbox="..."><img data-bbox="..."/><div>SMILES</div></div>
    </body></html>

Ours, where the report has no words: a list's own box is what its entries cover; a chart without a table has its words
in a <p>; a picture without words is its <img> alone. The report's <style> of a table is not written: no source has one.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from itertools import groupby

from trainer.data.sample import Object

Corners = tuple[float, float, float, float]
BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6")
PICTURES = {
    "image caption": "p",
    "image ocr": "p",
    "chart": "p",
    "formula": "div",
    "music sheet": "div",
    "chemical formula": "div",
}
"""Class of a <div> -> the element that its content stands in."""
FORMATS = {"music sheet": ' format="abc notation"', "chemical formula": ' format="smile"'}
ROLES = (*BLOCKS, "li", "table", *PICTURES)
_TABLE = re.compile(r"<table\b[^>]*>(.*)</table>", re.DOTALL)
_ROWS = re.compile(r"<(?:tr|thead|tbody)\b")


def page_html(objects: Sequence[Object], box_of: Callable[[Object], Corners], write: Callable[[Corners], str]) -> str:
    """`box_of`: an object's place in pixels of the file; `write`: its four numbers in the family's convention.

    Raises ValueError for a role that the format has no words for.
    """
    lines = ["<html><body>"]
    for is_list, group in groupby(objects, lambda thing: thing.role == "li"):
        listed = list(group)
        if not is_list:
            lines += [_element(thing, f'data-bbox="{write(box_of(thing))}"') for thing in listed]
            continue
        left, top, right, bottom = zip(*map(box_of, listed), strict=True)
        lines.append(f'<ul data-bbox="{write((min(left), min(top), max(right), max(bottom)))}">')
        lines += [f'<li data-bbox="{write(box_of(thing))}">{_text(thing.content)}</li>' for thing in listed]
        lines.append("</ul>")
    return "\n".join([*lines, "</body></html>"])


def _element(thing: Object, box: str) -> str:
    role, content = thing.role or "p", thing.content or ""
    if role in BLOCKS:
        return f"<{role} {box}>{_text(content)}</{role}>"
    if role == "table":
        return f"<table {box}>{_rows(content)}</table>"
    if role not in PICTURES:
        raise ValueError(f"no element of QwenVL HTML is called {role!r}; there is {', '.join(ROLES)}")
    inner = PICTURES[role]
    told = f"<{inner}>{_text(content)}</{inner}>" if content else ""
    if role == "chart" and _TABLE.fullmatch(content):
        told = f"<table>{_rows(content)}</table>"
    return f'<div class="{role}"{FORMATS.get(role, "")} {box}><img {box}/>{told}</div>'


def _rows(content: str) -> str:
    """What stands inside <table>: rows as they are (the reader has checked them), or plain text as text."""
    found = _TABLE.fullmatch(content)
    inner = found[1] if found else content
    return inner if not inner or _ROWS.match(inner) else _text(inner)


def _text(content: str | None) -> str:
    return html.escape(content or "", quote=False)
