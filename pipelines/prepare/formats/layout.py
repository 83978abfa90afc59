"""Pages with their layout: {"id", "pages": [{"image", "width", "height", "blocks": [{"type", "bbox", "text",
"html"}]}]}, blocks in reading order; a page's fields may also stand in the entry itself. Types are those of QwenVL
HTML or the usual names of layout data sets (DocLayNet, PubLayNet), mapped by ROLES. `html` is a table's content.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    each,
    field_of,
    identity_of,
    message,
    resolve,
    text,
    units_of,
)
from trainer.recipe import Source

PROMPT = "QwenVL HTML"
ROLES = {
    **{role: role for role in ("p", "h1", "h2", "h3", "h4", "h5", "h6", "table", "chart", "formula", "music sheet")},
    **{role: role for role in ("image caption", "image ocr", "chemical formula")},
    "title": "h1",
    "section-header": "h2",
    "section_header": "h2",
    "heading": "h2",
    "text": "p",
    "paragraph": "p",
    "list": "p",
    "list-item": "p",
    "list_item": "p",
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
        shown = [{"part": "image", "media": number} for number in range(len(pages))]
        written = []
        for number, page in enumerate(pages):
            objects = [_object(block) for block in field_of(page, "blocks")]
            if not objects:
                raise BadRow("no-objects", "at least one block on a page", "none")
            if written:
                written.append(text("\n"))
            written.append({"part": "objects", "media": number, "objects": objects, "form": "html"})
        if source.rendering == "document":
            messages = [message("document", *shown, text(f"{PROMPT}\n"), *written)]
        else:
            messages = [message("user", *shown, text(PROMPT)), message("assistant", *written)]
        meta = {"stated_size": [pages[0].get("width"), pages[0].get("height")]} if pages[0].get("width") else {}
        return Draft(where, identity_of(entry, where), messages, media, units=units_of(entry), meta=meta)

    yield from each(path, one)


def _object(block: dict) -> dict:
    role = str(field_of(block, "type", "category", "label")).lower()
    if role not in ROLES:
        raise BadRow("wrong-form", f"a block type of {', '.join(sorted(ROLES))}", role)
    left, top, right, bottom = map(float, field_of(block, "bbox"))
    if right <= left or bottom <= top:
        raise BadRow("empty-box", "left < right and top < bottom", block["bbox"])
    content = block.get("html") if role == "table" and block.get("html") else block.get("text", "")
    return {
        "label": ROLES[role],
        "at": {"shape": "box", "xyxy": [left, top, right, bottom]},
        "role": ROLES[role],
        "content": content,
    }
