"""Page layouts in COCO's form with their text: DocLayNet (arXiv 2206.01062), PubLayNet (arXiv 1908.07836) and alike:
one object of images, annotations and categories; one sample a page.

A block's text is the annotation's `text` (a table's `html`), or comes from the page's text cells, as DocLayNet's extra
part has them: JSON/NAME.json beside the folder of the pictures (or NAME.json beside the picture), {"metadata":
{"coco_width", "original_width", ...}, "cells": [{"bbox": [left, top, width, height], "text"}]}. A cell belongs to the
smallest block that holds its centre. Cells are in the frame, COCO's or the original page's, in which more of them lie
in blocks. PubLayNet has no text at all: read it as `coco`, for boxes; here its pages are bad rows.

Reading order is found by blocks.reading_order. A table from cells has its words as text: cells say nothing of rows. A
formula from cells is located without words, since its glyphs are not LaTeX. An annotation with `precedence` above 0 is
another annotator's of the same page (DocLayNet), and left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from pipelines.prepare.formats.blocks import Block, Box, page_messages, reading_order, unmarked
from pipelines.prepare.formats.coco_file import CocoFile, coco_file
from pipelines.prepare.formats.layout import ROLES
from pipelines.prepare.formats.peek import Peek
from pipelines.prepare.formats.rows import (
    BadRow,
    Draft,
    MediaRef,
    Row,
    check_sound,
    field_of,
    guarded,
    json_document,
    resolve,
)
from pipelines.prepare.formats.tables import table_html
from trainer import storage
from trainer.recipe import Rendering, Source

SILENT = ("image caption", "formula")
"""Roles that may stand without words: the block is located, nothing is claimed about what it says."""
GAP = 0.01
"""Of the page's width: what has to be free between columns."""


@dataclass(frozen=True)
class _Cell:
    box: Box
    text: str


KIND, RENDERING = "document", "document"


def looks(peek: Peek) -> str | None:
    """COCO whose categories are parts of pages: `coco` takes it as well, for boxes alone, so a person has to say."""
    if peek.holds != "object" or not peek.all("images", "annotations", "categories"):
        return None
    names = [str(item.get("name")).lower() for item in peek.first("categories") if isinstance(item, dict)]
    return "categories of page layouts" if names and set(names) <= ROLES.keys() else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    with coco_file(path) as found:
        yield from found.faults
        found.names = {category: name.lower() for category, name in found.names.items()}
        yield from found.strangers()
        one = partial(_draft, found=found, media_root=media_root, rendering=source.rendering)
        for where, image in found.images():
            yield guarded(where, one, image)


def _draft(image: dict, where: str, found: CocoFile, media_root: str, rendering: Rendering) -> Draft:
    uri = resolve(media_root, field_of(image, "file_name"))
    size = (float(field_of(image, "width")), float(field_of(image, "height")))
    every = found.annotations(image["id"])
    mine = [one for one in every if not one.get("iscrowd") and not one.get("precedence")]
    for annotation in mine:
        check_sound(annotation)
    outlines = [_outline(annotation, found.names) for annotation in mine]
    needs = [role not in SILENT and not said for role, _, said in outlines]
    texts = _texts([box for _, box, _ in outlines], _cells(uri), size) if any(needs) else [""] * len(outlines)
    blocks = []
    for (role, box, said), cells in zip(outlines, texts, strict=True):
        content = said or ("" if role == "formula" else cells)
        if not content and role not in SILENT:
            raise BadRow("no-text", f"text of the {role} at {[round(v) for v in box]}", "none in its cells or `text`")
        blocks.append(Block(role, box, unmarked(content) if role == "li" else content))
    order = reading_order([block.box for block in blocks], gap=GAP * size[0])
    messages = page_messages([[blocks[at] for at in order]], rendering)
    return Draft(where, str(image["id"]), messages, [MediaRef(uri, "image")], meta={"stated_size": list(size)})


def _outline(annotation: dict, names: dict) -> tuple[str, Box, str]:
    """(role, box, own text) of an annotation."""
    name = names.get(annotation.get("category_id"), annotation.get("category_id"))
    if name not in ROLES:
        raise BadRow("wrong-form", f"a category of {', '.join(sorted(ROLES))}", name)
    left, top, width, height = map(float, field_of(annotation, "bbox"))
    own = str(annotation.get("text") or "")
    if ROLES[name] == "table" and annotation.get("html"):
        own = table_html(annotation["html"])
    return ROLES[name], (left, top, left + width, top + height), own


def _cells(uri: str) -> dict:
    """The page's JSON of cells. Raises BadRow when there is none."""
    folder, _, name = uri.rpartition("/")
    stem = name.rpartition(".")[0]
    tried = [f"{folder.rpartition('/')[0]}/JSON/{stem}.json", f"{folder}/{stem}.json"]
    for place in tried:
        if storage.exists(place):
            return json_document(place)
    raise BadRow("no-text", f"`text` in the annotations, or the page's cells: {' or '.join(tried)}", "neither")


def _texts(boxes: list[Box], page: dict, size: tuple[float, float]) -> list[str]:
    """The text of every block, from the cells of the page."""
    facts = field_of(page, "metadata")
    best: list[list[_Cell]] = []
    for frame in ("coco", "original"):
        scale = (size[0] / field_of(facts, f"{frame}_width"), size[1] / field_of(facts, f"{frame}_height"))
        placed: list[list[_Cell]] = [[] for _ in boxes]
        for cell in field_of(page, "cells"):
            left, top, width, height = map(float, cell["bbox"])
            box = (left * scale[0], top * scale[1], (left + width) * scale[0], (top + height) * scale[1])
            owner = _owner(boxes, (box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            if owner is not None and str(cell["text"]).strip():
                placed[owner].append(_Cell(box, str(cell["text"]).strip()))
        if sum(map(len, placed)) > sum(map(len, best)):
            best = placed
    return [_joined(cells) for cells in best] if best else [""] * len(boxes)


def _owner(boxes: list[Box], x: float, y: float) -> int | None:
    holding = [
        ((box[2] - box[0]) * (box[3] - box[1]), at)
        for at, box in enumerate(boxes)
        if box[0] <= x <= box[2] and box[1] <= y <= box[3]
    ]
    return min(holding)[1] if holding else None


def _joined(cells: list[_Cell]) -> str:
    """Cells as text: those whose centres lie within half a height of each other are one line."""
    lines: list[list[_Cell]] = []
    for cell in sorted(cells, key=lambda item: item.box[1] + item.box[3]):
        middle, height = (cell.box[1] + cell.box[3]) / 2, cell.box[3] - cell.box[1]
        last = lines[-1][-1] if lines else None
        if last is not None and abs((last.box[1] + last.box[3]) / 2 - middle) <= height / 2:
            lines[-1].append(cell)
        else:
            lines.append([cell])
    return " ".join(cell.text for line in lines for cell in sorted(line, key=lambda item: item.box[0]))
