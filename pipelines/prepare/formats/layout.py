"""Pages with their layout: {"id", "pages": [{"image", "width", "height", "blocks": [{"type", "bbox", "text",
"html"}]}]}, blocks in reading order; a page's fields may also stand in the entry itself. Types are those of QwenVL
HTML (trainer/data/page.py) or the usual names of layout data sets, mapped by ROLES. `html` is the content of a table,
or of a chart that has one.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.blocks import Block, page_messages
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    each,
    field_of,
    identity_of,
    resolve,
    units_of,
)
from pipelines.prepare.formats.tables import table_html
from trainer.data.page import ROLES as HTML_ROLES
from trainer.recipe import Source

ROLES = {
    **{role: role for role in HTML_ROLES},
    "title": "h1",
    "section-header": "h2",
    "section_header": "h2",
    "heading": "h2",
    "text": "p",
    "paragraph": "p",
    "list": "p",
    "list-item": "li",
    "list_item": "li",
    "caption": "p",
    "footnote": "p",
    "page-header": "p",
    "page-footer": "p",
    "picture": "image caption",
    "figure": "image caption",
    "image": "image caption",
}


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        pages = entry.get("pages") or [entry]
        media = [MediaRef(resolve(media_root, field_of(page, "image")), "image") for page in pages]
        messages = page_messages(
            [[_block(item) for item in field_of(page, "blocks")] for page in pages], source.rendering
        )
        stated = [_size(page) for page in pages]
        meta = {"stated_sizes": stated} if all(stated) else {}
        return Draft(where, identity_of(entry, where), messages, media, units=units_of(entry), meta=meta)

    yield from each(path, one)


def _size(page: dict) -> list | None:
    """Width and height that the boxes are in, where a page states them."""
    width, height = page.get("width"), page.get("height")
    if bool(width) != bool(height):
        raise BadRow("wrong-form", "width and height of a page, or neither", f"{width} and {height}")
    return [width, height] if width else None


def _block(block: dict) -> Block:
    role = str(field_of(block, "type", "category", "label")).lower()
    if role not in ROLES:
        raise BadRow("wrong-form", f"a block type of {', '.join(sorted(ROLES))}", role)
    left, top, right, bottom = map(float, field_of(block, "bbox"))
    content = block.get("text") or ""
    if ROLES[role] in ("table", "chart") and block.get("html"):
        content = table_html(block["html"])
    return Block(ROLES[role], (left, top, right, bottom), content)
