"""What lies on a picture, as SVG in pixels of the original above a small copy of it; and the frames of a clip.

Every object of a sample has one colour and number, on the picture and in the text.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from trainer.data import media, video
from trainer.data.masks import from_run_lengths
from trainer.data.sample import Action, Mask, Media, Object, Point, Span
from trainer.errors import MediaError

SIDE = 640
"""Longest side of a picture on the page."""
LEAST = 320
"""Smaller ones are shown larger, so that what is drawn on them can be seen."""
FRAME_HEIGHT = 112
"""Eight square ones go side by side."""
FRAMES = 8
LINE = 22
"""Pixels of a line of bars."""
COLOURS = ("#d6303f", "#1668c4", "#16803c", "#a24fbf", "#c26a00", "#00808a", "#8a5a2b", "#c2368d")


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def data_uri(image: Image.Image, kind: str = "JPEG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=80)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def picture(
    item: Media, data: bytes, objects: Sequence[tuple[int, Object]], actions: Sequence[tuple[int, Action]] = ()
) -> str:
    """<div> with the picture and what lies on it. `objects` and `actions` come with their numbers in the sample.

    Raises:
        MediaError: a file that cannot be decoded, or a mask of another size.
    """
    image = media.upright(data, where=item.origin)
    image.thumbnail((SIDE, SIDE))
    scale = max(1.0, LEAST / max(image.size))
    width, height = round(image.width * scale), round(image.height * scale)
    unit = item.width / width
    masks = "".join(_mask(thing.at, item, number) for number, thing in objects if isinstance(thing.at, Mask))
    lines = "".join(_shape(number, thing, item, unit) for number, thing in objects)
    lines += "".join(_action(number, action, unit) for number, action in actions)
    view = f"viewBox='0 0 {item.width} {item.height}' preserveAspectRatio='none'"
    areas = f"<svg {view}>{masks}</svg>" if masks else ""
    return (
        f"<div class='shown' style='width:{width}px'><img src='{data_uri(image)}' alt='' width='{width}' "
        f"height='{height}'>{areas}<svg class='lines' {view}>{lines}</svg></div>"
    )


def _shape(number: int, thing: Object, item: Media, unit: float) -> str:
    at, pen = thing.at, f"stroke='{colour(number)}' stroke-width='{2 * unit:.2f}'"
    title = f"<title>{number + 1} {html.escape(thing.label)}</title>"
    if isinstance(at, Span):
        return ""
    if isinstance(at, Point):
        x, y = at.xy
        body = f"<circle cx='{x:g}' cy='{y:g}' r='{6 * unit:.2f}' fill='{colour(number)}55' {pen}>{title}</circle>"
        beside = 7 if x + 30 * unit <= item.width else -7 - 12 * (0.7 * len(str(number + 1)) + 0.5)
        return body + _tag(number, x + beside * unit, y - 7 * unit, unit, item)
    x0, y0, x1, y1 = at.xyxy
    body = f"<rect x='{x0:g}' y='{y0:g}' width='{x1 - x0:g}' height='{y1 - y0:g}' fill='none' {pen}>{title}</rect>"
    return body + _tag(number, x0, y0, unit, item)


def _mask(at: Mask, item: Media, number: int) -> str:
    if at.polygons is not None:
        rings = (" ".join(f"{x:g},{y:g}" for x, y in zip(ring[::2], ring[1::2], strict=False)) for ring in at.polygons)
        return "".join(f"<polygon points='{ring}' fill='{colour(number)}66'/>" for ring in rings)
    if at.rle is None:
        return ""
    try:
        inside = from_run_lengths(at.rle, item.width, item.height)
    except ValueError as error:
        raise MediaError("a mask that cannot be drawn", where=f"object {number + 1}", got=str(error)) from None
    red, green, blue = (int(colour(number)[at : at + 2], 16) for at in (1, 3, 5))
    pixels = np.zeros((item.height, item.width, 4), np.uint8)
    pixels[inside] = (red, green, blue, 110)
    overlay = Image.fromarray(pixels, "RGBA")
    overlay.thumbnail((SIDE, SIDE), Image.Resampling.NEAREST)
    return (
        f"<image href='{data_uri(overlay, 'PNG')}' x='0' y='0' width='{item.width}' height='{item.height}' "
        "preserveAspectRatio='none'/>"
    )


def _tag(number: int, x: float, y: float, unit: float, item: Media) -> str:
    """The object's number, within the picture."""
    size = 12 * unit
    width = size * (0.7 * len(str(number + 1)) + 0.5)
    x, top = max(0.0, min(x, item.width - width)), max(0.0, y - size * 1.2)
    return (
        f"<rect x='{x:g}' y='{top:g}' width='{width:g}' height='{size * 1.2:g}' fill='{colour(number)}'/>"
        f"<text x='{x + size * 0.25:g}' y='{top + size:g}' font-size='{size:g}' fill='#fff'>{number + 1}</text>"
    )


