"""One row of the table of readers: a faithful file of a format, what it says, and an adverse file with its faults.

What a file says is written short: messages as (role, parts), a part as its text, ("image", number), or as one of the
functions below. The same short form is made of a Sample, so that an expectation is one literal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.prepare.builders import a_clip, a_picture
from trainer.data.sample import Message, Object, Objects, Part, Sample
from trainer.recipe import Rendering

Said = list[tuple[str, list[Any]]]
IMAGE, SECOND, VIDEO = ("image", 0), ("image", 1), ("video", 0)


@dataclass(frozen=True)
class Row:
    name: str
    """Of the row: the format's, and behind a dash what is particular where a format has several rows."""
    kind: str
    rendering: Rendering
    good: Callable[[Path], Path]
    """Writes a faithful file and its media into the folder."""
    want: Sequence[Mapping[str, Any]]
    """told() of every sample, in order."""
    bad: Callable[[Path], Path]
    """Writes an adverse file into the folder (another one)."""
    faults: Mapping[str, int]
    """How many of its rows are refused, by reason. Every row of the adverse file is refused."""
    media: Callable[[Path], Path] | None = None
    """From the faithful file to the folder of its media; None: beside it."""
    quick: bool = False
    """Part of make test."""

    @property
    def format(self) -> str:
        return self.name.partition("-")[0]


# ---------------------------------------------------------------- what a sample says, short


def told(sample: Sample) -> dict[str, Any]:
    """id, says, media; and chosen, rejected, key where there are some."""
    files = [f"{_file(item.origin)} {item.width}x{item.height}" for item in sample.media]
    found: dict[str, Any] = {"id": sample.id, "says": _said(sample.messages), "media": files}
    more = {"chosen": _said(sample.chosen), "rejected": _said(sample.rejected)}
    found |= {name: value for name, value in more.items() if value}
    return found | ({"key": (sample.key.task, _rounded(sample.key.value))} if sample.key else {})


def _file(origin: str) -> str:
    """Name without its folder, and without the place inside a tar."""
    return origin.rpartition("/")[2].partition("#bytes=")[0]


def want(identity: str, says: Said, *media: str, **more: Any) -> dict[str, Any]:
    return {"id": identity, "says": says, "media": list(media), **more}


def box(label: str, *xyxy: float, **more: Any) -> tuple:
    return label, "box", xyxy, more


def point(label: str, *xy: float) -> tuple:
    return label, "point", xy, {}


def span(label: str, *seconds: float) -> tuple:
    return label, "span", seconds, {}


def mask(label: str, *xyxy: float, **more: Any) -> tuple:
    """`rle` or `polygons`."""
    return label, "mask", xyxy, more


def block(role: str, *xyxy: float, content: str = "") -> tuple:
    """Of a page."""
    return role, "box", xyxy, {"role": role, "content": content}


def objects(*things: tuple, media: int = 0, form: str = "any") -> tuple:
    return "objects", media, form, list(things)


def action(tool: str, name: str, media: int = 0, *, coordinates: Mapping | None = None, **arguments: Any) -> tuple:
    return "action", media, tool, name, arguments, dict(coordinates or {})


def _said(messages: Sequence[Message]) -> Said:
    return [(message.role, [_part(part) for part in message.parts]) for message in messages]


def _part(part: Part) -> Any:
    if part.part == "text":
        return part.text
    if part.part in ("image", "video"):
        return part.part, part.media
    if isinstance(part, Objects):
        return objects(*map(_thing, part.objects), media=part.media, form=part.form)
    if part.part == "action":
        return action(part.tool, part.action, part.media, coordinates=part.coordinates, **part.arguments)
    return part.part, part.media, part.tool  # type: ignore[union-attr]


def _thing(thing: Object) -> tuple:
    at = thing.at
    more = {"role": thing.role, "content": thing.content}
    if at.shape == "span":
        numbers: Sequence[float] = (at.start_s, at.end_s)
    elif at.shape == "point":
        numbers = at.xy
    else:
        numbers = at.xyxy
    if at.shape == "mask":
        more |= {"rle": at.rle, "polygons": at.polygons}
    return thing.label, at.shape, tuple(_rounded(numbers)), {k: v for k, v in more.items() if v is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


# ---------------------------------------------------------------- files


def with_media(folder: Path) -> Path:
    """red.png of 60x40, blue.jpg of 100x200, clip.mp4 of 2 s; damaged ones: cut.png, cut.jpg, empty.png, text.png."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"red.png": a_picture(), "blue.jpg": a_picture(100, 200, "blue", "JPEG"), "clip.mp4": a_clip()}
    noise = a_picture(200, 200, kind="JPEG")
    files |= {"cut.png": a_picture()[:60], "cut.jpg": noise[: len(noise) // 2], "empty.png": b"", "text.png": b"no"}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
