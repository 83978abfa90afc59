"""UI elements of a screenshot, as trees of views or of accessibility state them, become a caption of the screen and
element grounding: one conversation of two answers, both true by what the tree says.

What the readers share: an element has a name, a role and a box; one without a name, without area or outside the screen
says nothing that can be seen and is left out; a box that leaves the screen is cut there. A tree does not say what
covers what, so an element under a dialogue stands in the answer as well.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.prepare.formats.rows import Bad, BadRow, Draft, MediaRef, message, text
from trainer import storage
from trainer.errors import DataError

CAPTION = "What can be seen on this screen?"
GROUNDING = "Locate every element of the screen."


@dataclass(frozen=True)
class Element:
    name: str
    role: str
    """button, input, link, text, ...: one word of the readers' tables."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the screen."""


def visible(elements: Iterable[Element], width: float, height: float) -> list[Element]:
    """Elements with a name and an area on the screen, their boxes cut to it; what is there twice once."""
    found: dict[Element, None] = {}
    for element in elements:
        left, top, right, bottom = element.box
        box = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
        name = " ".join(element.name.split())
        if name and box[0] < box[2] and box[1] < box[3]:
            found[Element(name, element.role, box)] = None
    return list(found)


def screen_draft(where: str, identity: str, image: str, elements: Sequence[Element], size: Sequence[float]) -> Draft:
    """A caption and the place of every element. Raises BadRow when there is none."""
    if not elements:
        raise BadRow("no-objects", "at least one named element on the screen", "none")
    objects = [
        {"label": item.name, "role": item.role, "at": {"shape": "box", "xyxy": list(item.box)}} for item in elements
    ]
    messages = [
        message("user", {"part": "image", "media": 0}, text(CAPTION)),
        message("assistant", text(caption(elements))),
        message("user", text(GROUNDING)),
        message("assistant", {"part": "objects", "media": 0, "objects": objects, "form": "json"}),
    ]
    return Draft(where, identity, messages, [MediaRef(image, "image")], meta={"stated_size": list(size)})


def caption(elements: Sequence[Element]) -> str:
    """Every element by role, in the order of the tree: 'A screen with 2 buttons: "OK", "Cancel"; 1 input: "Name".'"""
    of_role: dict[str, list[str]] = {}
    for item in elements:
        of_role.setdefault(item.role, []).append(item.name)
    told = [
        f"{len(names)} {role if len(names) == 1 else plural(role)}: " + ", ".join(f'"{name}"' for name in names)
        for role, names in of_role.items()
    ]
    return f"A screen with {'; '.join(told)}."


def plural(role: str) -> str:
    return role + ("es" if role.endswith(("x", "ch", "s")) else "s")


# ---------------------------------------------------------------- a tree in one XML file, the picture beside it

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def xml_tree(path: str) -> ET.Element | Bad:
    """The root of a file, or the Bad that says why there is none.

    Raises:
        DataError: no such file.
    """
    try:
        return ET.fromstring(storage.read_bytes(path))
    except ET.ParseError as error:
        line, column = error.position
        return Bad(f"{path}, line {line}", "well-formed XML", f"{error.msg} (column {column})", "bad-xml")
    except (ValueError, LookupError) as error:  # an encoding that the parser does not know: gbk, shift_jis
        return Bad(path, "XML in UTF-8, UTF-16 or an encoding of one byte a character", str(error), "bad-xml")
    except FileNotFoundError:
        raise DataError("no such annotation file", where=path, do="check the path of the source") from None


def screenshot_of(path: str, root: str) -> str:
    """The picture that belongs to a tree: of the same name, below the media folder. Raises BadRow."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    tried = [f"{root.rstrip('/')}/{stem}{suffix}" for suffix in PICTURES]
    capitals = [f"{root.rstrip('/')}/{stem}{suffix.upper()}" for suffix in PICTURES]
    for name in (*tried, *capitals):
        if storage.exists(name):
            return name
    told = f"a screenshot beside the tree: one of {', '.join(tried)}, or their endings in capitals"
    raise BadRow("missing-media", told, "no such file")
