"""Web pages with the boxes of their DOM: the JSON that pipelines/prepare/screenshots/make.py writes with a browser.
{"screens": [{"file", "site", "url", "width", "height", "elements": [{"role", "text", "box"}]}], "walks": [{"site",
"steps": [{"screen", "action", "element", "text"}]}]}. A screen becomes a caption and the place of every element
(elements.py), a walk a trajectory of computer_use. Boxes are CSS pixels of the stated size: a screenshot at another
device pixel ratio is scaled.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.corpus.screens import walk_row
from pipelines.prepare.formats import agent
from pipelines.prepare.formats.elements import Element, screen_draft, visible
from pipelines.prepare.formats.rows import BadRow, Draft, Row, field_of, guarded, json_document, resolve
from trainer.recipe import Source


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    found = json_document(path)
    screens = found.get("screens") or []

    def screen(entry: dict, where: str) -> Draft:
        width, height = field_of(entry, "width"), field_of(entry, "height")
        listed = [
            Element(str(field_of(item, "text")), str(field_of(item, "role")), _box(field_of(item, "box")))
            for item in field_of(entry, "elements")
        ]
        image = resolve(media_root, field_of(entry, "file"))
        return screen_draft(where, str(entry["file"]), image, visible(listed, width, height), (width, height))

    def walk(entry: dict, where: str) -> Draft:
        numbers = [step["screen"] for step in field_of(entry, "steps")]
        if outside := [number for number in numbers if not 0 <= number < len(screens)]:
            raise BadRow("wrong-form", f"screens 0 to {len(screens) - 1}", outside)
        episode = walk_row(entry, screens, {number: field_of(screens[number], "file") for number in numbers})
        messages, media = agent.trajectory(episode, media_root)
        sizes = [[screens[number]["width"], screens[number]["height"]] for number in numbers]
        return Draft(where, where.rpartition(", ")[2], messages, media, meta={"stated_sizes": sizes})

    for number, entry in enumerate(screens):
        yield guarded(f"{path}, screens[{number}]", screen, entry)
    for number, entry in enumerate(found.get("walks") or []):
        yield guarded(f"{path}, walks[{number}]", walk, entry)


def _box(box: list[float]) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom
