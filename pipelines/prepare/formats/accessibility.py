"""Accessibility trees of desktops as OSWorld (arXiv 2404.07972) stores them: one XML file a screen, made from AT-SPI or
UI Automation; the tag is the role, `name` the name, and `screencoord="(x, y)"`, `size="(w, h)"`, `visible`, `showing`
stand in name spaces that differ by system and are not looked at. The screenshot has the same name beside it. Becomes a
caption of the screen and the place of every element (elements.py).

The screen's size is that of the root where it states one, else of the largest window; coordinates are pixels of it.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from pipelines.prepare.formats.elements import Element, screen_draft, screenshot_of, visible, xml_tree
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, Row, guarded
from trainer.recipe import Source

PAIR = re.compile(r"\(\s*(-?\d+(?:\.\d+)?)\s*,\s*(-?\d+(?:\.\d+)?)\s*\)")
ROLES = {
    "push-button": "button", "button": "button", "toggle-button": "switch", "check-box": "checkbox",
    "radio-button": "radio button", "entry": "input", "edit": "input", "password-text": "input",
    "combo-box": "drop-down list", "link": "link", "hyperlink": "link", "menu": "menu", "menu-item": "menu item",
    "check-menu-item": "menu item", "radio-menu-item": "menu item", "page-tab": "tab", "tab-item": "tab",
    "list-item": "list item", "tree-item": "list item", "table-cell": "cell", "slider": "slider", "label": "text",
    "text": "text", "static": "text", "heading": "heading", "paragraph": "text", "icon": "icon", "image": "image",
}  # fmt: skip
"""AT-SPI and UI Automation roles that people see as one element; windows, panels and other containers are none."""


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        tree = entry["tree"]
        width, height = _screen(tree)
        found = (_element(node) for node in tree.iter())
        shown = visible((item for item in found if item is not None), width, height)
        return screen_draft(where, path.rpartition("/")[2], screenshot_of(path, media_root), shown, (width, height))

    tree = xml_tree(path)
    yield tree if isinstance(tree, Bad) else guarded(path, one, {"tree": tree})


def _element(node: ET.Element) -> Element | None:
    facts = _facts(node)
    role = ROLES.get(node.tag)
    if role is None or facts.get("showing", "true") != "true" or facts.get("visible", "true") != "true":
        return None
    box = _box(facts)
    secret = node.tag == "password-text"
    name = facts.get("name") or ("" if secret else (node.text or "").strip())
    return Element(name, role, box) if box is not None and name else None


def _screen(tree: ET.Element) -> tuple[float, float]:
    """Width and height. A root without size: as far as the largest window reaches (a desktop has a panel that fills
    it)."""
    own = _box(_facts(tree))
    boxes = [own] if own is not None else [box for node in tree.iter() if (box := _box(_facts(node))) is not None]
    if not boxes:
        raise BadRow("wrong-form", "elements with screencoord and size", "none")
    largest = max(boxes, key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return largest[2], largest[3]


def _facts(node: ET.Element) -> dict[str, str]:
    """Attributes without their name spaces."""
    return {name.rpartition("}")[2]: value for name, value in node.attrib.items()}


def _box(facts: dict[str, str]) -> tuple[float, float, float, float] | None:
    if "screencoord" not in facts or "size" not in facts:
        return None
    start, size = PAIR.fullmatch(facts["screencoord"]), PAIR.fullmatch(facts["size"])
    if start is None or size is None:
        raise BadRow("wrong-form", 'screencoord "(x, y)" and size "(w, h)"', (facts["screencoord"], facts["size"]))
    (x, y), (width, height) = map(float, start.groups()), map(float, size.groups())
    return (x, y, x + width, y + height) if width > 0 and height > 0 else None
