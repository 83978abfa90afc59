"""Android view hierarchies: one file a screen as `uiautomator dump` writes it (<hierarchy><node class= text=
content-desc= bounds="[l,t][r,b]" ...>), the screenshot of the same name beside it. Becomes a caption of the screen and
the place of every element (elements.py). Bounds are pixels of the screen; the root's node states its size.

A node speaks by its text, else its content-desc. One that can be clicked and has neither takes the words of what lies
inside it (a row of a list), which then do not stand for themselves.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from pipelines.prepare.formats.elements import Element, screen_draft, screenshot_of, visible, xml_tree
from pipelines.prepare.formats.rows import Bad, BadRow, Draft, Row, guarded
from trainer.recipe import Source

BOUNDS = re.compile(r"\[(-?\d+),(-?\d+)\]\[(-?\d+),(-?\d+)\]")
ROLES = {
    "EditText": "input",
    "AutoCompleteTextView": "input",
    "Button": "button",
    "ImageButton": "button",
    "FloatingActionButton": "button",
    "CheckBox": "checkbox",
    "CheckedTextView": "checkbox",
    "RadioButton": "radio button",
    "Switch": "switch",
    "ToggleButton": "switch",
    "Spinner": "drop-down list",
    "SeekBar": "slider",
    "ImageView": "image",
    "TextView": "text",
}
"""Last part of the class -> role; other classes are buttons when they can be clicked, else text."""


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    def one(entry: dict, where: str) -> Draft:
        tree = entry["tree"]
        if tree.tag != "hierarchy":
            raise BadRow("wrong-form", "a <hierarchy> of uiautomator", f"<{tree.tag}>")
        nodes = list(tree.iter("node"))
        if not nodes:
            raise BadRow("no-objects", "at least one node", "none")
        _, _, width, height = _bounds(nodes[0])
        shown = visible(_elements(nodes[0]), width, height)
        return screen_draft(where, path.rpartition("/")[2], screenshot_of(path, media_root), shown, (width, height))

    tree = xml_tree(path)
    yield tree if isinstance(tree, Bad) else guarded(path, one, {"tree": tree})


def _elements(node: ET.Element) -> Iterator[Element]:
    """In the order of the tree."""
    name, clickable = _name(node), node.get("clickable") == "true"
    inner = [child for child in node.iter("node") if child is not node]
    taken = not name and clickable and not any(child.get("clickable") == "true" for child in inner)
    if taken:
        name = " ".join(filter(None, map(_name, inner)))
    if name and node.get("visible-to-user") != "false":
        role = ROLES.get(node.get("class", "").rpartition(".")[2], "button" if clickable else "text")
        yield Element(name, "button" if clickable and role in ("text", "image") else role, _bounds(node))
    if not taken:
        for child in node.findall("node"):
            yield from _elements(child)


def _name(node: ET.Element) -> str:
    """A password field's text is never used: it would be a secret, or its dots."""
    own = "" if node.get("password") == "true" else node.get("text") or ""
    return own or node.get("content-desc") or ""


def _bounds(node: ET.Element) -> tuple[float, float, float, float]:
    found = BOUNDS.fullmatch(node.get("bounds", ""))
    if found is None:
        raise BadRow("wrong-form", 'bounds "[left,top][right,bottom]"', repr(node.get("bounds")))
    left, top, right, bottom = map(float, found.groups())
    return left, top, right, bottom
