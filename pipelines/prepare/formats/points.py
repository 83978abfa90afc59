"""Points, one question an entry: {"image" | "image_path" | "image_url", "label", "points": [{"x", "y"}, ...], "count"}.
This is PixMo-Points (its `count`, where given, must be the number of points; no points means: there is none).

`coordinates` in a row says what they are in: percent (default), pixels, thousand, unit. The page of PixMo-Points speaks
of pixels, while those who train on it read percent; read as percent, pixels of most pictures lie outside and are
refused, where the opposite mistake would go unseen.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.prepare.formats.peek import Peek
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
from pipelines.prepare.grounding.phrases import NONE, POINT, pick
from trainer.recipe import Source

KIND, RENDERING = "grounding", "chat"


def looks(peek: Peek) -> str | None:
    points = peek.first("points")
    listed = isinstance(points, list) and (not points or (isinstance(points[0], dict) and "x" in points[0]))
    return "label and points of x and y" if listed and peek.has("label") else None


def read(path: str, media_root: str, source: Source) -> Iterator[Row]:
    yield from each(path, lambda entry, where: draft(entry, where, media_root, source))


def draft(entry: dict, where: str, media_root: str, source: Source) -> Draft:
    label, points = str(field_of(entry, "label")), entry.get("points")
    if not isinstance(points, list):
        raise BadRow("wrong-form", "points: a list of {x, y}", type(points).__name__)
    if entry.get("count") not in (None, len(points)):
        raise BadRow("wrong-count", f"count {len(points)}, the number of points", entry["count"])
    percent = entry.get("coordinates", "percent") == "percent"
    objects = [_object(point, label, percent) for point in points]
    image = field_of(entry, "image", "image_path", "images", "image_url")
    if isinstance(image, list):
        if len(image) != 1:
            raise BadRow("wrong-form", "one picture", f"{len(image)} of them")
        image = image[0]
    media = [MediaRef(resolve(media_root, image), "image")]
    identity = identity_of(entry, where)
    question = message("user", {"part": "image", "media": 0}, text(pick(POINT, "points", identity).format(label)))
    answer = {"part": "objects", "media": 0, "objects": objects, "form": "any"}
    answer = answer if objects else text(pick(NONE, "points", identity))
    key = {"task": "point", "value": objects[0]["at"]["xy"]} if len(objects) == 1 else None
    return Draft(
        where,
        identity,
        [question, message("assistant", answer)],
        media,
        key=key,
        units="thousand" if percent else units_of(entry),
        notes={} if objects else {"absent": [label]},
    )


def _object(point: dict, label: str, percent: bool) -> dict:
    """Percent as thousandths, of which drafts know."""
    x, y = float(field_of(point, "x")), float(field_of(point, "y"))
    if percent and not (0 <= x <= 100 and 0 <= y <= 100):
        raise BadRow("outside-picture", "x and y in percent (else say `coordinates: pixels` in the row)", f"{x}, {y}")
    return {"label": label, "at": {"shape": "point", "xy": [10 * x, 10 * y] if percent else [x, y]}}