BARBS = (-0.5, 0.5)
"""Radians from the shaft of an arrow to its barbs."""


def _action(number: int, action: Action, unit: float) -> str:
    """A cross where the action is; an arrow from the first place to the second."""
    points = list(action.coordinates.values())
    pen, reach = f"stroke='#d6303f' stroke-width='{3 * unit:.2f}'", 14 * unit
    if not points:
        return ""
    x, y = points[0]
    drawn = f"<line x1='{x - reach:g}' y1='{y:g}' x2='{x + reach:g}' y2='{y:g}' {pen}/>"
    drawn += f"<line x1='{x:g}' y1='{y - reach:g}' x2='{x:g}' y2='{y + reach:g}' {pen}/>"
    drawn += f"<circle cx='{x:g}' cy='{y:g}' r='{reach * 0.6:g}' fill='none' {pen}/>"
    for to_x, to_y in points[1:2]:
        drawn += f"<line x1='{x:g}' y1='{y:g}' x2='{to_x:g}' y2='{to_y:g}' stroke-dasharray='{6 * unit:g}' {pen}/>"
        towards = math.atan2(y - to_y, x - to_x)
        barbs = [(to_x + reach * math.cos(towards + turn), to_y + reach * math.sin(towards + turn)) for turn in BARBS]
        head = " ".join(f"{at_x:g},{at_y:g}" for at_x, at_y in (barbs[0], (to_x, to_y), barbs[1]))
        drawn += f"<polyline points='{head}' fill='none' {pen}/>"
    return drawn


def frames(item: Media, data: bytes, spans: Sequence[tuple[int, Object]]) -> str:
    """Evenly spaced frames with their times, and a bar with the spans below."""
    count = min(FRAMES, item.num_frames)
    numbers = [number * item.num_frames // count for number in range(count)]
    width = max(1, round(item.width * FRAME_HEIGHT / item.height))
    pixels = video.decode_video(data, numbers, item.fps, width, FRAME_HEIGHT, where=item.origin)
    strip = "".join(
        f"<figure><img src='{data_uri(Image.fromarray(frame))}' alt='' width='{width}' height='{FRAME_HEIGHT}'>"
        f"<figcaption>{number / item.fps:.2f} s</figcaption></figure>"
        for number, frame in zip(numbers, pixels, strict=True)
    )
    return f"<div class='strip'>{strip}</div>{_bars(item, spans)}"


def _bars(item: Media, spans: Sequence[tuple[int, Object]]) -> str:
    """A bar for each span of time; those that overlap lie below each other."""
    until: list[float] = []
    """Where each line is taken up to."""
    bars = ""
    for number, thing in spans:
        if not isinstance(at := thing.at, Span):
            continue
        line = next((line for line, end in enumerate(until) if end <= at.start_s), len(until))
        until[line : line + 1] = [at.end_s]
        bars += (
            f"<div class='bar' style='top:{LINE * line}px;left:{_share(at.start_s, item)}%;width:"
            f"{_share(at.end_s - at.start_s, item)}%;background:{colour(number)}' "
            f"title='{html.escape(thing.label, quote=True)}'>{number + 1}</div>"
        )
    return f"<div class='time' style='height:{LINE * len(until) - 2}px'>{bars}</div>" if bars else ""


def _share(seconds: float, item: Media) -> str:
    return f"{min(100.0, 100 * seconds / item.duration_s):.2f}" if item.duration_s else "0"
